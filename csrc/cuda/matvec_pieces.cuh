// Pieces of a row of weights, for each type what a lane takes of it at a time, and their products with x.
//
// Weights that are small integers meet x as csrc/cpu/kernels_integer.h has it: rounded to 15-bit integers, with a scale
// for every 32 columns. An integer of x is 256 * high + low, two signed bytes, so that two dp4a multiply four weights;
// sums of a group of columns are exact, then scaled and added in float32. Half-precision weights meet x itself.
//
// A piece type has kColumns, Weights load(row, piece), Input input(x, token, piece) and add(weights, input, sum), which
// returns `sum` plus the piece's product.
#pragma once

#include "cuda/dequant.cuh"
#include "cuda/kernels.h"

namespace yivl::cuda {

// ---- weights from memory ----

// Blocks lie at multiples of it: matrices begin at multiples of 256.
template <class Block>
inline constexpr size_t kAlignment = sizeof(Block) & -sizeof(Block);

// 16 bytes of a block.
template <class Block>
__device__ __forceinline__ Words load_sixteen(const void* p) {
    if constexpr (kAlignment<Block> >= sizeof(Words)) {
        return load_constant_words(p);
    } else if constexpr (kAlignment<Block> >= sizeof(uint32_t)) {
        struct alignas(kAlignment<Block>) Aligned {
            uint32_t word[4];
        };
        const Aligned a = *static_cast<const Aligned*>(p);
        return {{a.word[0], a.word[1], a.word[2], a.word[3]}};
    } else {
        const bool odd = reinterpret_cast<uintptr_t>(p) % 4 != 0;
        const auto* inner = reinterpret_cast<const uint32_t*>(static_cast<const std::byte*>(p) + (odd ? 2 : 0));
        const auto* ends = static_cast<const uint16_t*>(p);
        const uint32_t a = inner[0], b = inner[1], c = inner[2];
        const uint32_t first = ends[odd ? 0 : 6], last = ends[7];
        if (odd) return {{first | a << 16, a >> 16 | b << 16, b >> 16 | c << 16, c >> 16 | last << 16}};
        return {{a, b, c, first | last << 16}};
    }
}
// Four bytes.
template <class Block>
__device__ __forceinline__ uint32_t load_four(const void* p) {
    if constexpr (kAlignment<Block> >= sizeof(uint32_t)) return *static_cast<const uint32_t*>(p);
    const auto* halves = static_cast<const uint16_t*>(p);
    return halves[0] | uint32_t{halves[1]} << 16;
}

template <class Block>
__device__ __forceinline__ const Block& block_at(const std::byte* row, int i) {
    return *reinterpret_cast<const Block*>(row + i * sizeof(Block));
}

// ---- integers ----

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
__device__ __forceinline__ int sum_of(const Sixteen& x) {
    constexpr uint32_t kOnes = 0x01010101;
    return dot({{kOnes, kOnes, kOnes, kOnes}}, x);
}

// Of each word the bits of `mask`, brought down by `by`.
__device__ __forceinline__ Words bits_of(const Words& w, int by, uint32_t mask) {
    return {{w.word[0] >> by & mask, w.word[1] >> by & mask, w.word[2] >> by & mask, w.word[3] >> by & mask}};
}
// The lower or upper nibble of every byte.
__device__ __forceinline__ Words nibbles(const Words& q, int upper) { return bits_of(q, upper * 4, 0x0f0f0f0f); }
// Puts higher bits, which begin at bit `at`, to q.
__device__ __forceinline__ void put_high(Words& q, const Words& high, int at) {
    for (int i = 0; i < 4; ++i) q.word[i] |= high.word[i] << at;
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
        const auto& block = block_at<BlockQ8_0>(row, piece / 2);
        return {load_sixteen<BlockQ8_0>(block.qs + piece % 2 * 16), from_half(block.d)};
    }
    __device__ static Input input(const RoundedInput& x, int64_t token, int piece) {
        return {sixteen(x, token, piece * 16), block_of(x, token, piece * 16).scale};
    }
    __device__ static float add(const Weights& w, const Input& in, float sum) {
        return fmaf(static_cast<float>(dot(w.q, in.x)), w.d * in.scale, sum);
    }
};

