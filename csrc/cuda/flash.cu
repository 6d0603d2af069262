// Attention of many rows of q on tensor cores, with online softmax: scores and weights stay in registers (Dao,
// "FlashAttention-2", 2023).
//
// Every operand is a sum of two halves, high + low, of 22 bits together. high * high + high * low + low * high is a
// product as good as float32's to within 2^-21, for three times the work of one pass; in one pass, models with float32
// weights would no longer be exact. A tensor core's own sums are less exact than float32's (docs/cuda.md): they go no
// further than a few keys. Keys and values beyond 65504 make what meets their tile no number.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/tile.cuh"

namespace yivl::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kWarpRows = 16;
constexpr int kRows = kThreads / kWarp * kWarpRows;  // of a block
template <int kDim>
constexpr int kKeys = kDim > 80 ? 32 : 64;  // at a time: with more, registers would not suffice
// Of a multiprocessor: 255 registers for a thread. With 80 columns, cards with 100 KB of shared memory have room for
// one.
constexpr int kBlocksAtOnce = 2;

// Two values, each a sum of two halves.
struct InHalves {
    uint32_t high, low;
};
__device__ __forceinline__ InHalves in_halves(float first, float second) {
    const uint32_t high = pack_halves(first, second);
    return {high, pack_halves(first - to_float(Half{static_cast<uint16_t>(high)}),
                              second - to_float(Half{static_cast<uint16_t>(high >> 16)}))};
}

// ---- keys and values in halves ----

// (K, S, kDim) each: the rows of a KV head lie side by side, columns past the head's are 0.
struct RowsInHalves {
    Half *high, *low;
};

__device__ __forceinline__ void put_in_halves(RowsInHalves to, ConstMat x, int64_t n_heads, int64_t head_dim, int dim) {
    const float* row = x.data + block_x() * x.stride;
    for (int i = thread_id(); i < n_heads * dim / 2; i += kThreads) {
        const int64_t head = i / (dim / 2);
        const int col = i % (dim / 2) * 2;
        const float* from = row + head * head_dim + col;
        const InHalves s = in_halves(col < head_dim ? from[0] : 0.0f, col + 1 < head_dim ? from[1] : 0.0f);
        const int64_t at = (head * x.rows + block_x()) * dim + col;
        *reinterpret_cast<uint32_t*>(to.high + at) = s.high;
        *reinterpret_cast<uint32_t*>(to.low + at) = s.low;
    }
}

__global__ void keys_in_halves_kernel(RowsInHalves keys, RowsInHalves values, ConstMat k, ConstMat v, int64_t n_heads,
                                      int64_t head_dim, int dim) {
    wait_for_earlier_kernels();
    if (block_y() == 0) {
        put_in_halves(keys, k, n_heads, head_dim, dim);
    } else {
        put_in_halves(values, v, n_heads, head_dim, dim);
    }
}

// ---- attention ----

template <int kDim>
using KeyTile = Tile<kKeys<kDim>, kDim / kChunkElements>;
template <int kDim>
using QueryTile = Tile<kRows, kDim / kChunkElements>;
template <int kDim>
struct FlashTiles {
    KeyTile<kDim> k_high, k_low, v_high, v_low;
    QueryTile<kDim> q_low;
};
// The high halves of q stay in registers. They pass through where keys will be.
static_assert(sizeof(QueryTile<128>) <= 2 * sizeof(KeyTile<128>));

// Begins to copy a tile's rows of a head from `begin` on; zeros for those past the last. Each thread copies one chunk
// of every kRowsAtOnce-th row.
template <int kDim>
__device__ __forceinline__ void load_rows(KeyTile<kDim>& high, KeyTile<kDim>& low, const RowsInHalves& from, int begin,
                                          int n_rows) {
    constexpr int kChunks = kDim / kChunkElements, kRowsAtOnce = kThreads / kChunks;
    const int first = thread_id() / kChunks, c = thread_id() % kChunks;
    const int at = (begin + first) * kDim + c * kChunkElements;
    YIVL_UNROLL
    for (int r = 0; r < kKeys<kDim>; r += kRowsAtOnce) {
        if (first >= kRowsAtOnce || r + first >= kKeys<kDim>) continue;
        const int bytes = begin + r + first < n_rows ? 16 : 0;
        copy_async(&high.chunk(r, 0, first, c), from.high + at + r * kDim, bytes);
        copy_async(&low.chunk(r, 0, first, c), from.low + at + r * kDim, bytes);
    }
}

