#include "quantize/quantize.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/threads.h"
#include "quantize/quantizers.h"

namespace yivl {

namespace {

// Weights of a piece of work: some milliseconds at the slowest type.
constexpr int64_t kPiece = 1 << 16;

const Quantizers& quantizers_for(const Kernels& kernels) {
#if defined(__x86_64__)
    const std::string_view name = kernels.name;
    if (name == "avx512" || name == "amx") return kAvx512Quantizers;
    if (name == "avx2") return kAvx2Quantizers;
#endif
    return kPortableQuantizers;
}

void check_finite(const QuantizeInput& input, int64_t begin, int64_t end) {
    uint32_t largest = 0;
    for (int64_t i = begin; i < end; ++i) {
        largest = std::max(largest, __builtin_bit_cast(uint32_t, input.values[static_cast<size_t>(i)]) & 0x7fffffff);
    }
    if (largest < 0x7f800000) return;
    int64_t i = begin;
    while (std::isfinite(input.values[static_cast<size_t>(i)])) ++i;
    throw std::invalid_argument("weights to be quantised must be finite, found " +
                                number_text(input.values[static_cast<size_t>(i)]) + " in row " +
                                std::to_string(i / input.columns) + ", column " + std::to_string(i % input.columns));
}

// One weight per column, 1 on average over every block, so that no sum over a block overflows. Columns that do not
// matter at all still count for a little, and get sensible weights where it costs the others nothing.
std::vector<float> block_weights(const QuantizeInput& input, int64_t block) {
    std::vector<float> weights(static_cast<size_t>(input.columns), 1.0f);
    if (input.importance.empty()) return weights;
    for (int64_t begin = 0; begin < input.columns; begin += block) {
        const auto part = input.importance.subspan(static_cast<size_t>(begin), static_cast<size_t>(block));
        double sum = 0;
        for (const float w : part) sum += w;
        if (sum == 0) continue;
        constexpr double kLeast = 1e-5;
        for (size_t i = 0; i < part.size(); ++i) {
            weights[static_cast<size_t>(begin) + i] =
                static_cast<float>(part[i] * (static_cast<double>(block) / sum) + kLeast);
        }
    }
    return weights;
}

void check(const QuantizeInput& input, const TypeInfo& info, size_t bytes) {
    if (input.columns <= 0 || input.columns % info.block != 0) {
        throw std::invalid_argument("a row of " + std::string(info.name) + " must be a multiple of " +
                                    std::to_string(info.block) + " columns, found " + std::to_string(input.columns));
    }
    const size_t n = input.values.size(), columns = static_cast<size_t>(input.columns);
    const size_t expected = n / static_cast<size_t>(info.block) * static_cast<size_t>(info.bytes);
    if (n % columns != 0 || bytes != expected) {
        throw std::invalid_argument("expected whole rows of " + std::to_string(columns) + " columns and " +
                                    std::to_string(expected) + " bytes for the result, found " + std::to_string(n) +
                                    " values and " + std::to_string(bytes) + " bytes");
    }
    if (input.importance.empty()) return;
    if (input.importance.size() != columns) {
        throw std::invalid_argument("importance must have one value per column, expected " + std::to_string(columns) +
                                    ", found " + std::to_string(input.importance.size()));
    }
    for (size_t i = 0; i < columns; ++i) {
        const float w = input.importance[i];
        if (!std::isfinite(w) || w < 0) {
            throw std::invalid_argument("importance must be finite and not negative, found " + number_text(w) +
                                        " for column " + std::to_string(i));
        }
    }
}

}  // namespace

void quantize(WeightType type, const QuantizeInput& input, std::span<std::byte> dst, int n_threads, Control& control) {
    const TypeInfo& info = type_info(type);
    check(input, info, dst.size());
    const bool weighted = std::ranges::any_of(input.importance, [](float w) { return w != 0; });
    const std::vector<float> weights = block_weights(input, info.block);
    const QuantizeSource source{input.values.data(), weights.data(), weighted, input.columns};
    const Quantizers& quantizers = quantizers_for(default_kernels());

    ThreadPool pool(n_threads == 0 ? default_thread_count() : n_threads);
    const int64_t n_blocks = static_cast<int64_t>(input.values.size()) / info.block;
    pool.parallel_for(control, n_blocks, kPiece / info.block, [&](int64_t begin, int64_t end, int) {
        check_finite(input, begin * info.block, end * info.block);
        quantizers.quantize(type, source, begin, end, dst.data() + begin * info.bytes);
    });
}

}  // namespace yivl
