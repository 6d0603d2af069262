// Products with F32 weights: plain, each weight read once for kTokens rows of x.
#include "cuda/finish.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/position.cuh"

namespace yivl::cuda {

namespace {

// A block computes kRows outputs of kTokens tokens, each thread one of them, over kSlab columns at a time.
constexpr int kRows = 8;
constexpr int kTokens = 16;
constexpr int kThreads = kRows * kTokens;
constexpr int kSlab = 256;
constexpr int kSums = 4;  // of a thread: additions that do not wait for each other

struct WeightTile {
    float w[kRows][kSlab];
};

struct Output {
    int64_t row;    // o
    int64_t token;  // t
};
__device__ __forceinline__ Output output_of_thread() {
    return {int64_t{block_x()} * kRows + thread_id() % kRows, int64_t{block_y()} * kTokens + thread_id() / kRows};
}

Grid over_outputs(int64_t n_tokens, int64_t n_rows) {
    return {(n_rows + kRows - 1) / kRows, (n_tokens + kTokens - 1) / kTokens};
}

// x[token] . W[row] for the thread's output; 0 outside. The whole block comes here together.
__device__ float dot(ConstMat x, ConstMat w) {
    WeightTile& tile = shared<WeightTile>();
    const Output at = output_of_thread();
    const int64_t first_row = int64_t{block_x()} * kRows;
    float sums[kSums] = {};
    for (int64_t begin = 0; begin < x.cols; begin += kSlab) {
        sync_block();  // the last slab has been used
        for (int i = thread_id(); i < kRows * kSlab; i += kThreads) {
            const int64_t row = first_row + i / kSlab, col = begin + i % kSlab;
            const bool inside = row < w.rows && col < x.cols;
            tile.w[i / kSlab][i % kSlab] = inside ? w.data[row * w.stride + col] : 0.0f;
        }
        sync_block();
        if (at.token >= x.rows) continue;
        const float* from = x.data + at.token * x.stride + begin;
        const float* weights = tile.w[thread_id() % kRows];
        const int n = static_cast<int>(x.cols - begin < kSlab ? x.cols - begin : kSlab);
        int k = 0;
        for (; k + kSums <= n; k += kSums) {
            for (int j = 0; j < kSums; ++j) sums[j] += from[k + j] * weights[k + j];
        }
        for (; k < n; ++k) sums[0] += from[k] * weights[k];
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

__global__ void linear_kernel(Mat y, ConstMat x, ConstMat w, const float* bias, Finish finish, RowNumber row) {
    wait_for_earlier_kernels();
    const float sum = dot(x, w);
    const Output at = output_of_thread();
    if (at.row >= y.cols || at.token >= y.rows) return;
    put(finish, y.data[(number(row) + at.token) * y.stride + at.row], bias == nullptr ? sum : sum + bias[at.row]);
}

}  // namespace

void linear(Stream& stream, ConstMat x, const FinishedProduct& product) {
    assert(product.w.type == WeightType::F32);
    const ConstMat w(reinterpret_cast<const float*>(product.w.data), product.w.rows, product.w.cols);
    stream.expect(work_of(x.rows, {&product, 1}));
    launch(stream, "linear", linear_kernel, over_outputs(x.rows, w.rows), kThreads, 0, product.y, x, w,
           product.bias.empty() ? nullptr : product.bias.data(), product.finish, product.row);
}

}  // namespace yivl::cuda
