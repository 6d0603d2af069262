// What becomes of a product.
#pragma once

#include "cuda/kernels.h"
#include "cuda/math.cuh"

namespace yivl::cuda {

__device__ __forceinline__ void put(Finish finish, float& y, float v) {
    switch (finish) {
        case Finish::store: y = v; break;
        case Finish::add: y += v; break;
        case Finish::gelu: y = gelu_of(v); break;
        case Finish::silu: y = silu_of(v); break;
        case Finish::times: y *= v; break;
    }
}

}  // namespace yivl::cuda
