// Products with the commonest weight types, which stay as the file has them: made for few rows of x, where the weights'
// way from memory is what takes time.
//
// Weights that are small integers meet x as csrc/cpu/kernels_integer.h has it: rounded to 15-bit integers, with a scale
// for every 32 columns. An integer of x is 256 * high + low, two signed bytes, so that two dp4a multiply four weights;
// sums of a group of columns are exact, then scaled and added in float32. Half-precision weights meet x itself.
//
// A warp has kRows rows. A row is cut into pieces, of which each lane takes every 32nd, always in the same order: how
// many rows of x there are changes no result.
#include "cuda/dequant.cuh"
#include "cuda/finish.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/position.cuh"
#include "cuda/reduce.cuh"
#include "cuda/round.cuh"

namespace yivl::cuda {

namespace {

constexpr int kRows = 2;  // of the weights, of a warp: they share what is read of x
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kMostTokens = 4;  // of a warp
// Of a multiprocessor, at least: 128 registers for a thread, more where a piece or the sums of several tokens need
// them.
constexpr int blocks_at_once(WeightType type, int tokens) { return 4 - (type == WeightType::Q6_K) - (tokens > 1); }
constexpr int kGatedWarps = 8;
// Three for Q4_K and one token: 6B's 344 blocks are then all under way at once on the 132 multiprocessors of an H100.
constexpr int gated_blocks_at_once(WeightType type, int tokens) {
    return type == WeightType::Q4_K && tokens == 1 ? 3 : blocks_at_once(type, tokens) / 2;
}

// ---- rounding x ----

__global__ void round_kernel(ConstMat x, RoundedInput to) {
    const int64_t block = int64_t{block_x()} * kWarps + warp_id(), n_blocks = x.cols / kBlock;
    if (block >= x.rows * n_blocks) return;
    const int64_t row = block / n_blocks, col = block % n_blocks * kBlock + lane_id();
    round_block(to, row, col, x.data[row * x.stride + col]);
}

// ---- pieces of a row ----
//
// A piece type has kColumns, Weights load(row, piece), Input input(x, token, piece) and add(weights, input, sum), which
// returns `sum` plus the piece's product.

// 16 bytes at an even address.
__device__ __forceinline__ Words load_even(const std::byte* p) {
    const bool odd = reinterpret_cast<uintptr_t>(p) % 4 != 0;
    const auto* inner = reinterpret_cast<const uint32_t*>(p + (odd ? 2 : 0));
    const auto* ends = reinterpret_cast<const uint16_t*>(p);
    const uint32_t a = inner[0], b = inner[1], c = inner[2];
    const uint32_t first = ends[odd ? 0 : 6], last = ends[7];
    if (odd) return {{first | a << 16, a >> 16 | b << 16, b >> 16 | c << 16, c >> 16 | last << 16}};
    return {{a, b, c, first | last << 16}};
}

// 16 columns of a row of x.
struct Sixteen {
    Words high, low;
};
__device__ __forceinline__ Sixteen sixteen(const RoundedInput& x, int64_t token, int64_t col) {
    const int64_t at = token * x.cols + col;
    return {load_words(x.high + at), load_words(x.low + at)};
}
__device__ __forceinline__ RoundedBlock block_of(const RoundedInput& x, int64_t token, int64_t col) {
    return x.blocks[(token * x.cols + col) / kBlock];
}

// `w`: four weights in the bytes of each word.
__device__ __forceinline__ int dot(const Words& w, const Sixteen& x) {
    int high = 0, low = 0;
    for (int i = 0; i < 4; ++i) {
        high = dp4a(static_cast<int>(w.word[i]), static_cast<int>(x.high.word[i]), high);
        low = dp4a(static_cast<int>(w.word[i]), static_cast<int>(x.low.word[i]), low);
    }
    return high * 256 + low;
}

// The lower or upper nibble of every byte.
__device__ __forceinline__ Words nibbles(const Words& q, int upper) {
    Words n;
    for (int i = 0; i < 4; ++i) n.word[i] = q.word[i] >> upper * 4 & 0x0f0f0f0f;
    return n;
}

template <WeightType>
struct Piece;

// Half a block.
template <>
struct Piece<WeightType::Q8_0> {
    static constexpr int kColumns = 16;
    struct Weights {
        Words q;
        float d;
    };
    struct Input {
        Sixteen x;
        float scale;
    };
    __device__ static Weights load(const std::byte* row, int piece) {
        const std::byte* block = row + piece / 2 * sizeof(BlockQ8_0);
        return {load_even(block + 2 + piece % 2 * 16), to_float(*reinterpret_cast<const Half*>(block))};
    }
    __device__ static Input input(const RoundedInput& x, int64_t token, int piece) {
        return {sixteen(x, token, piece * 16), block_of(x, token, piece * 16).scale};
    }
    __device__ static float add(const Weights& w, const Input& in, float sum) {
        return fmaf(static_cast<float>(dot(w.q, in.x)), w.d * in.scale, sum);
    }
};

template <>
struct Piece<WeightType::Q4_0> {
    static constexpr int kColumns = kBlock;
    struct Weights {
        Words q;
        float d;
    };
    struct Input {
        Sixteen first, second;
        RoundedBlock block;
    };
    __device__ static Weights load(const std::byte* row, int piece) {
        const std::byte* block = row + piece * sizeof(BlockQ4_0);
        return {load_even(block + 2), to_float(*reinterpret_cast<const Half*>(block))};
    }
    __device__ static Input input(const RoundedInput& x, int64_t token, int piece) {
        const int col = piece * kBlock;
        return {sixteen(x, token, col), sixteen(x, token, col + 16), block_of(x, token, col)};
    }
    __device__ static float add(const Weights& w, const Input& in, float sum) {
        const int n = dot(nibbles(w.q, 0), in.first) + dot(nibbles(w.q, 1), in.second) - 8 * in.block.sum;
        return fmaf(static_cast<float>(n), w.d * in.block.scale, sum);
    }
};

// An eighth of a Q4_K or Q5_K block: 16 columns of two groups of 32.
struct KPiece {
    static constexpr int kColumns = 32;
    struct Input {
        Sixteen x[2];
        RoundedBlock block[2];
    };
    __device__ static Input input(const RoundedInput& x, int64_t token, int piece) {
        const int group = piece / 2 * 64, col = group + piece % 2 * 16;
        return {{sixteen(x, token, col), sixteen(x, token, col + 32)},
                {block_of(x, token, group), block_of(x, token, group + 32)}};
    }

