// The model's functions of one value.
#pragma once

#include "cuda/device.h"

namespace yivl::cuda {

__device__ __forceinline__ float gelu_of(float x) {
    constexpr float kSqrtHalf = 0.70710678118654752f;
    return 0.5f * x * (1.0f + erff(x * kSqrtHalf));
}

__device__ __forceinline__ float silu_of(float x) { return x / (1.0f + expf(-x)); }

}  // namespace yivl::cuda
