// Attention, plain: a block for every query row and head, the softmax kept up to date over tiles of keys.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/position.cuh"
#include "cuda/reduce.cuh"

namespace yivl::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kDims = kMaxHeadDim / kThreads;  // of the output, of a thread

struct AttentionTile {
    float q[kMaxHeadDim];
    float weights[kThreads];  // of the tile's keys, one for each thread
};

__global__ void attention_kernel(Mat out, ConstMat q, ConstMat k, ConstMat v, AttentionShape shape,
                                 RowNumber position) {
    wait_for_earlier_kernels();
    AttentionTile& tile = shared<AttentionTile>();
    const int64_t row = block_x(), head = block_y();
    const int64_t head_dim = shape.head_dim;
    const int64_t kv_col = head / (shape.n_heads / shape.n_kv_heads) * head_dim;
    const int64_t n_keys = keys_of(row, q, k, shape, position);
    const float scale = 1.0f / sqrtf(static_cast<float>(head_dim));

    for (int64_t d = thread_id(); d < head_dim; d += kThreads) {
        tile.q[d] = q.data[row * q.stride + head * head_dim + d] * scale;
    }
    float largest = -INFINITY, total = 0.0f;
    float sums[kDims] = {};
    for (int64_t begin = 0; begin < n_keys; begin += kThreads) {
        sync_block();  // q is there; the last tile's weights have been used
        const int64_t key = begin + thread_id();
        float score = -INFINITY;
        if (key < n_keys) {
            const float* at = k.data + key * k.stride + kv_col;
            score = 0.0f;
            for (int64_t d = 0; d < head_dim; ++d) score += tile.q[d] * at[d];
        }
        const float new_largest = fmaxf(largest, reduce_block<Max>(score));
        const float weight = expf(score - new_largest);
        tile.weights[thread_id()] = weight;
        const float shrink = expf(largest - new_largest);
        total = total * shrink + reduce_block<Sum>(weight);  // which also waits for all weights
        largest = new_largest;
        const int n = static_cast<int>(n_keys - begin < kThreads ? n_keys - begin : kThreads);
        for (int i = 0; i < kDims; ++i) {
            const int64_t d = thread_id() + i * kThreads;
            if (d >= head_dim) break;
            const float* at = v.data + begin * v.stride + kv_col + d;
            float sum = sums[i] * shrink;
            for (int j = 0; j < n; ++j) sum += tile.weights[j] * at[j * v.stride];
            sums[i] = sum;
        }
    }
    for (int i = 0; i < kDims; ++i) {
        const int64_t d = thread_id() + i * kThreads;
        if (d < head_dim) out.data[row * out.stride + head * head_dim + d] = sums[i] / total;
    }
}

}  // namespace

void attention(Stream& stream, Mat out, ConstMat q, ConstMat k, ConstMat v, const AttentionShape& shape,
               RowNumber position) {
    launch(stream, "attention", attention_kernel, {q.rows, shape.n_heads}, kThreads, 0, out, q, k, v, shape, position);
}

}  // namespace yivl::cuda
