// Matrices of 16-bit elements in shared memory, as tensor cores take them: in chunks of eight.
#pragma once

#include "cuda/device.h"

namespace yivl::cuda {

inline constexpr int kChunkElements = 8;

// Row r begins at chunk(r, 0). Eight rows of one chunk number, which load_matrices reads at once, and eight neighbours
// in a row lie in different banks.
template <int kRows, int kChunks>
struct Tile {
    __device__ Words& chunk(int row, int c) {
        if constexpr (kChunks % 8 == 0) return words[row][c ^ row % 8];
        if constexpr (kChunks == 4) return words[row][c ^ row / 2 % 4];
        return words[row][c];
    }

    static constexpr int kPitch = kChunks % 8 == 0 || kChunks == 4 ? kChunks : kChunks | 1;
    Words words[kRows][kPitch];
};

// Operands of mma from a tile: `first_row` and `first_chunk` of 16 rows by two chunks.
// For a (16 rows, 16 columns).
template <class T>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], T& tile, int first_row, int first_chunk) {
    load_matrices(a, &tile.chunk(first_row + lane_id() % 16, first_chunk + lane_id() / 16));
}
// For two of b, whose columns are the tile's rows: b[0] and b[1] the first eight, b[2] and b[3] the others.
template <class T>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], T& tile, int first_row, int first_chunk) {
    const int lane = lane_id();
    load_matrices(b, &tile.chunk(first_row + lane % 8 + lane / 16 * 8, first_chunk + lane / 8 % 2));
}
// For two of b, whose rows are the tile's rows, 16 of them, and whose columns are those of the first chunk and the
// second.
template <class T>
__device__ __forceinline__ void load_b_by_rows(uint32_t (&b)[4], T& tile, int first_row, int first_chunk) {
    load_matrices_transposed(b, &tile.chunk(first_row + lane_id() % 16, first_chunk + lane_id() / 16));
}

}  // namespace yivl::cuda
