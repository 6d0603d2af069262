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

struct Turn {
    float cos, sin;
};
// Of columns `col` and `col` + 1 of row `row` of `cos_sin`.
__device__ __forceinline__ Turn turn_of(const Turns& turns, int64_t row, int64_t col) {
    const float* of = turns.cos_sin + row * turns.head_dim + col % turns.head_dim;
    return {of[0], of[1]};
}
__device__ __forceinline__ void turn(float& a, float& b, const Turn& by) {
    const float x = a, y = b;
    // Written out: a compiler's choice of what to fuse would differ from kernel to kernel.
    a = fmaf(x, by.cos, -(y * by.sin));
    b = fmaf(x, by.sin, y * by.cos);
}

}  // namespace yivl::cuda
