// Sums and maxima over a warp and over a block; every thread gets the result. The order of additions is fixed.
#pragma once

#include "cuda/device.h"

namespace yivl::cuda {

struct Sum {
    __device__ static float join(float a, float b) { return a + b; }
};
struct Max {
    __device__ static float join(float a, float b) { return fmaxf(a, b); }
};

template <class Join>
__device__ __forceinline__ float reduce_warp(float value) {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) value = Join::join(value, shuffle_xor(value, mask));
    return value;
}

// Of the whole block.
template <class Join>
__device__ __forceinline__ float reduce_block(float value) {
    struct Partial {
        float of_warp[kWarp];
    };
    Partial& partial = shared<Partial>();
    value = reduce_warp<Join>(value);
    sync_block();  // everyone has read the last result
    if (lane_id() == 0) partial.of_warp[warp_id()] = value;
    sync_block();
    const int n_warps = block_threads() / kWarp;
    value = partial.of_warp[0];
    for (int i = 1; i < n_warps; ++i) value = Join::join(value, partial.of_warp[i]);
    return value;
}

}  // namespace yivl::cuda
