// LayerNorm and RMSNorm: a block for every row.
#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/round.cuh"

namespace yivl::cuda {

namespace {

constexpr int kThreads = 256;
// RMSNorm of one row is all that a card does at its time: as many threads as can be, with all loads under way at once.
constexpr int64_t kMostThreads = 1024;
constexpr int kEach = 8;  // columns of a thread that stay in registers

__global__ void layer_norm_kernel(Mat y, ConstMat x, const float* weight, const float* bias, float eps) {
    wait_for_earlier_kernels();
    const float* from = x.data + block_x() * x.stride;
    float* to = y.data + block_x() * y.stride;
    const auto n = static_cast<float>(x.cols);
    float sum = 0.0f;
    for (int64_t i = thread_id(); i < x.cols; i += kThreads) sum += from[i];
    const float mean = reduce_block<Sum>(sum) / n;
    // A second pass: the mean of the squares less the square of the mean would cancel.
    float squares = 0.0f;
    for (int64_t i = thread_id(); i < x.cols; i += kThreads) squares += (from[i] - mean) * (from[i] - mean);
    const float scale = 1.0f / sqrtf(reduce_block<Sum>(squares) / n + eps);
    for (int64_t i = thread_id(); i < x.cols; i += kThreads) to[i] = (from[i] - mean) * scale * weight[i] + bias[i];
}

// This thread's columns of the span that begins at `begin`, one in block_threads().
__device__ __forceinline__ void load_span(float (&to)[kEach], const float* from, int64_t begin, int64_t n) {
    YIVL_UNROLL
    for (int j = 0; j < kEach; ++j) {
        const int64_t col = begin + j * block_threads() + thread_id();
        to[j] = col < n ? from[col] : 0.0f;
    }
}

__global__ void __launch_bounds__(kMostThreads)
    rms_norm_kernel(Mat y, ConstMat x, const float* weight, float eps, RoundedInput rounded) {
    float weights[kEach], values[kEach];
    load_span(weights, weight, 0, x.cols);
    wait_for_earlier_kernels();
    const float* from = x.data + block_x() * x.stride;
    float* to = y.data + block_x() * y.stride;
    const int64_t span = int64_t{kEach} * block_threads();
    float squares = 0.0f;
    // Backwards, so that the first span, as a rule the only one, is still there afterwards.
    for (int64_t begin = (x.cols - 1) / span * span; begin >= 0; begin -= span) {
        load_span(values, from, begin, x.cols);
        YIVL_UNROLL
        for (const float value : values) squares += value * value;
    }
    const float scale = 1.0f / sqrtf(reduce_block<Sum>(squares) / static_cast<float>(x.cols) + eps);
    for (int64_t begin = 0; begin < x.cols; begin += span) {
        if (begin > 0) {
            load_span(values, from, begin, x.cols);
            load_span(weights, weight, begin, x.cols);
        }
        YIVL_UNROLL
        for (int j = 0; j < kEach; ++j) {
            const int64_t col = begin + j * block_threads() + thread_id();
            if (col >= x.cols) break;
            const float value = values[j] * scale * weights[j];
            to[col] = value;
            if (rounded.high != nullptr) round_block(rounded, block_x(), col, value);
        }
    }
}

}  // namespace

void layer_norm(Stream& stream, Mat y, ConstMat x, Vec weight, Vec bias, float eps) {
    stream.expect({.bytes = 8 * x.rows * x.cols});
    launch(stream, "layer_norm", layer_norm_kernel, {x.rows}, kThreads, 0, y, x, weight.data(), bias.data(), eps);
}
void rms_norm(Stream& stream, Mat y, ConstMat x, Vec weight, float eps, const RoundedInput& rounded) {
    assert(rounded.high == nullptr || x.cols % kBlock == 0);
    stream.expect({.bytes = 8 * x.rows * x.cols});
    const int64_t threads = std::min((x.cols + kWarp - 1) / kWarp * kWarp, kMostThreads);
    launch(stream, "rms_norm", rms_norm_kernel, {x.rows}, static_cast<int>(threads), 0, y, x, weight.data(), eps,
           rounded);
}

}  // namespace yivl::cuda
