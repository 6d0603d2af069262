// Twin of csrc/cpu/tiles.h for tests on CPUs without AMX: a thread's tiles lie in memory, and products are rounded as
// Intel's manual defines them. What the hardware would refuse ends the program, and so does what it would bear but no
// kernel can mean: a tile read before anything came into it, tiles not released.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/target_region.h"

namespace yivl::amx {

inline bool permitted() { return true; }

// An instruction set's object must not export functions: so none of these is one that other objects may share.
namespace {

struct Tile {
    alignas(64) uint32_t rows[16][16];  // beyond the shape all 0
    int n_rows, row_bytes;
    bool written;
};

struct Tiles {
    Tile tiles[8];
    bool configured;

    // A tile that an instruction names.
    Tile& use(int tile, const char* instruction) {
        if (!configured) fail(instruction, tile, "no tiles are configured");
        if (tiles[tile].n_rows == 0) fail(instruction, tile, "it has no rows");
        return tiles[tile];
    }
    const Tile& read(int tile, const char* instruction) {
        if (!use(tile, instruction).written) fail(instruction, tile, "nothing came into it since it was configured");
        return tiles[tile];
    }
    [[noreturn]] static void fail(const char* instruction, int tile, const char* what) {
        std::fprintf(stderr, "AMX emulator: %s, tile %d: %s\n", instruction, tile, what);
        std::abort();
    }
};

thread_local Tiles my_tiles;

#if !defined(__clang__)
// The undefined lanes that GCC's own intrinsics start from (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
// Products of even and of odd columns are summed apart, each by fused multiply-adds in order of the columns; then the
// two sums are added, and their sum to the accumulator. Rounding is to nearest even, and inputs and results too small
// for a normal number become 0, whatever the thread has set.
__attribute__((target("avx512f"), noinline)) void multiply(Tile& sums, const Tile& a, const Tile& b) {
    uint32_t before;
    asm volatile("stmxcsr %0" : "=m"(before) : : "memory");
    const uint32_t flush_to_zero = 0x9fc0;
    asm volatile("ldmxcsr %0" : : "m"(flush_to_zero) : "memory");
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    for (int m = 0; m < sums.n_rows; ++m) {
        __m512 even = _mm512_setzero_ps(), odd = even;
        for (int k = 0; k < b.n_rows; ++k) {
            const __m512i x = _mm512_set1_epi32(static_cast<int>(a.rows[m][k])), y = _mm512_load_si512(b.rows[k]);
            even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                                   _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), even);
            odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, upper)),
                                  _mm512_castsi512_ps(_mm512_and_si512(y, upper)), odd);
        }
        _mm512_store_ps(sums.rows[m], _mm512_add_ps(_mm512_load_ps(sums.rows[m]), _mm512_add_ps(even, odd)));
    }
    asm volatile("ldmxcsr %0" : : "m"(before) : "memory");
}
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif

}  // namespace

YIVL_INLINE void configure_tiles(const void* config) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } c;
    static_assert(sizeof(c) == 64);
    std::memcpy(&c, config, sizeof(c));
    bool right = c.palette == 1 && c.start_row == 0;
    for (const uint8_t byte : c.reserved) right = right && byte == 0;
    for (int i = 0; i < 16; ++i) {
        right = right && c.row_bytes[i] <= (i < 8 ? 64 : 0) && c.rows[i] <= (i < 8 ? 16 : 0);
        right = right && c.row_bytes[i] % 4 == 0 && (c.row_bytes[i] == 0) == (c.rows[i] == 0);
    }
    if (!right) Tiles::fail("ldtilecfg", 0, "a shape that tiles do not have");
    if (my_tiles.configured) Tiles::fail("ldtilecfg", 0, "the tiles in use were not released");
    my_tiles = {};
    my_tiles.configured = true;
    for (int i = 0; i < 8; ++i) {
        my_tiles.tiles[i].n_rows = c.rows[i];
        my_tiles.tiles[i].row_bytes = c.row_bytes[i];
    }
}
YIVL_INLINE void release_tiles() { my_tiles.configured = false; }

template <int tile>
YIVL_INLINE void load_tile(const void* p, int64_t stride) {
    Tile& to = my_tiles.use(tile, "tileloadd");
    const auto size = static_cast<size_t>(to.row_bytes);
    for (int r = 0; r < to.n_rows; ++r) std::memcpy(to.rows[r], static_cast<const std::byte*>(p) + r * stride, size);
    to.written = true;
}
template <int tile>
YIVL_INLINE void load_passing_tile(const void* p, int64_t stride) {
    load_tile<tile>(p, stride);
}
template <int tile>
YIVL_INLINE void store_tile(void* p, int64_t stride) {
    const Tile& from = my_tiles.read(tile, "tilestored");
    const auto size = static_cast<size_t>(from.row_bytes);
    for (int r = 0; r < from.n_rows; ++r) std::memcpy(static_cast<std::byte*>(p) + r * stride, from.rows[r], size);
}
template <int tile>
YIVL_INLINE void zero_tile() {
    Tile& to = my_tiles.use(tile, "tilezero");
    std::memset(to.rows, 0, sizeof(to.rows));
    to.written = true;
}
template <int sums, int a, int b>
YIVL_INLINE void multiply_tiles() {
    static_assert(sums != a && sums != b && a != b, "the instruction takes three tiles");
    const Tile &first = my_tiles.read(a, "tdpbf16ps"), &second = my_tiles.read(b, "tdpbf16ps");
    my_tiles.read(sums, "tdpbf16ps");
    Tile& to = my_tiles.tiles[sums];
    if (to.n_rows != first.n_rows || to.row_bytes != second.row_bytes || first.row_bytes != second.n_rows * 4) {
        Tiles::fail("tdpbf16ps", sums, "shapes do not match");
    }
    multiply(to, first, second);
}

}  // namespace yivl::amx