    // What the two groups have in common with the others, from the block's first 16 bytes.
    struct Scales {
        float scale[2];
        float minimum;  // of the group of which this piece takes the sum of x off: the piece's number modulo 2
    };
    __device__ static Scales scales(const Words& head, int piece) {
        const int first = piece % 8 / 2 * 2;  // group
        const int by = first % 4 * 8;
        uint32_t scale = head.word[1] >> by, minimum = head.word[2] >> by;  // of both groups, a byte each
        if (first < 4) {
            scale &= 0x3f3f;
            minimum &= 0x3f3f;
        } else {
            const uint32_t low = head.word[3] >> by;
            scale = (low & 0x0f0f) | (scale >> 2 & 0x3030);
            minimum = (low >> 4 & 0x0f0f) | (minimum >> 2 & 0x3030);
        }
        const float d = to_float(Half{static_cast<uint16_t>(head.word[0])});
        const float dmin = to_float(Half{static_cast<uint16_t>(head.word[0] >> 16)});
        return {{d * static_cast<float>(scale & 255), d * static_cast<float>(scale >> 8 & 255)},
                dmin * static_cast<float>(minimum >> piece % 2 * 8 & 255)};
    }
    __device__ static float add(const Words (&q)[2], const Scales& scales, int part, const Input& in, float sum) {
        for (int i = 0; i < 2; ++i) {
            sum = fmaf(static_cast<float>(dot(q[i], in.x[i])), scales.scale[i] * in.block[i].scale, sum);
        }
        const float scale = part == 0 ? in.block[0].scale : in.block[1].scale;
        const int sum_of_x = part == 0 ? in.block[0].sum : in.block[1].sum;
        return fmaf(-scales.minimum, scale * static_cast<float>(sum_of_x), sum);
    }
};

template <>
struct Piece<WeightType::Q4_K> : KPiece {
    struct Weights {
        Words head, q;
        int piece;
    };
    __device__ static Weights load(const std::byte* row, int piece) {
        const std::byte* block = row + piece / 8 * sizeof(BlockQ4_K);
        return {load_words(block), load_words(block + 16 + piece % 8 * 16), piece};
    }
    __device__ static float add(const Weights& w, const Input& in, float sum) {
        const Words q[2] = {nibbles(w.q, 0), nibbles(w.q, 1)};
        return KPiece::add(q, scales(w.head, w.piece), w.piece % 2, in, sum);
    }
};

template <>
struct Piece<WeightType::Q5_K> : KPiece {
    struct Weights {
        Words head, q, high;
        int piece;
    };
    __device__ static Weights load(const std::byte* row, int piece) {
        const std::byte* block = row + piece / 8 * sizeof(BlockQ5_K);
        return {load_words(block), load_words(block + 48 + piece % 8 * 16), load_words(block + 16 + piece % 2 * 16),
                piece};
    }
    __device__ static float add(const Weights& w, const Input& in, float sum) {
        Words q[2] = {nibbles(w.q, 0), nibbles(w.q, 1)};
        const int first = w.piece % 8 / 2 * 2;
        for (int i = 0; i < 2; ++i) {
            for (int j = 0; j < 4; ++j) q[i].word[j] |= (w.high.word[j] >> (first + i) & 0x01010101) << 4;
        }
        return KPiece::add(q, scales(w.head, w.piece), w.piece % 2, in, sum);
    }
};

// A quarter of a block: 16 columns of four groups of 32, each with a scale of its own.
template <>
struct Piece<WeightType::Q6_K> {
    static constexpr int kColumns = 64;
    struct Weights {
        Words low[2], high;
        int scale[4];
        float d;
    };
    struct Input {
        Sixteen x[4];
        float scale[4];
    };
    __device__ static Weights load(const std::byte* row, int piece) {
        const std::byte* block = row + piece / 4 * sizeof(BlockQ6_K);
        const int half = piece % 4 / 2, part = piece % 2;
        const std::byte* low = block + half * 64 + part * 16;
        const auto* scales = reinterpret_cast<const int8_t*>(block) + 192 + half * 8 + part;
        return {{load_even(low), load_even(low + 32)},
                load_even(block + 128 + half * 32 + part * 16),
                {scales[0], scales[2], scales[4], scales[6]},
                to_float(*reinterpret_cast<const Half*>(block + 208))};
    }
    __device__ static Input input(const RoundedInput& x, int64_t token, int piece) {
        const int group = piece / 2 * 128;
        Input in;
        for (int i = 0; i < 4; ++i) {
            in.x[i] = sixteen(x, token, group + i * 32 + piece % 2 * 16);
            in.scale[i] = block_of(x, token, group + i * 32).scale;
        }
        return in;
    }
    __device__ static float add(const Weights& w, const Input& in, float sum) {
        for (int i = 0; i < 4; ++i) {
            Words q = nibbles(w.low[i % 2], i / 2);
            for (int j = 0; j < 4; ++j) {
                // The top bit keeps the difference of each byte from borrowing of the next.
                const uint32_t n = q.word[j] | (w.high.word[j] >> i * 2 & 0x03030303) << 4 | 0x80808080;
                q.word[j] = (n - 0x20202020) ^ 0x80808080;
            }
            sum = fmaf(static_cast<float>(dot(q, in.x[i]) * w.scale[i]), w.d * in.scale[i], sum);
        }
        return sum;
    }
};

// x as it is, for half-precision weights.
struct PlainInput {
    ConstMat x;
    bool aligned_x, aligned_w;  // to 16 bytes, each row
};

template <class Element>
struct FloatPiece {
    static constexpr int kColumns = 8;
    struct Weights {
        Words elements;
    };
    struct Input {
        float x[kColumns];
    };
    // A row's last piece may lack columns: their weights and x are 0.
    __device__ static Weights load(const std::byte* row, int piece, const PlainInput& in) {
        const int col = piece * kColumns;
        const std::byte* from = row + col * 2;
        if (in.aligned_w) return {load_words(from)};
        Weights w{};
        for (int i = 0; i < kColumns; ++i) {
            if (col + i < in.x.cols) {
                w.elements.word[i / 2] |= uint32_t{reinterpret_cast<const uint16_t*>(from)[i]} << i % 2 * 16;
            }
        }
        return w;
    }
    __device__ static Input input(const PlainInput& in, int64_t token, int piece) {
        const int col = piece * kColumns;
        const float* from = in.x.data + token * in.x.stride + col;
        Input input;
        if (in.aligned_x && col + kColumns <= in.x.cols) {
            for (int i = 0; i < 2; ++i) {
                const Words words = load_words(from + i * 4);
                for (int j = 0; j < 4; ++j) input.x[i * 4 + j] = float_of_bits(words.word[j]);
            }
        } else {
            for (int i = 0; i < kColumns; ++i) input.x[i] = col + i < in.x.cols ? from[i] : 0.0f;
        }
        return input;
    }
    __device__ static float add(const Weights& w, const Input& in, float sum) {
        for (int i = 0; i < kColumns; ++i) {
            const Element element{static_cast<uint16_t>(w.elements.word[i / 2] >> i % 2 * 16)};
            sum = fmaf(to_float(element), in.x[i], sum);
        }
        return sum;
    }
};
template <>
struct Piece<WeightType::F16> : FloatPiece<Half> {};
template <>
struct Piece<WeightType::BF16> : FloatPiece<Bfloat> {};

template <class P>
__device__ __forceinline__ auto load_piece(const std::byte* row, int piece, const RoundedInput&) {
    return P::load(row, piece);
}
template <class P>
__device__ __forceinline__ auto load_piece(const std::byte* row, int piece, const PlainInput& in) {
    return P::load(row, piece, in);
}
__device__ __forceinline__ int64_t columns(const RoundedInput& x) { return x.cols; }
__device__ __forceinline__ int64_t columns(const PlainInput& x) { return x.x.cols; }

// ---- kernels ----

// sums[r][t] = w[r] . x[first_token + t], in every lane. Tokens past the last repeat it.
template <class P, class Input, int kTokens>
__device__ __forceinline__ void multiply_rows(float (&sums)[kRows][kTokens], const std::byte* const (&w)[kRows],
                                              const Input& x, int64_t first_token, int64_t n_tokens) {
    const int n_pieces = static_cast<int>((columns(x) + P::kColumns - 1) / P::kColumns);
    for (auto& row : sums) {
        for (float& sum : row) sum = 0.0f;
    }
    int piece = lane_id();
    typename P::Weights weights[kRows];
    if (piece < n_pieces) {
        for (int r = 0; r < kRows; ++r) weights[r] = load_piece<P>(w[r], piece, x);
    }
    while (piece < n_pieces) {
        // The next piece is on its way while this one is computed.
        const int next = piece + kWarp;
        typename P::Weights ahead[kRows];
        for (int r = 0; r < kRows; ++r) ahead[r] = load_piece<P>(w[r], next < n_pieces ? next : piece, x);
        YIVL_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            const int64_t token = first_token + t < n_tokens ? first_token + t : n_tokens - 1;
            const typename P::Input input = P::input(x, token, piece);
            for (int r = 0; r < kRows; ++r) sums[r][t] = P::add(weights[r], input, sums[r][t]);
        }
        for (int r = 0; r < kRows; ++r) weights[r] = ahead[r];
        piece = next;
    }
    for (auto& row : sums) {
        for (float& sum : row) sum = reduce_warp<Sum>(sum);
    }
}

__host__ __device__ constexpr int64_t groups(int64_t n_rows) { return (n_rows + kRows - 1) / kRows; }

template <WeightType kType, class Input, int kTokens>
__global__ void __launch_bounds__(kThreads, blocks_at_once(kType, kTokens))
    matvec_kernel(Targets targets, Input x, int64_t row_bytes) {
    int64_t group = int64_t{block_x()} * kWarps + warp_id();
    Target to = targets.of[0];
    for (size_t i = 1; i < kMostProducts; ++i) {
        const int64_t n = groups(to.y.cols);
        if (group < n) continue;
        group -= n;
        to = targets.of[i];
    }
    if (group >= groups(to.y.cols)) return;
    const int64_t first_row = group * kRows, first_token = int64_t{block_y()} * kTokens;
    const std::byte* w[kRows];
    for (int r = 0; r < kRows; ++r) {
        w[r] = to.w + (first_row + r < to.y.cols ? first_row + r : first_row) * row_bytes;
    }
    float sums[kRows][kTokens];
    multiply_rows<Piece<kType>>(sums, w, x, first_token, to.y.rows);
    if (lane_id() != 0) return;
    static_assert(kRows == 2);  // a pair that is rotated together
    const bool has_second = first_row + 1 < to.y.cols;
    YIVL_UNROLL
    for (int t = 0; t < kTokens; ++t) {
        const int64_t token = first_token + t;
        if (token >= to.y.rows) break;
        float first = sums[0][t], second = sums[1][t];
        if (to.bias != nullptr) {
            first += to.bias[first_row];
            if (has_second) second += to.bias[first_row + 1];
        }
        if (to.turns.cos_sin != nullptr) turn(first, second, to.turns, token, first_row);
        float* y = to.y.data + (number(to.row) + token) * to.y.stride + first_row;
        put(to.finish, y[0], first);
        if (has_second) put(to.finish, y[1], second);
    }
}

// kBlock rows of gate, and the same of up, for every block: their products can be rounded at once.
template <WeightType kType, class Input, int kTokens>
__global__ void __launch_bounds__(kGatedWarps* kWarp, gated_blocks_at_once(kType, kTokens))
    gated_matvec_kernel(Mat y, const std::byte* gate, const std::byte* up, Input x, int64_t row_bytes,
                        RoundedInput rounded_y) {
    struct Products {
        float of[kTokens][kBlock];
    };
    Products& products = shared<Products>();
    const int64_t first_row = int64_t{block_x()} * kBlock, first_token = int64_t{block_y()} * kTokens;
    for (int i = warp_id(); i < kBlock; i += kGatedWarps) {
        const int64_t row = first_row + i;
        if (row >= y.cols) break;
        static_assert(kRows == 2);
        const std::byte* const w[kRows] = {gate + row * row_bytes, up + row * row_bytes};
        float sums[kRows][kTokens];
        multiply_rows<Piece<kType>>(sums, w, x, first_token, y.rows);
        if (lane_id() != 0) continue;
        YIVL_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            if (first_token + t >= y.rows) break;
            const float product = silu_of(sums[0][t]) * sums[1][t];
            y.data[(first_token + t) * y.stride + row] = product;
            products.of[t][i] = product;
        }
    }
    if (rounded_y.high == nullptr) return;
    sync_block();
    const int t = warp_id();
    if (t < kTokens && first_token + t < y.rows) {
        round_block(rounded_y, first_token + t, first_row + lane_id(), products.of[t][lane_id()]);
    }
}

