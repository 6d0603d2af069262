// Attention of few query rows, where the way of keys and values from memory is what takes time: they are shared out
// among blocks, and each is read once for all query heads that see it. The last block of a row and KV head to end joins
// what the others found, in the order of the keys.
#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/position.cuh"
#include "cuda/reduce.cuh"
#include "cuda/round.cuh"

namespace yivl::cuda {

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kHeads = 8;   // query heads of a block, one for each warp where they are not shared
constexpr int kLane = 4;    // columns of a lane
constexpr int kTile = 128;  // keys at a time
constexpr int kAtOnce = 3;  // keys of a warp under way: with four, registers spill on 12.0
// With the four KV heads of 6B, two blocks for nearly all of the 132 multiprocessors of an H100: what one has under way
// does not keep memory busy.
constexpr int kSplits = 64;
constexpr int kSplitsOfLane = kSplits / kWarp;
constexpr int kJoinedAtOnce = 8;
constexpr int kMaxDim = kMaxSplitHeadDim;
static_assert(kHeads == kWarps && kMaxDim == kLane * kWarp && kSplits % kJoinedAtOnce == 0);

struct SplitTile {
    alignas(16) float weights[kTile][kHeads];  // scores at first
    float shrink[kHeads];
    float sums[kWarps][kHeads][kMaxDim];
    int32_t is_last;
};
static_assert(kSplits <= kTile);

// What a split found of a head.
struct Partial {
    float largest, total;  // of the scores; of the weights e^(score - largest)
    float sums[kMaxDim];   // of the values, by weight
};

// Of n keys: how many a split has depends on nothing else.
__device__ __forceinline__ int keys_of_split(int n) { return (n + kSplits * kWarp - 1) / (kSplits * kWarp) * kWarp; }

__device__ __forceinline__ void load(float (&to)[kLane], const float* from) {
    const Words words = load_words(from);
    for (int i = 0; i < kLane; ++i) to[i] = float_of_bits(words.word[i]);
}

// Columns [col, col + n) of keys [begin, end) and of their values, to be on their way before q is there: all but the
// last key are from earlier steps.
__device__ __forceinline__ void prefetch_keys(ConstMat k, ConstMat v, int begin, int end, int64_t col, int n) {
    constexpr int kFloats = kLine / static_cast<int>(sizeof(float));
    const int lines = (n + kFloats - 1) / kFloats, n_lines = (end - begin) * lines;
    for (int i = thread_id(); i < n_lines; i += kThreads) {
        const int64_t key = begin + i / lines, at = col + i % lines * kFloats;
        prefetch_line(k.data + key * k.stride + at);
        prefetch_line(v.data + key * v.stride + at);
    }
}

// Of head lane / 4, over the warp.
__device__ __forceinline__ float sum_of_heads(float (&of)[kHeads]) {
    int mask = kWarp / 2;
    YIVL_UNROLL
    for (int n = kHeads / 2; n > 0; n /= 2) {
        const bool upper = (lane_id() & mask) != 0;
        YIVL_UNROLL
        for (int i = 0; i < n; ++i) {
            const float kept = upper ? of[i + n] : of[i], given = upper ? of[i] : of[i + n];
            of[i] = kept + shuffle_xor(given, mask);
        }
        mask /= 2;
    }
    float sum = of[0];
    for (; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    return sum;
}

__global__ void __launch_bounds__(kThreads, 2)
    split_attention_kernel(Mat out, ConstMat q, ConstMat k, ConstMat v, AttentionShape shape, RowNumber position,
                           int32_t* counts, Partial* partials, RoundedInput rounded) {
    SplitTile& tile = shared<SplitTile>();
    const int64_t row = block_z(), head_dim = shape.head_dim;
    const int64_t of_kv_head = shape.n_heads / shape.n_kv_heads, groups = (of_kv_head + kHeads - 1) / kHeads;
    const int64_t kv_head = block_y() / groups, first_of_kv = block_y() % groups * kHeads;
    const int64_t first_head = kv_head * of_kv_head + first_of_kv;
    const int n_heads = static_cast<int>(of_kv_head - first_of_kv < kHeads ? of_kv_head - first_of_kv : kHeads);
    const auto n_keys = static_cast<int>(keys_of(row, q, k, shape, position));
    const int of_split = keys_of_split(n_keys), n_splits = (n_keys + of_split - 1) / of_split;
    if (block_x() >= n_splits) return wait_for_earlier_kernels();
    const int begin = block_x() * of_split, end = begin + of_split < n_keys ? begin + of_split : n_keys;
    prefetch_keys(k, v, begin, end < begin + kTile ? end : begin + kTile, kv_head * head_dim,
                  static_cast<int>(head_dim));
    wait_for_earlier_kernels();

    const int warp = uniform_warp_id(), col = lane_id() * kLane;
    const bool has_columns = col < head_dim;
    const float scale = 1.0f / sqrtf(static_cast<float>(head_dim));
    const int64_t kv_col = kv_head * head_dim + (has_columns ? col : 0);
    float query[kHeads][kLane] = {}, sums[kHeads][kLane] = {};
    YIVL_UNROLL
    for (int h = 0; h < kHeads; ++h) {
        if (h >= n_heads || !has_columns) continue;
        load(query[h], q.data + row * q.stride + (first_head + h) * head_dim + col);
        for (float& x : query[h]) x *= scale;
    }
    float largest = -INFINITY, total = 0.0f;  // of head `warp`

    for (int first = begin; first < end; first += kTile) {
        const int n = end - first < kTile ? end - first : kTile;
        for (int key = warp; key < n; key += kWarps * kAtOnce) {
            float keys[kAtOnce][kLane];
            YIVL_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                const int at = key + i * kWarps;
                load(keys[i], k.data + int64_t{first + (at < n ? at : key)} * k.stride + kv_col);
            }
            YIVL_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                float scores[kHeads];
                YIVL_UNROLL
                for (int h = 0; h < kHeads; ++h) {
                    scores[h] = 0.0f;
                    for (int j = 0; j < kLane; ++j) scores[h] = fmaf(query[h][j], keys[i][j], scores[h]);
                }
                const float score = sum_of_heads(scores);
                const int at = key + i * kWarps;
                if (lane_id() % 4 == 0 && at < n) tile.weights[at][lane_id() / 4] = score;
            }
        }
        sync_block();
        float most = largest;
        for (int key = lane_id(); key < n; key += kWarp) most = fmaxf(most, tile.weights[key][warp]);
        most = reduce_warp<Max>(most);
        float sum = 0.0f;
        for (int key = lane_id(); key < n; key += kWarp) {
            const float weight = expf(tile.weights[key][warp] - most);
            tile.weights[key][warp] = weight;
            sum += weight;
        }
        const float shrink = expf(largest - most);
        total = total * shrink + reduce_warp<Sum>(sum);
        largest = most;
        if (lane_id() == 0) tile.shrink[warp] = shrink;
        sync_block();
        YIVL_UNROLL
        for (int h = 0; h < kHeads; ++h) {
            for (float& x : sums[h]) x *= tile.shrink[h];
        }
        for (int key = warp; key < n; key += kWarps * kAtOnce) {
            float values[kAtOnce][kLane];
            YIVL_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                const int at = key + i * kWarps;
                load(values[i], v.data + int64_t{first + (at < n ? at : key)} * v.stride + kv_col);
            }
            YIVL_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                const int at = key + i * kWarps;
                if (at >= n) break;
                YIVL_UNROLL
                for (int h = 0; h < kHeads; ++h) {
                    const float weight = tile.weights[at][h];
                    for (int j = 0; j < kLane; ++j) sums[h][j] = fmaf(weight, values[i][j], sums[h][j]);
                }
            }
        }
        sync_block();  // before the next tile's scores
    }

    YIVL_UNROLL
    for (int h = 0; h < kHeads; ++h) {
        for (int j = 0; j < kLane; ++j) tile.sums[warp][h][col + j] = sums[h][j];
    }
    sync_block();
    const int64_t group = row * (int64_t{shape.n_kv_heads} * groups) + block_y();
    Partial* const of_group = partials + group * kSplits * kHeads;
    Partial* const mine = of_group + block_x() * kHeads;
    if (lane_id() == 0) {
        mine[warp].largest = largest;
        mine[warp].total = total;
    }
    for (int i = thread_id(); i < n_heads * kMaxDim; i += kThreads) {
        float sum = 0.0f;
        for (int w = 0; w < kWarps; ++w) sum += tile.sums[w][i / kMaxDim][i % kMaxDim];
        mine[i / kMaxDim].sums[i % kMaxDim] = sum;
    }
    sync_block();
    if (thread_id() == 0) {
        fence();
        tile.is_last = atomic_add(&counts[group], 1) == n_splits - 1;
        if (tile.is_last) counts[group] = 0;
        fence();
    }
    sync_block();
    if (!tile.is_last) return;

    // Lane s of warp h: splits s, s + 32 and so on of head h.
    float shares[kSplitsOfLane], totals[kSplitsOfLane], most = -INFINITY, all = 0.0f;
    const auto is_there = [&](int i) { return warp < n_heads && i * kWarp + lane_id() < n_splits; };
    YIVL_UNROLL
    for (int i = 0; i < kSplitsOfLane; ++i) {
        const Partial& partial = of_group[is_there(i) ? (i * kWarp + lane_id()) * kHeads + warp : 0];
        shares[i] = is_there(i) ? partial.largest : -INFINITY;
        totals[i] = partial.total;
        most = fmaxf(most, shares[i]);
    }
    most = reduce_warp<Max>(most);
    YIVL_UNROLL
    for (int i = 0; i < kSplitsOfLane; ++i) {
        shares[i] = is_there(i) ? expf(shares[i] - most) : 0.0f;
        if (is_there(i)) all += shares[i] * totals[i];
    }
    all = reduce_warp<Sum>(all);
    YIVL_UNROLL
    for (int i = 0; i < kSplitsOfLane; ++i) tile.weights[i * kWarp + lane_id()][warp] = shares[i] / all;
    sync_block();
    for (int i = thread_id(); i < n_heads * head_dim; i += kThreads) {
        const int h = i / static_cast<int>(head_dim), d = i % static_cast<int>(head_dim);
        float sum = 0.0f;
        for (int split = 0; split < n_splits; split += kJoinedAtOnce) {
            float found[kJoinedAtOnce];
            YIVL_UNROLL
            for (int j = 0; j < kJoinedAtOnce; ++j) {
                found[j] = split + j < n_splits ? of_group[(split + j) * kHeads + h].sums[d] : 0.0f;
            }
            YIVL_UNROLL
            for (int j = 0; j < kJoinedAtOnce; ++j) sum = fmaf(tile.weights[split + j][h], found[j], sum);
        }
        const int64_t to = first_head * head_dim + i;
        out.data[row * out.stride + to] = sum;
        if (rounded.high != nullptr) round_block(rounded, row, to, sum);
    }
}

