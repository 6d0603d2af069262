#include "cpu/isa.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include "cpu/tiles.h"
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace yivl {

namespace {

constexpr std::array<std::string_view, 5> kNames{"amx", "avx512", "avx2", "neon", "portable"};

#if defined(__x86_64__)
bool has_avx_vnni() {
    constexpr unsigned kAvxVnni = 1u << 4;
    unsigned a = 0, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvxVnni) != 0;
}

const Kernels& avx2_kernels() { return has_avx_vnni() ? kAvx2VnniKernels : kAvx2Kernels; }

const Kernels& avx512_kernels() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512vnni")) return kAvx512Kernels;
    // AMD's CPUs add in four units and multiply in two of them; Intel's have two for both.
    if (!__builtin_cpu_is("amd")) return kAvx512VnniKernels;
    // Zen 5, which has AVX-VNNI, too, keeps 48 kB near; in Zen 4's 32 kB lines that come early drive out what is in
    // use.
    return has_avx_vnni() ? kAvx512VnniSumsManyLinesKernels : kAvx512VnniSumsKernels;
}
#endif

#if defined(__aarch64__)
const Kernels& neon_kernels() {
#if defined(__linux__)
    constexpr unsigned long kDotprod = 1ul << 20, kI8mm = 1ul << 13;  // HWCAP_ASIMDDP, HWCAP2_I8MM
    if ((getauxval(AT_HWCAP2) & kI8mm) != 0) return kNeonI8mmKernels;
    if ((getauxval(AT_HWCAP) & kDotprod) != 0) return kNeonDotprodKernels;
#endif
    return kNeonKernels;
}
#endif

#if defined(__x86_64__) && defined(__linux__)
const Kernels& amx_kernels() {
    static const Kernels kernels = [] {
        Kernels k = kAvx512VnniKernels;
        k.name = "amx";
        k.variant = "";
        k.few = k.packed;
        k.packed = &kAmxPackedKernels;
        k.packed_attention = &kAmxAttentionKernels;
        return k;
    }();
    return kernels;
}
#endif

// The tables in this build, best first.
std::vector<const Kernels*> built_kernels() {
    return {
#if defined(__x86_64__) && defined(__linux__)
        &amx_kernels(),
#endif
#if defined(__x86_64__)
        &avx512_kernels(), &avx2_kernels(),
#endif
#if defined(__aarch64__)
        &neon_kernels(),
#endif
        &kPortableKernels,
    };
}

// Whether the CPU has what the table's code needs and the operating system saves those registers: the compiler's
// run-time library asks cpuid and xgetbv.
bool usable(const Kernels& kernels) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (&kernels == &avx2_kernels()) return avx2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (&kernels == &avx512_kernels()) return avx512;
#if defined(__linux__)
    if (&kernels == &amx_kernels()) {
        return avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
               __builtin_cpu_supports("avx512bf16") && amx::permitted();
    }
#endif
#endif
#if defined(__aarch64__)
    if (&kernels == &neon_kernels()) return true;
#endif
    return &kernels == &kPortableKernels;
}

// Of names, or of things with a name.
template <class Things, class Name = std::identity>
std::string list(const Things& things, Name name = {}) {
    std::string names;
    for (const auto& thing : things) {
        if (!names.empty()) names += ", ";
        names += std::invoke(name, thing);
    }
    return names;
}

}  // namespace

std::vector<const Kernels*> available_kernels() {
    std::vector<const Kernels*> tables = built_kernels();
    std::erase_if(tables, [](const Kernels* kernels) { return !usable(*kernels); });
    return tables;
}

const Kernels& choose_kernels(std::string_view name) {
    const std::vector<const Kernels*> available = available_kernels();
    if (name.empty()) return *available.front();
    const auto called = [name](const Kernels* kernels) { return kernels->name == name; };
    if (const auto found = std::ranges::find_if(available, called); found != available.end()) return **found;

    const std::string quoted = "instruction set \"" + std::string(name) + "\"";
    if (std::ranges::find(kNames, name) == kNames.end()) {
        throw std::invalid_argument(quoted + " is unknown; known: " + list(kNames));
    }
    const std::vector<const Kernels*> built = built_kernels();
    if (std::ranges::none_of(built, called)) {
        throw std::invalid_argument(quoted + " is not in this build, which has: " + list(built, &Kernels::name));
    }
    throw std::invalid_argument("this CPU or its operating system lacks " + quoted +
                                "; here are: " + list(available, &Kernels::name));
}

const Kernels& default_kernels() {
    const char* forced = std::getenv("YIVL_ISA");
    try {
        return choose_kernels(forced == nullptr ? "" : forced);
    } catch (const std::invalid_argument& e) {
        throw std::invalid_argument(std::string("YIVL_ISA: ") + e.what());
    }
}

}  // namespace yivl