// fn.template operator()<type, tokens>(input): what a launch of that type takes as x, and tokens of a warp.
template <class Fn>
void with_input(WeightType type, ConstMat x, const RoundedInput& rounded, Fn&& fn) {
    const auto with_tokens = [&]<WeightType kType>(const auto& input) {
        if (x.rows == 1) return fn.template operator()<kType, 1>(input);
        if (x.rows == 2) return fn.template operator()<kType, 2>(input);
        return fn.template operator()<kType, kMostTokens>(input);
    };
    const auto aligned = [](const void* data, int64_t row_bytes) {
        return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_bytes % 16 == 0;
    };
    const PlainInput plain{x, aligned(x.data, x.stride * 4), x.cols % 8 == 0};
    switch (type) {
        case WeightType::F16: return with_tokens.template operator()<WeightType::F16>(plain);
        case WeightType::BF16: return with_tokens.template operator()<WeightType::BF16>(plain);
        case WeightType::Q8_0: return with_tokens.template operator()<WeightType::Q8_0>(rounded);
        case WeightType::Q4_0: return with_tokens.template operator()<WeightType::Q4_0>(rounded);
        case WeightType::Q4_K: return with_tokens.template operator()<WeightType::Q4_K>(rounded);
        case WeightType::Q5_K: return with_tokens.template operator()<WeightType::Q5_K>(rounded);
        case WeightType::Q6_K: return with_tokens.template operator()<WeightType::Q6_K>(rounded);
        default: assert(false);
    }
}