// Sums of products in halves. Those with a low half, small that they are, have a sum of their own: added to the others'
// they would have a tensor core cut off as much again.
struct Products {
    float high[4] = {}, low[4] = {};

    __device__ float sum(int i) const { return high[i] + low[i]; }
};

// Adds a b to two sums, for two b's side by side, as load_b gives them.
__device__ __forceinline__ void mma_in_halves(Products (&sums)[2], const uint32_t (&a_high)[4],
                                              const uint32_t (&a_low)[4], const uint32_t (&b_high)[4],
                                              const uint32_t (&b_low)[4]) {
    YIVL_UNROLL
    for (int i = 0; i < 2; ++i) {
        const uint32_t high[2] = {b_high[2 * i], b_high[2 * i + 1]}, low[2] = {b_low[2 * i], b_low[2 * i + 1]};
        mma_half(sums[i].low, a_low, high);
        mma_half(sums[i].low, a_high, low);
        mma_half(sums[i].high, a_high, high);
    }
}

// The rows of a block are those of all heads of a KV head: of a token all heads, then the next token. Past the last
// token it comes again.
struct Rows {
    int n_tokens, n_keys;  // rows of q and of k
    int group, head_dim;   // heads of a KV head
    bool causal;

    __device__ int token(int row) const { return row / group < n_tokens ? row / group : n_tokens - 1; }
    __device__ int head(int row) const { return block_y() * group + row % group; }
    __device__ int keys_seen(int row) const { return causal ? n_keys - n_tokens + token(row) + 1 : n_keys; }
};

