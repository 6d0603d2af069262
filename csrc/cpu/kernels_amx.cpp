// Matrix products of many tokens on AMX tiles, in bfloat16 with float32 sums, those of attention among them. Everything
// else is computed by the AVX-512 kernels: unpacking weights for few tokens takes longer than multiplying them as
// integers.
//
// A tile of weights is 16 rows of 32 columns, a tile of x is 16 pairs of columns of up to 16 tokens, and an accumulator
// holds 16 weight rows by 16 tokens. Every output is summed over all columns, 32 at a time, in one such accumulator:
// storing it and loading it again changes nothing, so products may be cut to suit the caches.
#include "cpu/isa.h"

#if defined(__x86_64__) && defined(__linux__)

#include <immintrin.h>

#include "cpu/dequant.h"
#include "cpu/kernels.h"
#include "cpu/target_region.h"
#include "cpu/tiles.h"

#if !defined(__clang__)
// The undefined lanes that GCC's own intrinsics start from (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

YIVL_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,amx-tile,amx-bf16")
#define YIVL_TARGET_LAMBDA                                                                            \
    __attribute__((                                                                                   \
        target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,amx-tile,amx-" \
               "bf16")))

namespace yivl::amx {

#include "cpu/transpose_avx512.h"

namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileCols = 32;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileTokens = 16;

// Tiles of a row that are multiplied at a time: x of two token tiles takes 32 kB of the first-level cache.
constexpr int64_t kChunkSteps = 16;

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- tiles: 0 to 3 accumulators, 4 and 5 weights, 6 and 7 tokens; all are whole ----

void begin_tiles() {
    struct alignas(64) Config {
        uint8_t palette = 1;
        uint8_t start_row = 0;
        uint8_t reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
        config.row_bytes[tile] = kTileBytes / kTileRows;
        config.rows[tile] = kTileRows;
    }
    configure_tiles(&config);
}

// ---- bfloat16 ----

// Rounds to nearest, ties to even; the first 16 are the low half.
YIVL_INLINE __m512i to_bfloats(__m512 first, __m512 second) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

// 32 values, of which the first n are read and the rest are 0.
YIVL_INLINE __mmask32 first(int64_t n) { return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1; }

YIVL_INLINE __m512i bfloats_of(const float* x, int64_t n) {
    const __mmask32 mask = first(n);
    return to_bfloats(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), x),
                      _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), x + 16));
}

YIVL_INLINE void put_row(std::byte* dst, int64_t step, __m512i v) { _mm512_store_si512(dst + step * kTileBytes, v); }

#include "cpu/weights_amx.h"

// ---- x, packed: a tile for each 16 tokens and 32 columns, 0 where there are fewer tokens. A chunk of columns of all
// tokens lies together, and in it the tiles of the same tokens. ----

int64_t packed_bytes(int64_t n_tokens, int64_t cols) {
    return divide_up(n_tokens, kTileTokens) * divide_up(cols, kTileCols) * kTileBytes;
}

// A tile of n <= 16 rows of at most 32 floats each: pairs of neighbours, one row of the tile for each pair.
YIVL_INLINE void pack_tile(std::byte* tile, const float* x, int64_t stride, int64_t n, int64_t cols, bool reorder) {
    const __m512i order = evens_then_odds();
    __m512 r[16];
    YIVL_UNROLL
    for (int t = 0; t < 16; ++t) {
        __m512i pairs = t < n ? bfloats_of(x + t * stride, cols) : _mm512_setzero_si512();
        if (reorder) pairs = _mm512_permutexvar_epi16(order, pairs);
        r[t] = _mm512_castsi512_ps(pairs);
    }
    transpose(r);
    YIVL_UNROLL
    for (int i = 0; i < 16; ++i) _mm512_store_ps(tile + i * 64, r[i]);
}