int64_t groups(const AttentionShape& shape) {
    return shape.n_kv_heads * ((shape.n_heads / shape.n_kv_heads + kHeads - 1) / kHeads);
}

}  // namespace

bool has_split_attention(ConstMat q, ConstMat k, ConstMat v, const AttentionShape& shape) {
    const auto aligned = [](ConstMat m) {
        return reinterpret_cast<uintptr_t>(m.data) % sizeof(Words) == 0 && m.stride % kLane == 0;
    };
    return shape.head_dim <= kMaxDim && shape.head_dim % kLane == 0 && aligned(q) && aligned(k) && aligned(v);
}

int64_t split_counts(int64_t n_rows, const AttentionShape& shape) { return n_rows * groups(shape); }
int64_t split_partials(int64_t n_rows, const AttentionShape& shape) {
    return split_counts(n_rows, shape) * kSplits * kHeads * static_cast<int64_t>(sizeof(Partial) / sizeof(float));
}

void split_attention(Stream& stream, Mat out, ConstMat q, ConstMat k, ConstMat v, const AttentionShape& shape,
                     RowNumber position, const SplitMemory& memory, const RoundedInput& rounded) {
    assert(rounded.high == nullptr || shape.head_dim % kBlock == 0);
    assert(position == nullptr || q.rows == 1);
    const int64_t n_splits = std::min<int64_t>(kSplits, (k.rows + kWarp - 1) / kWarp);
    launch(stream, "split_attention", split_attention_kernel, {n_splits, groups(shape), q.rows}, kThreads, 0, out, q, k,
           v, shape, position, memory.counts, reinterpret_cast<Partial*>(memory.partials), rounded);
}

}  // namespace yivl::cuda
