// Operations on single values.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/math.cuh"

namespace yivl::cuda {

namespace {

constexpr int kThreads = 256;

// A block for every kThreads values of a row.
Grid over_values(ConstMat x) { return {x.rows, (x.cols + kThreads - 1) / kThreads}; }

__global__ void gelu_kernel(Mat x) {
    wait_for_earlier_kernels();
    const int64_t col = int64_t{block_y()} * kThreads + thread_id();
    if (col >= x.cols) return;
    float& at = x.data[block_x() * x.stride + col];
    at = gelu_of(at);
}

__global__ void add_kernel(Mat y, ConstMat x) {
    wait_for_earlier_kernels();
    const int64_t col = int64_t{block_y()} * kThreads + thread_id();
    if (col < x.cols) y.data[block_x() * y.stride + col] += x.data[block_x() * x.stride + col];
}

}  // namespace

#ifdef __CUDACC__
int code_capability() {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, add_kernel), "asking for a kernel's code");
    return attributes.ptxVersion;
}
#endif
void gelu(Stream& stream, Mat x) { launch(stream, "gelu", gelu_kernel, over_values(x), kThreads, 0, x); }
void add(Stream& stream, Mat y, ConstMat x) { launch(stream, "add", add_kernel, over_values(x), kThreads, 0, y, x); }

}  // namespace yivl::cuda
