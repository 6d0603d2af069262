// LayerNorm and RMSNorm: a block for every row.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/round.cuh"

namespace yivl::cuda {

namespace {

constexpr int kThreads = 256;

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

__global__ void rms_norm_kernel(Mat y, ConstMat x, const float* weight, float eps, RoundedInput rounded) {
    wait_for_earlier_kernels();
    const float* from = x.data + block_x() * x.stride;
    float* to = y.data + block_x() * y.stride;
    float squares = 0.0f;
    for (int64_t i = thread_id(); i < x.cols; i += kThreads) squares += from[i] * from[i];
    const float scale = 1.0f / sqrtf(reduce_block<Sum>(squares) / static_cast<float>(x.cols) + eps);
    for (int64_t i = thread_id(); i < x.cols; i += kThreads) {
        const float value = from[i] * scale * weight[i];
        to[i] = value;
        if (rounded.high != nullptr) round_block(rounded, block_x(), i, value);
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
    launch(stream, "rms_norm", rms_norm_kernel, {x.rows}, kThreads, 0, y, x, weight.data(), eps, rounded);
}

}  // namespace yivl::cuda
