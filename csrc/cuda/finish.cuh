// Where products go, and what becomes of them.
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

// One product of several in a launch.
struct Target {
    Mat y;
    const std::byte* w;
    const float* bias;
    Finish finish;
    RowNumber row;
    Turns turns;
};
struct Targets {
    Target of[kMostProducts];
};

inline Targets targets_of(std::span<const FinishedProduct> products) {
    assert(!products.empty() && products.size() <= kMostProducts);
    Targets targets{};
    for (size_t i = 0; i < products.size(); ++i) {
        const FinishedProduct& p = products[i];
        assert(p.w.type == products[0].w.type);
        targets.of[i] = {p.y, p.w.data, p.bias.empty() ? nullptr : p.bias.data(), p.finish, p.row, p.turns};
    }
    return targets;
}

}  // namespace yivl::cuda