int64_t blocks(int64_t n, int64_t of) { return (n + of - 1) / of; }

}  // namespace

bool takes_rounded(WeightType type) {
    switch (type) {
        case WeightType::Q8_0:
        case WeightType::Q4_0:
        case WeightType::Q4_K:
        case WeightType::Q5_K:
        case WeightType::Q6_K: return true;
        default: return false;
    }
}
bool has_matvec(WeightType type) { return takes_rounded(type) || type == WeightType::F16 || type == WeightType::BF16; }

size_t rounded_bytes(int64_t rows, int64_t cols) {
    return static_cast<size_t>(rows * cols * 2 + rows * (cols / kBlock) * int64_t{sizeof(RoundedBlock)});
}

RoundedInput rounded_in(std::byte* memory, int64_t rows, int64_t cols) {
    const int64_t n = rows * cols;
    return {reinterpret_cast<int8_t*>(memory), reinterpret_cast<int8_t*>(memory + n),
            reinterpret_cast<RoundedBlock*>(memory + 2 * n), cols};
}

void round_input(Stream& stream, ConstMat x, const RoundedInput& rounded) {
    const int64_t n_blocks = x.rows * (x.cols / kBlock);
    launch(stream, "round", round_kernel, {blocks(n_blocks, kWarps)}, kThreads, 0, x, rounded);
}

