// Pieces of a row of weights, for each type what a lane takes of it at a time, and their products with x.
//
// Weights that are small integers meet x as csrc/cpu/kernels_integer.h has it: rounded to 15-bit integers, with a scale
// for every 32 columns. An integer of x is 256 * high + low, two signed bytes, so that two dp4a multiply four weights;
// sums of a group of columns are exact, then scaled and added in float32. Half-precision weights meet x itself.
//
// A lane's pieces are kWarp apart, and a block has 1, 2, 4 or 8: which part of their blocks they are never changes. So
// a row's pieces are reached by adding the same again and again to a pointer, and what follows from the part is
// computed once.
//
// A piece type has kColumns, Block and kPieces of it, first_column(piece), Weights load(block, part, column, x), Input
// input(x, at, part, column), x's column of a token being number `at` of all, and add(weights, input, part, sum), which
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

// ---- integers ----

// 16 columns of a row of x.
struct Sixteen {
    Words high, low;
};
__device__ __forceinline__ Sixteen sixteen(const RoundedInput& x, uint32_t at) {
    return {load_words(x.high + at), load_words(x.low + at)};
}
__device__ __forceinline__ RoundedBlock block_of(const RoundedInput& x, uint32_t at) {
    const Words words = load_words(x.blocks + at / kBlock);
    return {float_of_bits(words.word[0]), float_of_bits(words.word[1]), static_cast<int>(words.word[2]),
            static_cast<int>(words.word[3])};
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
// The same of bytes without a sign.
__device__ __forceinline__ int dot_unsigned(const Words& w, const Sixteen& x) {
    int high = 0, low = 0;
    for (int i = 0; i < 4; ++i) {
        high = dp4a_unsigned(w.word[i], static_cast<int>(x.high.word[i]), high);
        low = dp4a_unsigned(w.word[i], static_cast<int>(x.low.word[i]), low);
    }
    return high * 256 + low;
}

// The upper nibbles where they stand, so that each counts 16 times.
__device__ __forceinline__ int upper_nibbles_dot(const Words& q, const Sixteen& x) {
    const auto upper = [&](int i) { return q.word[i] & 0xf0f0f0f0; };
    return dot_unsigned({{upper(0), upper(1), upper(2), upper(3)}}, x);
}

// Of each word the bits of `mask`, brought down by `by`.
__device__ __forceinline__ Words bits_of(const Words& w, int by, uint32_t mask) {
    return {{w.word[0] >> by & mask, w.word[1] >> by & mask, w.word[2] >> by & mask, w.word[3] >> by & mask}};
}
// The lower or upper nibble of every byte.
__device__ __forceinline__ Words nibbles(const Words& q, int upper) { return bits_of(q, upper * 4, 0x0f0f0f0f); }
// Puts bits of `high` to q: of every byte those from bit `from` on to where `mask` has them, from bit `at` on.
__device__ __forceinline__ void put_high(Words& q, const Words& high, int from, int at, uint32_t mask) {
    const auto by = static_cast<uint32_t>(from - at);
    // Around the word: what comes from other bytes is not of the mask.
    for (int i = 0; i < 4; ++i) q.word[i] |= (high.word[i] >> (by & 31) | high.word[i] << (-by & 31)) & mask;
}

template <WeightType>
struct Piece;

// Half a block.
template <>
struct Piece<WeightType::Q8_0> {
    using Block = BlockQ8_0;
    static constexpr uint32_t kColumns = 16, kPieces = 2;
    struct Weights {
        Words q;
        float d;
    };
    struct Input {
        Sixteen x;
        float scale;
    };
    __device__ static uint32_t first_column(uint32_t piece) { return piece * 16; }
    __device__ static Weights load(const Block& block, uint32_t part, uint32_t, const RoundedInput&) {
        return {load_sixteen<Block>(block.qs + part * 16), from_half(block.d)};
    }
    __device__ static Input input(const RoundedInput& x, uint32_t at, uint32_t, uint32_t) {
        return {sixteen(x, at), x.blocks[at / kBlock].scale};
    }
    __device__ static float add(const Weights& w, const Input& in, uint32_t, float sum) {
        return fmaf(static_cast<float>(dot(w.q, in.x)), w.d * in.scale, sum);
    }
};

// 32 columns that lie as the lower and then the upper nibbles of 16 bytes.
struct NibblePiece {
    static constexpr uint32_t kColumns = kBlock;
    struct Input {
        Sixteen x[2];
        RoundedBlock block;
    };
    __device__ static uint32_t first_column(uint32_t piece) { return piece * kBlock; }
    __device__ static Input input(const RoundedInput& x, uint32_t at, uint32_t, uint32_t) {
        return {{sixteen(x, at), sixteen(x, at + 16)}, block_of(x, at)};
    }
};

// d * (q - kCentre), or d * q + m where a block has m; with a fifth bit where it has qh.
template <class BlockOfType, int kCentre>
struct UniformPiece : NibblePiece {
    using Block = BlockOfType;
    static constexpr uint32_t kPieces = 1;
    static constexpr bool kHasMinimum = requires(Block block) { block.m; };
    static constexpr bool kHasFifthBit = requires(Block block) { block.qh; };
    struct Weights {
        Words q;
        uint32_t high;
        float d, m;
    };
    __device__ static Weights load(const Block& block, uint32_t, uint32_t, const RoundedInput&) {
        Weights w{load_sixteen<Block>(block.qs), 0, from_half(block.d), 0.0f};
        if constexpr (kHasFifthBit) w.high = load_four<Block>(block.qh);
        if constexpr (kHasMinimum) w.m = from_half(block.m);
        return w;
    }
    __device__ static float add(const Weights& w, const Input& in, uint32_t, float sum) {
        int n = -kCentre * in.block.sum;
        if constexpr (kHasFifthBit) {
            for (int i = 0; i < 2; ++i) {
                Words q = nibbles(w.q, i);
                // The product has bit k of four at 8k + 4, one to a byte.
                for (int j = 0; j < 4; ++j) {
                    q.word[j] |= (w.high >> (i * 16 + j * 4) & 15) * 0x02040810 & 0x10101010;
                }
                n += dot(q, in.x[i]);
            }
        } else {
            n += dot(nibbles(w.q, 0), in.x[0]) + (upper_nibbles_dot(w.q, in.x[1]) >> 4);
        }
        sum = fmaf(static_cast<float>(n), w.d * in.block.scale, sum);
        if constexpr (kHasMinimum) sum = fmaf(w.m, in.block.sum_of_x, sum);
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
    __device__ static float add(const Weights& w, const Input& in, uint32_t, float sum) {
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
    using Block = BlockIQ4_NL;
    static constexpr uint32_t kPieces = 1;
    __device__ static Weights load(const Block& block, uint32_t, uint32_t, const RoundedInput&) {
        return {load_sixteen<Block>(block.qs), from_half(block.d)};
    }
};
// A group of a block.
template <>
struct Piece<WeightType::IQ4_XS> : NonLinearPiece {
    using Block = BlockIQ4_XS;
    static constexpr uint32_t kPieces = 8;
    __device__ static Weights load(const Block& block, uint32_t part, uint32_t, const RoundedInput&) {
        return {load_sixteen<Block>(block.qs + part * 16), scale_of(block, static_cast<int>(part))};
    }
};

// An eighth of a Q4_K or Q5_K block: 16 columns of two groups of 32, neighbours. Of x's two sums, over 32 columns, each
// of a pair of pieces takes one off.
struct KPiece {
    static constexpr uint32_t kColumns = 32, kPieces = 8;
    struct Input {
        Sixteen x[2];
        float scale[2], sum_of_x;
    };
    __device__ static uint32_t first_column(uint32_t piece) { return piece / 2 * 64 + piece % 2 * 16; }
    __device__ static Input input(const RoundedInput& x, uint32_t at, uint32_t part, uint32_t) {
        const RoundedBlock* const blocks = x.blocks + at / kBlock;
        return {{sixteen(x, at), sixteen(x, at + 32)}, {blocks[0].scale, blocks[1].scale}, blocks[part % 2].sum_of_x};
    }
    // The scales of both groups and the one minimum, of `head`, the block's first 16 bytes.
    struct Scales {
        float scale[2], minimum;
    };
    __device__ static Scales scales(const Words& head, uint32_t part) {
        const auto [scales, minima] = group_pair(head, part / 2 * 2);
        const float d = from_half(static_cast<half_bits>(head.word[0]));
        const float dmin = from_half(static_cast<half_bits>(head.word[0] >> 16));
        return {{d * static_cast<float>(scales & 255), d * static_cast<float>(scales >> 8)},
                dmin * static_cast<float>(minima >> part % 2 * 8 & 255)};
    }
};

template <>
struct Piece<WeightType::Q4_K> : KPiece {
    using Block = BlockQ4_K;
    struct Weights {
        Words head, q;
    };
    __device__ static Weights load(const Block& block, uint32_t part, uint32_t, const RoundedInput&) {
        return {load_constant_words(&block), load_constant_words(block.qs + part * 16)};
    }
    __device__ static float add(const Weights& w, const Input& in, uint32_t part, float sum) {
        const Scales s = scales(w.head, part);
        sum = fmaf(static_cast<float>(dot(nibbles(w.q, 0), in.x[0])), s.scale[0] * in.scale[0], sum);
        sum = fmaf(static_cast<float>(upper_nibbles_dot(w.q, in.x[1])), s.scale[1] * (in.scale[1] / 16), sum);
        return fmaf(-s.minimum, in.sum_of_x, sum);
    }
};

template <>
struct Piece<WeightType::Q5_K> : KPiece {
    using Block = BlockQ5_K;
    struct Weights {
        Words head, q, high;
    };
    __device__ static Weights load(const Block& block, uint32_t part, uint32_t, const RoundedInput&) {
        return {load_constant_words(&block), load_constant_words(block.qs + part * 16),
                load_constant_words(block.qh + part % 2 * 16)};
    }
    __device__ static float add(const Weights& w, const Input& in, uint32_t part, float sum) {
        const Scales s = scales(w.head, part);
        const int first = static_cast<int>(part / 2 * 2);
        for (int i = 0; i < 2; ++i) {
            Words q = nibbles(w.q, i);
            put_high(q, w.high, first + i, 4, 0x10101010);
            sum = fmaf(static_cast<float>(dot(q, in.x[i])), s.scale[i] * in.scale[i], sum);
        }
        return fmaf(-s.minimum, in.sum_of_x, sum);
    }
};

// A quarter of a Q2_K, Q3_K or Q6_K block: 16 columns of four groups of 32, each with a scale of its own.
struct QuarterPiece {
    static constexpr uint32_t kColumns = 64, kPieces = 4;
    struct Input {
        Sixteen x[4];
        float scale[4];
        int sum[4];
    };
    __device__ static uint32_t first_column(uint32_t piece) { return piece / 2 * 128 + piece % 2 * 16; }
    __device__ static Input input(const RoundedInput& x, uint32_t at, uint32_t part, uint32_t) {
        Input in;
        for (int i = 0; i < 4; ++i) {
            in.x[i] = sixteen(x, at + i * 32);
            const RoundedBlock block = block_of(x, at + i * 32);
            in.scale[i] = block.scale;
            in.sum[i] = part % 2 == 0 ? block.first_sum : block.sum - block.first_sum;
        }
        return in;
    }
};

template <>
struct Piece<WeightType::Q2_K> : QuarterPiece {
    using Block = BlockQ2_K;
    struct Weights {
        Words q;
        uint32_t scales[2];  // and minima; every other byte is this piece's
        uint32_t d;          // and dmin
    };
    __device__ static Weights load(const Block& block, uint32_t part, uint32_t, const RoundedInput&) {
        const uint32_t half = part / 2;
        return {load_sixteen<Block>(block.qs + half * 32 + part % 2 * 16),
                {load_four<Block>(block.scales + half * 8), load_four<Block>(block.scales + half * 8 + 4)},
                load_four<Block>(&block.d)};
    }
    __device__ static float add(const Weights& w, const Input& in, uint32_t part, float sum) {
        const float d = from_half(static_cast<half_bits>(w.d)), dmin = from_half(static_cast<half_bits>(w.d >> 16));
        for (int i = 0; i < 4; ++i) {
            const uint32_t group = w.scales[i / 2] >> (i % 2 * 16 + part % 2 * 8);
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
    using Block = BlockQ3_K;
    struct Weights {
        Words q, high, tail;  // the last two bytes of qs, the scales, d
    };
    __device__ static Weights load(const Block& block, uint32_t part, uint32_t, const RoundedInput&) {
        return {load_sixteen<Block>(block.qs + part / 2 * 32 + part % 2 * 16),
                load_sixteen<Block>(block.hmask + part % 2 * 16), load_sixteen<Block>(&block.qs[sizeof(block.qs) - 2])};
    }
    __device__ static float add(const Weights& w, const Input& in, uint32_t part, float sum) {
        const int half = static_cast<int>(part / 2);
        const float d = from_half(static_cast<half_bits>(w.tail.word[3] >> 16));
        const auto scales = [&](int word) { return w.tail.word[word] >> 16 | w.tail.word[word + 1] << 16; };
        const int by = static_cast<int>(part % 2) * 8 + half * 4;
        for (int i = 0; i < 4; ++i) {
            Words q = bits_of(w.q, i * 2, 0x03030303);
            put_high(q, w.high, half * 4 + i, 2, 0x04040404);
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
    using Block = BlockQ6_K;
    struct Weights {
        Words low[2], high;
        int scale[4];
        float d;
    };
    __device__ static Weights load(const Block& block, uint32_t part, uint32_t, const RoundedInput&) {
        const uint8_t* low = block.ql + part / 2 * 64 + part % 2 * 16;
        const int8_t* scales = block.scales + part / 2 * 8 + part % 2;
        return {{load_sixteen<Block>(low), load_sixteen<Block>(low + 32)},
                load_sixteen<Block>(block.qh + part / 2 * 32 + part % 2 * 16),
                {scales[0], scales[2], scales[4], scales[6]},
                from_half(block.d)};
    }
    __device__ static float add(const Weights& w, const Input& in, uint32_t, float sum) {
        for (int i = 0; i < 4; ++i) {
            Words q = nibbles(w.low[i % 2], i / 2);
            put_high(q, w.high, i * 2, 4, 0x30303030);
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
    static constexpr uint32_t kColumns = 8, kPieces = 1;
    struct Block {
        Element elements[kColumns];
    };
    struct Weights {
        Words elements;
    };
    struct Input {
        float x[kColumns];
    };
    __device__ static uint32_t first_column(uint32_t piece) { return piece * kColumns; }
    // A row's last piece may lack columns: their weights and x are 0.
    __device__ static Weights load(const Block& block, uint32_t, uint32_t column, const PlainInput& in) {
        if (in.aligned_w) return {load_constant_words(&block)};
        Weights w{};
        for (uint32_t i = 0; i < kColumns; ++i) {
            if (column + i < in.x.cols) w.elements.word[i / 2] |= uint32_t{block.elements[i].bits} << i % 2 * 16;
        }
        return w;
    }
    __device__ static Input input(const PlainInput& in, uint32_t at, uint32_t, uint32_t column) {
        const float* from = in.x.data + at;
        Input input;
        if (in.aligned_x && column + kColumns <= in.x.cols) {
            for (int i = 0; i < 2; ++i) {
                const Words words = load_words(from + i * 4);
                for (int j = 0; j < 4; ++j) input.x[i * 4 + j] = float_of_bits(words.word[j]);
            }
        } else {
            for (uint32_t i = 0; i < kColumns; ++i) input.x[i] = column + i < in.x.cols ? from[i] : 0.0f;
        }
        return input;
    }
    __device__ static float add(const Weights& w, const Input& in, uint32_t, float sum) {
        for (uint32_t i = 0; i < kColumns; ++i) {
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

__device__ __forceinline__ uint32_t columns(const RoundedInput& x) { return static_cast<uint32_t>(x.cols); }
__device__ __forceinline__ uint32_t columns(const PlainInput& x) { return static_cast<uint32_t>(x.x.cols); }
// Between rows of x.
__device__ __forceinline__ uint32_t stride(const RoundedInput& x) { return static_cast<uint32_t>(x.cols); }
__device__ __forceinline__ uint32_t stride(const PlainInput& x) { return static_cast<uint32_t>(x.x.stride); }

}  // namespace yivl::cuda
