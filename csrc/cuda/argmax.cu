// Where the largest value is.
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace yivl::cuda {

namespace {

constexpr int kThreads = 1024;

struct Best {
    float value;
    int index;
};

// The larger, of equal ones the first. A bad one has the index -1 and wins.
__device__ __forceinline__ Best better(Best a, Best b) {
    if (a.index < 0 || b.index < 0) return {INFINITY, -1};
    return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

__device__ __forceinline__ Best best_of_warp(Best best) {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        best = better(best, {shuffle_xor(best.value, mask), shuffle_xor(best.index, mask)});
    }
    return best;
}

__global__ void argmax_kernel(int32_t* index, const float* values, int n) {
    struct Partial {
        Best of_warp[kThreads / kWarp];
    };
    Partial& partial = shared<Partial>();
    Best best{-INFINITY, 0};
    for (int i = thread_id(); i < n; i += kThreads) best = better(best, {values[i], isfinite(values[i]) ? i : -1});
    best = best_of_warp(best);
    if (lane_id() == 0) partial.of_warp[warp_id()] = best;
    sync_block();
    if (warp_id() > 0) return;
    best = best_of_warp(partial.of_warp[lane_id()]);
    if (lane_id() == 0) *index = best.index;
}

}  // namespace

void argmax(Stream& stream, int32_t* index, Vec values) {
    launch(stream, "argmax", argmax_kernel, {1}, kThreads, 0, index, values.data(), static_cast<int>(values.size()));
}

}  // namespace yivl::cuda
