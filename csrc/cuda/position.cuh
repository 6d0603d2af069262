// What depends on a step's position, which is known on the card alone.
#pragma once

#include "cuda/kernels.h"

namespace yivl::cuda {

__device__ __forceinline__ int64_t number(RowNumber row) { return row == nullptr ? 0 : *row; }

// Keys that a row of q sees.
__device__ __forceinline__ int64_t keys_of(int64_t row, ConstMat q, ConstMat k, const AttentionShape& shape,
                                           RowNumber position) {
    if (position != nullptr) return int64_t{*position} + 1;
    return shape.causal ? k.rows - q.rows + row + 1 : k.rows;
}

// Turns columns `col` and `col` + 1 of row `row` of x.
__device__ __forceinline__ void turn(float& a, float& b, const Turns& turns, int64_t row, int64_t col) {
    const float* of = turns.cos_sin + (number(turns.first) + row) * turns.head_dim + col % turns.head_dim;
    const float c = of[0], s = of[1], x = a, y = b;
    // Written out: a compiler's choice of what to fuse would differ from kernel to kernel.
    a = fmaf(x, c, -(y * s));
    b = fmaf(x, s, y * c);
}

}  // namespace yivl::cuda