void pack(std::byte* dst, const PackedInput& p, int64_t group) {
    const int64_t token = group * kTileTokens;
    const int64_t n = min64(kTileTokens, p.n_tokens - token);
    const int64_t steps = divide_up(p.cols, kTileCols), token_tiles = divide_up(p.n_tokens, kTileTokens);
    for (int64_t step = 0; step < steps; ++step) {
        const int64_t chunk = step / kChunkSteps * kChunkSteps;
        const int64_t n_steps = min64(kChunkSteps, steps - chunk);
        const int64_t col = step * kTileCols;
        pack_tile(dst + (chunk * token_tiles + group * n_steps + step - chunk) * kTileBytes, p.x + col, p.x_stride, n,
                  p.cols - col, p.order == 1);
    }
}

// ---- products ----

// y[t][row] = or += sums + bias for n_rows <= 16 rows and n_tokens <= 16 tokens; `sums` is an accumulator as stored.
void put_sums(const PackedPiece& p, const std::byte* sums, int64_t row, int64_t n_rows, int64_t token,
              int64_t n_tokens) {
    __m512 r[16];
    YIVL_UNROLL
    for (int i = 0; i < 16; ++i) r[i] = _mm512_load_ps(sums + i * 64);
    transpose(r);
    const __mmask16 mask = static_cast<__mmask16>(first(n_rows));
    const __m512 bias = p.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, p.bias + row);
    float* y = p.y + token * p.y_stride + row;
    YIVL_UNROLL
    for (int t = 0; t < 16; ++t) {
        if (t < n_tokens) {
            __m512 out = p.bias == nullptr ? r[t] : _mm512_add_ps(r[t], bias);
            if (p.add) out = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y + t * p.y_stride), out);
            _mm512_mask_storeu_ps(y + t * p.y_stride, mask, out);
        }
    }
}

// Sums of two row tiles for two token tiles.
constexpr int64_t kSumBytes = 4 * kTileBytes;

// How a product is cut: for each block of rows, for each chunk of columns, which is unpacked once for all tokens, for
// two token tiles, for two row tiles. x of two token tiles stays in the first-level cache; the block's unpacked weights
// and the sums, which wait there from chunk to chunk, stay in the second-level cache.
struct Cut {
    int64_t steps, row_tiles, token_tiles;
    int64_t block;  // row tiles, even

    Cut(int64_t n_tokens, int64_t n_rows, int64_t cols)
        : steps(divide_up(cols, kTileCols)),
          row_tiles(divide_up(n_rows, kTileRows)),
          token_tiles(divide_up(n_tokens, kTileTokens)),
          // For few tokens weights are rather taken in the order of the file: x stays in the second-level cache anyway.
          block(token_tiles <= kFewTokenTiles ? 2 : divide_up(row_tiles, 2) * 2) {}

    int64_t weight_bytes() const { return block * kChunkSteps * kTileBytes; }
    int64_t sum_bytes() const { return block * divide_up(token_tiles, 2) * 2 * kTileBytes; }

private:
    static constexpr int64_t kFewTokenTiles = 8;
};

// What is brought nearer while the tiles multiply, a few lines at a time. Products take a sixth longer if x is not.
class Ahead {
public:
    Ahead(const std::byte* rows, int64_t row_bytes, int64_t n_bytes, int64_t n_rows, int64_t n_blocks)
        : rows_(rows),
          row_bytes_(row_bytes),
          n_bytes_(n_bytes),
          n_rows_(n_rows),
          rows_of_block_(divide_up(n_rows, n_blocks)) {}

    // Of the next block, to the first-level cache; x_lines lines of x with each step, to the second-level cache.
    void begin_block(const std::byte* sums, const std::byte* x, int64_t x_lines) {
        sums_ = sums;
        x_ = x;
        x_lines_ = x_lines;
        // The next weights, as in the file.
        for (int64_t i = 0; i < rows_of_block_ && n_rows_ > 0; ++i, --n_rows_, rows_ += row_bytes_) {
            for (int64_t byte = 0; byte < n_bytes_ + 63; byte += 64) _mm_prefetch(rows_ + byte, _MM_HINT_T1);
        }
    }
    YIVL_INLINE void step(int64_t i) {
        constexpr int kLines = 8;
        if (i < kSumBytes / (kLines * 64)) {
            YIVL_UNROLL
            for (int line = 0; line < kLines; ++line) _mm_prefetch(sums_ + (i * kLines + line) * 64, _MM_HINT_T0);
        }
        for (int64_t line = 0; line < x_lines_; ++line, x_ += 64) _mm_prefetch(x_, _MM_HINT_T1);
    }

private:
    const std::byte* rows_;
    int64_t row_bytes_, n_bytes_, n_rows_, rows_of_block_;
    const std::byte* sums_ = nullptr;
    const std::byte* x_ = nullptr;
    int64_t x_lines_ = 0;
};