// 32 columns that lie as the lower and then the upper nibbles of 16 bytes.
struct NibblePiece {
    static constexpr int kColumns = kBlock;
    struct Input {
        Sixteen x[2];
        RoundedBlock block;
    };
    __device__ static Input input(const RoundedInput& x, int64_t token, int piece) {
        const int col = piece * kBlock;
        return {{sixteen(x, token, col), sixteen(x, token, col + 16)}, block_of(x, token, col)};
    }
};

// d * (q - kCentre), or d * q + m where a block has m; with a fifth bit where it has qh.
template <class Block, int kCentre>
struct UniformPiece : NibblePiece {
    static constexpr bool kHasMinimum = requires(Block block) { block.m; };
    static constexpr bool kHasFifthBit = requires(Block block) { block.qh; };
    struct Weights {
        Words q;
        uint32_t high;
        float d, m;
    };
    __device__ static Weights load(const std::byte* row, int piece) {
        const auto& block = block_at<Block>(row, piece);
        Weights w{load_sixteen<Block>(block.qs), 0, from_half(block.d), 0.0f};
        if constexpr (kHasFifthBit) w.high = load_four<Block>(block.qh);
        if constexpr (kHasMinimum) w.m = from_half(block.m);
        return w;
    }
    __device__ static float add(const Weights& w, const Input& in, float sum) {
        int n = -kCentre * in.block.sum;
        for (int i = 0; i < 2; ++i) {
            Words q = nibbles(w.q, i);
            if constexpr (kHasFifthBit) {
                // The product has bit k of four at 8k + 4, one to a byte.
                for (int j = 0; j < 4; ++j) {
                    q.word[j] |= (w.high >> (i * 16 + j * 4) & 15) * 0x02040810 & 0x10101010;
                }
            }
            n += dot(q, in.x[i]);
        }
        sum = fmaf(static_cast<float>(n), w.d * in.block.scale, sum);
        if constexpr (kHasMinimum) sum = fmaf(w.m, in.block.scale * static_cast<float>(in.block.sum), sum);
        return sum;
    }
};
template <>
struct Piece<WeightType::Q4_0> : UniformPiece<BlockQ4_0, 8> {};
template <>
struct Piece<WeightType::Q4_1> : UniformPiece<BlockQ4_1, 0> {};
template <>
struct Piece<WeightType::Q5_0> : UniformPiece<BlockQ5_0, 16> {};
template <>
struct Piece<WeightType::Q5_1> : UniformPiece<BlockQ5_1, 0> {};

