// The instructions of AMX tiles, as few as the kernels need. tests/amx_emulator has a twin of this file, for CPUs
// without.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#include "cpu/target_region.h"

namespace yivl::amx {

// Whether the CPU has AMX tiles for bfloat16, the system saves them, and it lets this process use them: since they make
// signal frames large, Linux wants to be asked.
inline bool permitted() {
    unsigned a, b, c, d;
    constexpr unsigned kTile = 1u << 24, kBfloat16 = 1u << 22;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTile) == 0 || (d & kBfloat16) == 0) return false;
    constexpr unsigned kXsaveEnabled = 1u << 27;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kXsaveEnabled) == 0) return false;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr unsigned kTileState = 3u << 17;
    if ((low & kTileState) != kTileState) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Sets up the calling thread's tiles from the 64 bytes that ldtilecfg takes; all hold 0.
YIVL_INLINE void configure_tiles(const void* config) { asm volatile("ldtilecfg (%0)" : : "r"(config) : "memory"); }
// Without live tiles the system has nothing to save, and the core runs other code faster.
YIVL_INLINE void release_tiles() { asm volatile("tilerelease"); }

// GCC 12's own intrinsics do not say which memory they read: stores to it could be left out.
template <int tile>
YIVL_INLINE void load_tile(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(tile) : "memory");
}
// The same, of what will not be read again soon: it does not drive other lines out of the first-level cache.
template <int tile>
YIVL_INLINE void load_passing_tile(const void* p, int64_t stride) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
YIVL_INLINE void store_tile(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
YIVL_INLINE void zero_tile() {
    asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}
// sums[m][n] += a[m][2k] * b[k][2n] + a[m][2k + 1] * b[k][2n + 1] for all k: a row of b holds pairs from two rows.
template <int sums, int a, int b>
YIVL_INLINE void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
}

}  // namespace yivl::amx