// R x T tiles of sums (1 or 2 each) over `steps` tiles of weights and x; four tiles of sums have room at `sums`. Only x
// shall stay in the first-level cache.
template <int R, int T>
void multiply_block(std::byte* sums, bool first, const std::byte* w, const std::byte* x, int64_t steps, Ahead& ahead) {
    const auto load_sums = [=]<int r, int t>() YIVL_TARGET_LAMBDA {
        if constexpr (r < R && t < T) {
            constexpr int i = r * 2 + t;
            first ? zero_tile<i>() : load_passing_tile<i>(sums + i * kTileBytes, 64);
        }
    };
    const auto store_sums = [=]<int r, int t>() YIVL_TARGET_LAMBDA {
        if constexpr (r < R && t < T) store_tile<r * 2 + t>(sums + (r * 2 + t) * kTileBytes, 64);
    };
    load_sums.template operator()<0, 0>();
    load_sums.template operator()<0, 1>();
    load_sums.template operator()<1, 0>();
    load_sums.template operator()<1, 1>();
    for (int64_t i = 0; i < steps; ++i) {
        load_tile<6>(x + i * kTileBytes, 64);
        load_passing_tile<4>(w + i * kTileBytes, 64);
        multiply_tiles<0, 4, 6>();
        if constexpr (R == 2) {
            load_passing_tile<5>(w + (kChunkSteps + i) * kTileBytes, 64);
            multiply_tiles<2, 5, 6>();
        }
        ahead.step(i);
        if constexpr (T == 2) {
            load_tile<7>(x + (steps + i) * kTileBytes, 64);
            multiply_tiles<1, 4, 7>();
            if constexpr (R == 2) multiply_tiles<3, 5, 7>();
        }
    }
    store_sums.template operator()<0, 0>();
    store_sums.template operator()<0, 1>();
    store_sums.template operator()<1, 0>();
    store_sums.template operator()<1, 1>();
}

int64_t scratch_bytes(int64_t n_tokens, int64_t n_rows, int64_t cols) {
    const Cut c(n_tokens, n_rows, cols);
    return c.weight_bytes() + c.sum_bytes();
}