template <int kDim>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    flash_kernel(Mat out, ConstMat q, RowsInHalves keys, RowsInHalves values, Rows rows) {
    wait_for_earlier_kernels();
    constexpr int kSteps = kDim / 16;
    constexpr int kTileKeys = kKeys<kDim>;
    FlashTiles<kDim>& tiles = *reinterpret_cast<FlashTiles<kDim>*>(dynamic_shared());
    QueryTile<kDim>& high_of_q = *reinterpret_cast<QueryTile<kDim>*>(dynamic_shared());
    const int warp = warp_id(), lane = lane_id(), g = lane / 4, t = lane % 4;
    const int head_dim = rows.head_dim, n_keys = rows.n_keys;
    // The last tokens see most keys: their blocks begin first.
    const int first_row = (grid_x() - 1 - block_x()) * kRows;
    const int64_t of_head = int64_t{block_y()} * n_keys * kDim;
    const RowsInHalves k{keys.high + of_head, keys.low + of_head}, v{values.high + of_head, values.low + of_head};
    // Weights are powers of two.
    const float scale = 1.44269504f / sqrtf(static_cast<float>(head_dim));

    for (int r = warp * kWarpRows; r < (warp + 1) * kWarpRows; ++r) {
        const int row = first_row + r;
        const float* from = q.data + rows.token(row) * q.stride + rows.head(row) * head_dim;
        for (int col = 2 * lane; col < kDim; col += 2 * kWarp) {
            const InHalves s =
                in_halves(col < head_dim ? from[col] * scale : 0.0f, col + 1 < head_dim ? from[col + 1] * scale : 0.0f);
            const int chunk = col / kChunkElements, word = col % kChunkElements / 2;
            high_of_q.chunk(r, chunk).word[word] = s.high;
            tiles.q_low.chunk(r, chunk).word[word] = s.low;
        }
    }
    sync_block();
    uint32_t q_high[kSteps][4];
    YIVL_UNROLL
    for (int i = 0; i < kSteps; ++i) load_a(q_high[i], high_of_q, warp * kWarpRows, 2 * i);
    sync_block();

    // Rows g and g + 8 of the warp are this lane's.
    const int row[2] = {first_row + warp * kWarpRows + g, first_row + warp * kWarpRows + g + 8};
    const int seen[2] = {rows.keys_seen(row[0]), rows.keys_seen(row[1])};
    const int least_seen = rows.keys_seen(first_row), most_seen = rows.keys_seen(first_row + kRows - 1);
    float largest[2] = {-INFINITY, -INFINITY}, total[2] = {};
    float sums[kDim / 8][4] = {};

    load_rows<kDim>(tiles.k_high, tiles.k_low, k, 0, n_keys);
    commit_copies();
    load_rows<kDim>(tiles.v_high, tiles.v_low, v, 0, n_keys);
    commit_copies();
    for (int begin = 0; begin < most_seen; begin += kTileKeys) {
        const bool last = begin + kTileKeys >= most_seen;
        wait_copies<1>();
        sync_block();  // the keys are there
        Products products[kTileKeys / 16][2];
        YIVL_UNROLL
        for (int i = 0; i < kSteps; ++i) {
            uint32_t q_low[4];
            load_a(q_low, tiles.q_low, warp * kWarpRows, 2 * i);
            YIVL_UNROLL
            for (int j = 0; j < kTileKeys / 16; ++j) {
                uint32_t high[4], low[4];
                load_b(high, tiles.k_high, j * 16, 2 * i);
                load_b(low, tiles.k_low, j * 16, 2 * i);
                mma_in_halves(products[j], q_high[i], q_low, high, low);
            }
        }
        sync_block();  // the keys have been used
        if (!last) load_rows<kDim>(tiles.k_high, tiles.k_low, k, begin + kTileKeys, n_keys);
        commit_copies();

        float scores[kTileKeys / 8][4];
        YIVL_UNROLL
        for (int j = 0; j < kTileKeys / 8; ++j) {
            YIVL_UNROLL
            for (int r = 0; r < 4; ++r) scores[j][r] = products[j / 2][j % 2].sum(r);
        }
        if (begin + kTileKeys > least_seen) {
            YIVL_UNROLL
            for (int j = 0; j < kTileKeys / 8; ++j) {
                YIVL_UNROLL
                for (int r = 0; r < 4; ++r) {
                    if (begin + j * 8 + 2 * t + r % 2 >= seen[r / 2]) scores[j][r] = -INFINITY;
                }
            }
        }
        float shrink[2];
        YIVL_UNROLL
        for (int i = 0; i < 2; ++i) {
            float most = largest[i];
            YIVL_UNROLL
            for (int j = 0; j < kTileKeys / 8; ++j) most = fmaxf(most, fmaxf(scores[j][2 * i], scores[j][2 * i + 1]));
            for (int mask = 1; mask <= 2; mask *= 2) most = fmaxf(most, shuffle_xor(most, mask));
            shrink[i] = fast_exp2(largest[i] - most);
            largest[i] = most;
            total[i] *= shrink[i];
            YIVL_UNROLL
            for (int j = 0; j < kTileKeys / 8; ++j) {
                YIVL_UNROLL
                for (int r = 2 * i; r < 2 * i + 2; ++r) {
                    scores[j][r] = fast_exp2(scores[j][r] - most);
                    total[i] += scores[j][r];
                }
            }
        }

        wait_copies<1>();
        sync_block();  // the values are there
        // Where mma leaves a result is where it wants an operand.
        uint32_t p_high[kTileKeys / 16][4], p_low[kTileKeys / 16][4];
        YIVL_UNROLL
        for (int j = 0; j < kTileKeys / 16; ++j) {
            YIVL_UNROLL
            for (int i = 0; i < 4; ++i) {
                const float(&pair)[4] = scores[2 * j + i / 2];
                const InHalves s = in_halves(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
                p_high[j][i] = s.high;
                p_low[j][i] = s.low;
            }
        }
        YIVL_UNROLL
        for (int d = 0; d < kDim / 16; ++d) {
            // Never so. Unaware of it, the compiler keeps the two halves of the columns apart: together they would take
            // more registers than there are.
            if (kDim > 80 && d == kDim / 32 && head_dim <= 64) break;
            Products of_tile[2];
            YIVL_UNROLL
            for (int j = 0; j < kTileKeys / 16; ++j) {
                uint32_t high[4], low[4];
                load_b_by_rows(high, tiles.v_high, j * 16, 2 * d);
                load_b_by_rows(low, tiles.v_low, j * 16, 2 * d);
                mma_in_halves(of_tile, p_high[j], p_low[j], high, low);
            }
            YIVL_UNROLL
            for (int half = 0; half < 2; ++half) {
                YIVL_UNROLL
                for (int r = 0; r < 4; ++r) {
                    float& sum = sums[2 * d + half][r];
                    sum = sum * shrink[r / 2] + of_tile[half].sum(r);
                }
            }
        }
        sync_block();  // the values have been used
        if (!last) load_rows<kDim>(tiles.v_high, tiles.v_low, v, begin + kTileKeys, n_keys);
        commit_copies();
    }

    YIVL_UNROLL
    for (int i = 0; i < 2; ++i) {
        for (int mask = 1; mask <= 2; mask *= 2) total[i] += shuffle_xor(total[i], mask);
        if (row[i] >= rows.n_tokens * rows.group) continue;
        const float share = 1.0f / total[i];
        float* to = out.data + rows.token(row[i]) * out.stride + rows.head(row[i]) * head_dim;
        YIVL_UNROLL
        for (int d = 0; d < kDim / 8; ++d) {
            YIVL_UNROLL
            for (int r = 0; r < 2; ++r) {
                const int col = d * 8 + 2 * t + r;
                if (col < head_dim) to[col] = sums[d][2 * i + r] * share;
            }
        }
    }
}

// fn.template operator()<kDim>() for heads of that many columns or a few less.
template <class Fn>
auto with_dim(int64_t head_dim, Fn&& fn) {
    if (head_dim <= 64) return fn.template operator()<64>();
    if (head_dim <= 80) return fn.template operator()<80>();
    return fn.template operator()<128>();
}

int64_t elements_of_plane(int64_t n_keys, const AttentionShape& shape) {
    return with_dim(shape.head_dim, [&]<int kDim> { return shape.n_kv_heads * n_keys * kDim; });
}

struct Planes {
    RowsInHalves keys, values;
};
Planes planes(int64_t n_keys, const AttentionShape& shape, std::byte* memory) {
    auto* plane = reinterpret_cast<Half*>(memory);
    const int64_t n = elements_of_plane(n_keys, shape);
    return {{plane, plane + n}, {plane + 2 * n, plane + 3 * n}};
}

}  // namespace

