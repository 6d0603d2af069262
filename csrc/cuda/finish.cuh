// Where products go, and what becomes of them.
#pragma once

#include "cuda/kernels.h"
#include "cuda/math.cuh"

namespace yivl::cuda {

__device__ __forceinline__ bool meets_old(Finish finish) { return finish == Finish::add || finish == Finish::times; }

// What a product v makes of y, which was `old`, anything where the two do not meet.
__device__ __forceinline__ float finished(Finish finish, float old, float v) {
    switch (finish) {
        case Finish::store: return v;
        case Finish::add: return old + v;
        case Finish::gelu: return gelu_of(v);
        case Finish::silu: return silu_of(v);
        case Finish::times: return old * v;
    }
    return v;
}
__device__ __forceinline__ void put(Finish finish, float& y, float v) {
    y = finished(finish, meets_old(finish) ? y : 0.0f, v);
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