// Nibbles that are places in a table.
struct NonLinearPiece : NibblePiece {
    struct Weights {
        Words q;
        float scale;
    };
    __device__ static float add(const Weights& w, const Input& in, float sum) {
        Words q[2];
        for (int i = 0; i < 4; ++i) {
            const uint32_t places = w.q.word[i];
            // The table's halves are two words each: three bits of a place take a byte of either, the fourth one of
            // the two. Four places at a time, which are then the lower and upper nibbles of two bytes in turn.
            const uint32_t which = 0x32103210 | (places & 0x88888888) >> 1;
            uint32_t values[2];
            for (int half = 0; half < 2; ++half) {
                const uint32_t four = places >> half * 16;
                values[half] = permute_bytes(take_bytes(kNonLinearLow, four), take_bytes(kNonLinearHigh, four),
                                             which >> half * 16);
            }
            q[0].word[i] = permute_bytes(values[0], values[1], 0x6420);
            q[1].word[i] = permute_bytes(values[0], values[1], 0x7531);
        }
        const int n = dot(q[0], in.x[0]) + dot(q[1], in.x[1]);
        return fmaf(static_cast<float>(n), w.scale * in.block.scale, sum);
    }

private:
    __device__ static uint32_t take_bytes(uint64_t from, uint32_t places) {
        return permute_bytes(static_cast<uint32_t>(from), static_cast<uint32_t>(from >> 32), places);
    }
};
template <>
struct Piece<WeightType::IQ4_NL> : NonLinearPiece {
    __device__ static Weights load(const std::byte* row, int piece) {
        const auto& block = block_at<BlockIQ4_NL>(row, piece);
        return {load_sixteen<BlockIQ4_NL>(block.qs), from_half(block.d)};
    }
};
// A group of a block.
template <>
struct Piece<WeightType::IQ4_XS> : NonLinearPiece {
    __device__ static Weights load(const std::byte* row, int piece) {
        const auto& block = block_at<BlockIQ4_XS>(row, piece / 8);
        return {load_sixteen<BlockIQ4_XS>(block.qs + piece % 8 * 16), scale_of(block, piece % 8)};
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
    // `head`: the block's first 16 bytes. Of x's two sums, over 32 columns, each of a pair of pieces takes one off.
    __device__ static float add(const Words (&q)[2], const Words& head, int piece, const Input& in, float sum) {
        const int part = piece % 2;
        const GroupPair groups = group_pair(head, piece % 8 / 2 * 2);
        const float d = from_half(static_cast<half_bits>(head.word[0]));
        const float dmin = from_half(static_cast<half_bits>(head.word[0] >> 16));
        const float scales[2] = {d * static_cast<float>(groups.scales & 255),
                                 d * static_cast<float>(groups.scales >> 8 & 255)};
        const float minimum = dmin * static_cast<float>(groups.minima >> part * 8 & 255);
        for (int i = 0; i < 2; ++i) {
            sum = fmaf(static_cast<float>(dot(q[i], in.x[i])), scales[i] * in.block[i].scale, sum);
        }
        const float scale = part == 0 ? in.block[0].scale : in.block[1].scale;
        const int sum_of_x = part == 0 ? in.block[0].sum : in.block[1].sum;
        return fmaf(-minimum, scale * static_cast<float>(sum_of_x), sum);
    }
};

template <>
struct Piece<WeightType::Q4_K> : KPiece {
    struct Weights {
        Words head, q;
        int piece;
    };
    __device__ static Weights load(const std::byte* row, int piece) {
        const auto& block = block_at<BlockQ4_K>(row, piece / 8);
        return {load_constant_words(&block), load_constant_words(block.qs + piece % 8 * 16), piece};
    }
    __device__ static float add(const Weights& w, const Input& in, float sum) {
        const Words q[2] = {nibbles(w.q, 0), nibbles(w.q, 1)};
        return KPiece::add(q, w.head, w.piece, in, sum);
    }
};

template <>
struct Piece<WeightType::Q5_K> : KPiece {
    struct Weights {
        Words head, q, high;
        int piece;
    };
    __device__ static Weights load(const std::byte* row, int piece) {
        const auto& block = block_at<BlockQ5_K>(row, piece / 8);
        return {load_constant_words(&block), load_constant_words(block.qs + piece % 8 * 16),
                load_constant_words(block.qh + piece % 2 * 16), piece};
    }
    __device__ static float add(const Weights& w, const Input& in, float sum) {
        Words q[2] = {nibbles(w.q, 0), nibbles(w.q, 1)};
        const int first = w.piece % 8 / 2 * 2;
        for (int i = 0; i < 2; ++i) put_high(q[i], bits_of(w.high, first + i, 0x01010101), 4);
        return KPiece::add(q, w.head, w.piece, in, sum);
    }
};

// A quarter of a Q2_K, Q3_K or Q6_K block: 16 columns of four groups of 32, each with a scale of its own.
struct QuarterPiece {
    static constexpr int kColumns = 64;
    struct Input {
        Sixteen x[4];
        float scale[4];
        int sum[4];
    };
    __device__ static Input input(const RoundedInput& x, int64_t token, int piece) {
        const int half = piece / 2 * 128;
        Input in;
        for (int i = 0; i < 4; ++i) {
            in.x[i] = sixteen(x, token, half + i * 32 + piece % 2 * 16);
            in.scale[i] = block_of(x, token, half + i * 32).scale;
            in.sum[i] = sum_of(in.x[i]);
        }
        return in;
    }
};

template <>
struct Piece<WeightType::Q2_K> : QuarterPiece {
    struct Weights {
        Words q;
        uint32_t scales[2];  // and minima; every other byte is this piece's
        uint32_t d;          // and dmin
        int part;
    };
    __device__ static Weights load(const std::byte* row, int piece) {
        const auto& block = block_at<BlockQ2_K>(row, piece / 4);
        const int half = piece % 4 / 2, part = piece % 2;
        return {load_sixteen<BlockQ2_K>(block.qs + half * 32 + part * 16),
                {load_four<BlockQ2_K>(block.scales + half * 8), load_four<BlockQ2_K>(block.scales + half * 8 + 4)},
                load_four<BlockQ2_K>(&block.d),
                part};
    }
    __device__ static float add(const Weights& w, const Input& in, float sum) {
        const float d = from_half(static_cast<half_bits>(w.d)), dmin = from_half(static_cast<half_bits>(w.d >> 16));
        for (int i = 0; i < 4; ++i) {
            const uint32_t group = w.scales[i / 2] >> (i % 2 * 16 + w.part * 8);
            const int n = dot(bits_of(w.q, i * 2, 0x03030303), in.x[i]) * static_cast<int>(group & 15);
            sum = fmaf(static_cast<float>(n), d * in.scale[i], sum);
            const int off = in.sum[i] * static_cast<int>(group >> 4 & 15);
            sum = fmaf(static_cast<float>(-off), dmin * in.scale[i], sum);
        }
        return sum;
    }
};

template <>
struct Piece<WeightType::Q3_K> : QuarterPiece {
    struct Weights {
        Words q, high, tail;  // the last two bytes of qs, the scales, d
        int piece;
    };
    __device__ static Weights load(const std::byte* row, int piece) {
        const auto& block = block_at<BlockQ3_K>(row, piece / 4);
        const int half = piece % 4 / 2, part = piece % 2;
        return {load_sixteen<BlockQ3_K>(block.qs + half * 32 + part * 16),
                load_sixteen<BlockQ3_K>(block.hmask + part * 16),
                load_sixteen<BlockQ3_K>(&block.qs[sizeof(block.qs) - 2]), piece};
    }
    __device__ static float add(const Weights& w, const Input& in, float sum) {
        const int half = w.piece % 4 / 2, part = w.piece % 2;
        const float d = from_half(static_cast<half_bits>(w.tail.word[3] >> 16));
        const auto scales = [&](int word) { return w.tail.word[word] >> 16 | w.tail.word[word + 1] << 16; };
        const int by = part * 8 + half * 4;
        for (int i = 0; i < 4; ++i) {
            Words q = bits_of(w.q, i * 2, 0x03030303);
            put_high(q, bits_of(w.high, half * 4 + i, 0x01010101), 2);
            const uint32_t low = scales(i / 2) >> (by + i % 2 * 16) & 15;
            const uint32_t high = scales(2) >> (by + i % 2 * 16 + i / 2 * 2) & 3;
            const int scale = static_cast<int>(low | high << 4) - 32;
            const int n = (dot(q, in.x[i]) - 4 * in.sum[i]) * scale;
            sum = fmaf(static_cast<float>(n), d * in.scale[i], sum);
        }
        return sum;
    }
};

template <>
struct Piece<WeightType::Q6_K> : QuarterPiece {
    struct Weights {
        Words low[2], high;
        int scale[4];
        float d;
    };
    __device__ static Weights load(const std::byte* row, int piece) {
        const auto& block = block_at<BlockQ6_K>(row, piece / 4);
        const int half = piece % 4 / 2, part = piece % 2;
        const uint8_t* low = block.ql + half * 64 + part * 16;
        const int8_t* scales = block.scales + half * 8 + part;
        return {{load_sixteen<BlockQ6_K>(low), load_sixteen<BlockQ6_K>(low + 32)},
                load_sixteen<BlockQ6_K>(block.qh + half * 32 + part * 16),
                {scales[0], scales[2], scales[4], scales[6]},
                from_half(block.d)};
    }
    __device__ static float add(const Weights& w, const Input& in, float sum) {
        for (int i = 0; i < 4; ++i) {
            Words q = nibbles(w.low[i % 2], i / 2);
            put_high(q, bits_of(w.high, i * 2, 0x03030303), 4);
            const int n = (dot(q, in.x[i]) - 32 * in.sum[i]) * w.scale[i];
            sum = fmaf(static_cast<float>(n), w.d * in.scale[i], sum);
        }
        return sum;
    }
};

// ---- half precision ----

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
        if (in.aligned_w) return {load_constant_words(from)};
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

}  // namespace yivl::cuda