size_t keys_in_halves_bytes(int64_t n_keys, const AttentionShape& shape) {
    return static_cast<size_t>(4 * elements_of_plane(n_keys, shape)) * sizeof(Half);
}

void keys_in_halves(Stream& stream, ConstMat k, ConstMat v, const AttentionShape& shape, std::byte* memory) {
    const Planes to = planes(k.rows, shape, memory);
    with_dim(shape.head_dim, [&]<int kDim> {
        launch(stream, "keys_in_halves", keys_in_halves_kernel, {k.rows, 2}, kThreads, 0, to.keys, to.values, k, v,
               shape.n_kv_heads, shape.head_dim, kDim);
    });
}

void flash_attention(Stream& stream, Mat out, ConstMat q, int64_t n_keys, const AttentionShape& shape,
                     std::byte* memory) {
    const auto [keys, values] = planes(n_keys, shape, memory);
    with_dim(shape.head_dim, [&, keys = keys, values = values]<int kDim> {
        const int64_t group = shape.n_heads / shape.n_kv_heads;
        const Rows rows{static_cast<int>(q.rows), static_cast<int>(n_keys), static_cast<int>(group),
                        static_cast<int>(shape.head_dim), shape.causal};
        const Grid grid{(q.rows * group + kRows - 1) / kRows, shape.n_kv_heads};
        launch(stream, "flash", flash_kernel<kDim>, grid, kThreads, sizeof(FlashTiles<kDim>), out, q, keys, values,
               rows);
    });
}

}  // namespace yivl::cuda
