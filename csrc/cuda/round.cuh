// Rounding of x to integers, as csrc/cpu/kernels_integer.h has it.
#pragma once

#include "cuda/kernels.h"
#include "cuda/reduce.cuh"

namespace yivl::cuda {

// 32 columns of a row, one for each lane of the warp: `col` is the lane's.
__device__ __forceinline__ void round_block(const RoundedInput& to, int64_t row, int64_t col, float value) {
    constexpr float kLargestInteger = 16383.0f;
    const bool finite = ballot(!(fabsf(value) <= 3.4028234e38f)) == 0;  // an infinity or a NaN must not get lost
    const float most = reduce_warp<Max>(fabsf(value));
    // What is smaller has no reciprocal, and counts as nothing.
    const bool some = finite && most > 1.0e-34f;
    const float rounded = some ? rintf(value * (kLargestInteger / most)) : 0.0f;
    const int n = static_cast<int>(rounded), high = (n + 128) >> 8;
    const int64_t at = row * to.cols + col;
    to.high[at] = static_cast<int8_t>(high);
    to.low[at] = static_cast<int8_t>(n - high * 256);
    // Of at most 19 bits: exact. The first lane's half is the first 16 columns.
    float half_sum = rounded;
    for (int mask = kBlock / 4; mask > 0; mask /= 2) half_sum += shuffle_xor(half_sum, mask);
    const float sum = half_sum + shuffle_xor(half_sum, kBlock / 2);
    if (lane_id() == 0) {
        const float scale = finite ? (some ? most / kLargestInteger : 0.0f) : NAN;
        to.blocks[at / kBlock] = {scale, scale * sum, static_cast<int>(sum), static_cast<int>(half_sum)};
    }
}

}  // namespace yivl::cuda