void matvec(Stream& stream, ConstMat x, const RoundedInput& rounded, std::span<const FinishedProduct> products) {
    const Targets targets = targets_of(products);
    int64_t n_groups = 0;
    for (const FinishedProduct& p : products) n_groups += groups(p.w.rows);
    const int64_t row_bytes = products[0].w.row_bytes();
    stream.expect(work_of(x.rows, products));
    with_input(products[0].w.type, x, rounded, [&]<WeightType kType, int kTokens, class Input>(const Input& input) {
        launch(stream, "matvec", matvec_kernel<kType, Input, kTokens>,
               {blocks(n_groups, kWarps), blocks(x.rows, kTokens)}, kThreads, 0, targets, input, row_bytes);
    });
}

void gated_matvec(Stream& stream, Mat y, ConstMat x, const RoundedInput& rounded, const Weight& gate, const Weight& up,
                  const RoundedInput& rounded_y) {
    assert(gate.type == up.type && (rounded_y.high == nullptr || y.cols % kBlock == 0));
    const FinishedProduct products[] = {{y, gate}, {y, up}};
    stream.expect(work_of(x.rows, products));
    with_input(gate.type, x, rounded, [&]<WeightType kType, int kTokens, class Input>(const Input& input) {
        launch(stream, "gated_matvec", gated_matvec_kernel<kType, Input, kTokens>,
               {blocks(gate.rows, kBlock), blocks(x.rows, kTokens)}, kGatedWarps * kWarp, 0, y, gate.data, up.data,
               input, gate.row_bytes(), rounded_y);
    });
}

}  // namespace yivl::cuda
