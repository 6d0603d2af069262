// Matrices of 16-bit elements in shared memory, as tensor cores take them: in chunks of eight.
#pragma once

#include "cuda/device.h"

namespace yivl::cuda {

inline constexpr int kChunkElements = 8;

// Row r begins at chunk(r, 0). Eight rows of one chunk number, which load_matrices reads at once, and eight neighbours
// in a row lie in different banks.
template <int kRows, int kChunks>
struct Tile {
    __device__ Words& chunk(int row, int c) { return chunk(0, 0, row, c); }
    // The same of first_row + row and first_chunk + c. Where the compiler knows the first ones, a thread's part of the
    // address is the same for many. Where chunks are exchanged, first_row is a multiple of 8.
    __device__ Words& chunk(int first_row, int first_chunk, int row, int c) {
        const int turn = (kExchanged == 4 ? row / 2 : row) % kExchanged;
        return words[first_row + row][first_chunk / kExchanged * kExchanged + ((first_chunk % kExchanged + c) ^ turn)];
    }

    // So many neighbouring chunks of a row are exchanged among each other.
    static constexpr int kExchanged = kChunks % 8 == 0 ? 8 : kChunks == 4 ? 4 : 1;
    static constexpr int kPitch = kExchanged > 1 ? kChunks : kChunks | 1;
    Words words[kRows][kPitch];
};

// Operands of mma from a tile: `first_row` and `first_chunk` of 16 rows by two chunks.
// For a (16 rows, 16 columns).
template <class T>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], T& tile, int first_row, int first_chunk) {
    load_matrices(a, &tile.chunk(first_row, first_chunk, lane_id() % 16, lane_id() / 16));
}
// For two of b, whose columns are the tile's rows: b[0] and b[1] the first eight, b[2] and b[3] the others.
template <class T>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], T& tile, int first_row, int first_chunk) {
    const int lane = lane_id();
    load_matrices(b, &tile.chunk(first_row, first_chunk, lane % 8 + lane / 16 * 8, lane / 8 % 2));
}
// For two of b, whose rows are the tile's rows, 16 of them, and whose columns are those of the first chunk and the
// second.
template <class T>
__device__ __forceinline__ void load_b_by_rows(uint32_t (&b)[4], T& tile, int first_row, int first_chunk) {
    load_matrices_transposed(b, &tile.chunk(first_row, first_chunk, lane_id() % 16, lane_id() / 16));
}

}  // namespace yivl::cuda