// Tile rows beyond the last row of the weights keep what they held: they only make sums that nobody reads.
void linear(const PackedPiece& p, std::byte* scratch, bool (*stop)(const void*), const void* stop_arg) {
    const Unpack unpack = unpacker(p.type, p.w);
    const TypeInfo& info = type_info(p.type);
    const Cut c(p.n_tokens, p.n_rows, p.cols);
    std::byte* const waiting = scratch + c.weight_bytes();
    const auto weights = [&](int64_t row, int64_t step) {
        return p.w + row * kTileRows * p.row_bytes + step * kTileCols / info.block * info.bytes;
    };
    const auto unpacked = [&](int64_t row) { return scratch + row * kChunkSteps * kTileBytes; };
    for (int64_t first = 0; first < c.row_tiles; first += c.block) {
        const int64_t last = min64(first + c.block, c.row_tiles);
        const int64_t row_pairs = divide_up(last - first, 2), token_pairs = divide_up(c.token_tiles, 2);
        for (int64_t step = 0; step < c.steps; step += kChunkSteps) {
            if (stop(stop_arg)) return;
            begin_tiles();  // not before: stop() may run what uses tiles of its own, as a signal's handler
            const int64_t n_steps = min64(kChunkSteps, c.steps - step);
            const bool complete = step + n_steps == c.steps;
            for (int64_t r = first; r < last; ++r) {
                unpack({.type = p.type,
                        .src = weights(r, step),
                        .row_bytes = p.row_bytes,
                        .n_rows = min64(kTileRows, p.n_rows - r * kTileRows),
                        .n = min64(n_steps * kTileCols, p.cols - step * kTileCols),
                        .dst = unpacked(r - first)});
            }
            const int64_t x_bytes = 2 * n_steps * kTileBytes;  // of two token tiles
            Ahead ahead(complete ? weights(last, 0) : weights(first, step + n_steps), p.row_bytes,
                        n_steps * kTileCols / info.block * info.bytes, (last - first) * kTileRows,
                        row_pairs * token_pairs);
            for (int64_t t = 0; t < c.token_tiles; t += 2) {
                const bool two_tokens = t + 1 < c.token_tiles;
                const std::byte* const x = p.x + step * c.token_tiles * kTileBytes + t / 2 * x_bytes;
                std::byte* const sums = waiting + t / 2 * row_pairs * kSumBytes;
                for (int64_t r = 0; r < row_pairs; ++r) {
                    const bool two_rows = first + r * 2 + 1 < last;
                    const auto multiply = two_rows ? (two_tokens ? multiply_block<2, 2> : multiply_block<2, 1>)
                                                   : (two_tokens ? multiply_block<1, 2> : multiply_block<1, 1>);
                    ahead.begin_block(sums + (r + 1) * kSumBytes, x + x_bytes + r * divide_up(x_bytes, row_pairs),
                                      row_pairs == 1 ? 0 : divide_up(2 * kTileBytes / 64, row_pairs));
                    multiply(sums + r * kSumBytes, step == 0, unpacked(r * 2), x, n_steps, ahead);
                }
                if (!complete) continue;
                // All rows of 16 tokens together: each token's row of y lies in a page of its own.
                for (int64_t i = 0; i < min64(2, c.token_tiles - t); ++i) {
                    const int64_t token = (t + i) * kTileTokens;
                    for (int64_t r = first; r < last; ++r) {
                        put_sums(p, sums + ((r - first) * 2 + i) * kTileBytes, r * kTileRows,
                                 min64(kTileRows, p.n_rows - r * kTileRows), token,
                                 min64(kTileTokens, p.n_tokens - token));
                    }
                    const int64_t row = first * kTileRows, n_rows = min64(last * kTileRows, p.n_rows) - row;
                    for (int64_t j = token; j < min64(token + kTileTokens, p.n_tokens); ++j) p.finished(j, row, n_rows);
                }
            }
            release_tiles();
        }
    }
}

#include "cpu/attention_amx.h"

int64_t multiply_add(int64_t rounds) {
    begin_tiles();
    alignas(64) static constexpr std::byte kZeros[kTileBytes] = {};
    load_tile<4>(kZeros, 64);
    load_tile<5>(kZeros, 64);
    load_tile<6>(kZeros, 64);
    load_tile<7>(kZeros, 64);
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
    for (int64_t i = 0; i < rounds; ++i) {
        multiply_tiles<0, 4, 6>();
        multiply_tiles<1, 4, 7>();
        multiply_tiles<2, 5, 6>();
        multiply_tiles<3, 5, 7>();
    }
    release_tiles();
    return rounds * 4 * kTileRows * kTileTokens * kTileCols * 2;
}

}  // namespace

}  // namespace yivl::amx

YIVL_TARGET_END

namespace yivl {

const PackedKernels kAmxPackedKernels = {
    .tokens = amx::kTileTokens,
    .least_tokens = amx::kTileTokens,  // a tile takes as long for fewer
    .order = amx::order,
    .packed_bytes = amx::packed_bytes,
    .pack = amx::pack,
    .scratch_bytes = amx::scratch_bytes,
    .linear = amx::linear,
    .multiply_add = amx::multiply_add,
};

const PackedAttention kAmxAttentionKernels = {
    .key_block = amx::kKeyBlock,
    .packed_bytes = amx::packed_keys_bytes,
    .pack = amx::pack_keys,
    .scratch_bytes = amx::attention_scratch_bytes,
    .attention = amx::attention,
};

}  // namespace yivl

#endif
