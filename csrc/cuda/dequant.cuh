// The value of one weight, for every type: the same numbers as csrc/cpu/dequant.cpp, where each layout is described.
#pragma once

#include "cuda/device.h"
#include "quant_blocks.h"

namespace yivl::cuda {

__device__ __forceinline__ float from_half(half_bits bits) { return to_float(Half{bits}); }

// The non-linear 4-bit values of IQ4_NL and IQ4_XS, packed as bytes.
inline constexpr uint64_t kNonLinearLow = 0xf6eaddcfbfad9881, kNonLinearHigh = 0x7159453526190d01;
__device__ __forceinline__ int non_linear(int index) {
    return static_cast<int8_t>((index < 8 ? kNonLinearLow : kNonLinearHigh) >> index % 8 * 8);
}

// Nibble i of 32 that lie as the lower and then the upper halves of 16 bytes.
__device__ __forceinline__ int nibble(const uint8_t* qs, int i) {
    return i < kBlock / 2 ? qs[i] & 15 : qs[i - kBlock / 2] >> 4;
}

__device__ __forceinline__ float value(const BlockQ4_0& b, int i) {
    return from_half(b.d) * static_cast<float>(nibble(b.qs, i) - 8);
}
__device__ __forceinline__ float value(const BlockQ4_1& b, int i) {
    return from_half(b.d) * static_cast<float>(nibble(b.qs, i)) + from_half(b.m);
}
__device__ __forceinline__ float value(const BlockQ5_0& b, int i) {
    const int q = nibble(b.qs, i) | (b.qh[i / 8] >> i % 8 & 1) << 4;
    return from_half(b.d) * static_cast<float>(q - 16);
}
__device__ __forceinline__ float value(const BlockQ5_1& b, int i) {
    const int q = nibble(b.qs, i) | (b.qh[i / 8] >> i % 8 & 1) << 4;
    return from_half(b.d) * static_cast<float>(q) + from_half(b.m);
}
__device__ __forceinline__ float value(const BlockQ8_0& b, int i) {
    return from_half(b.d) * static_cast<float>(b.qs[i]);
}

// The two low bits of weight i of a Q2_K or Q3_K block.
__device__ __forceinline__ int two_bits(const uint8_t* qs, int i) {
    return qs[i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3;
}

__device__ __forceinline__ float value(const BlockQ2_K& b, int i) {
    const int group = b.scales[i / 16];
    const float scale = from_half(b.d) * static_cast<float>(group & 15);
    const float minimum = from_half(b.dmin) * static_cast<float>(group >> 4);
    return scale * static_cast<float>(two_bits(b.qs, i)) - minimum;
}
__device__ __forceinline__ float value(const BlockQ3_K& b, int i) {
    const int g = i / 16;
    const int low = g < 8 ? b.scales[g] & 15 : b.scales[g - 8] >> 4;
    const int high = b.scales[8 + g % 4] >> g / 4 * 2 & 3;
    const float scale = from_half(b.d) * static_cast<float>((low | high << 4) - 32);
    const int q = two_bits(b.qs, i) - (b.hmask[i % 32] >> i / 32 & 1 ? 0 : 4);
    return scale * static_cast<float>(q);
}

// Of a Q4_K or Q5_K block's groups of 32 weights, two neighbours, the first of an even number: their integers, a byte
// each. `head`: the block's first 16 bytes.
struct GroupPair {
    uint32_t scales, minima;
};
__device__ __forceinline__ GroupPair group_pair(const Words& head, uint32_t first) {
    // Without branches, for lanes that differ: of groups 4 to 7 the lower four bits are elsewhere, and the upper two
    // above those of the others.
    const bool upper = first >= 4;
    const uint32_t by = first % 4 * 8, low_bits = upper ? 0x0f0f : 0x3f3f, high_bits = upper ? 0x3030 : 0;
    const uint32_t scales = upper ? head.word[3] : head.word[1], minima = upper ? head.word[3] >> 4 : head.word[2];
    return {(scales >> by & low_bits) | (head.word[1] >> (by + 2) & high_bits),
            (minima >> by & low_bits) | (head.word[2] >> (by + 2) & high_bits)};
}
// Group g: scale * q - minimum.
struct Group {
    float scale, minimum;
};
__device__ __forceinline__ Group group_of(const Words& head, int g) {
    const GroupPair pair = group_pair(head, static_cast<uint32_t>(g) / 2 * 2);
    return {from_half(static_cast<half_bits>(head.word[0])) * static_cast<float>(pair.scales >> g % 2 * 8 & 255),
            from_half(static_cast<half_bits>(head.word[0] >> 16)) * static_cast<float>(pair.minima >> g % 2 * 8 & 255)};
}
// Such blocks lie at multiples of 16.
template <class Block>
__device__ __forceinline__ float scaled(const Block& b, int g, int q) {
    const Group group = group_of(reinterpret_cast<const Words&>(b), g);
    return group.scale * static_cast<float>(q) - group.minimum;
}

__device__ __forceinline__ float value(const BlockQ4_K& b, int i) {
    const int g = i / 32;
    return scaled(b, g, b.qs[g / 2 * 32 + i % 32] >> g % 2 * 4 & 15);
}
__device__ __forceinline__ float value(const BlockQ5_K& b, int i) {
    const int g = i / 32;
    return scaled(b, g, (b.qs[g / 2 * 32 + i % 32] >> g % 2 * 4 & 15) | (b.qh[i % 32] >> g & 1) << 4);
}
__device__ __forceinline__ float value(const BlockQ6_K& b, int i) {
    const int g = i / 32;
    const int low = b.ql[g / 4 * 64 + g % 2 * 32 + i % 32] >> g % 4 / 2 * 4 & 15;
    const int high = b.qh[g / 4 * 32 + i % 32] >> g % 4 * 2 & 3;
    const float scale = from_half(b.d) * static_cast<float>(b.scales[i / 16]);
    return scale * static_cast<float>((low | high << 4) - 32);
}
__device__ __forceinline__ float value(const BlockIQ4_NL& b, int i) {
    return from_half(b.d) * static_cast<float>(non_linear(nibble(b.qs, i)));
}
// Of group g of 32 weights.
__device__ __forceinline__ float scale_of(const BlockIQ4_XS& b, int g) {
    const int low = b.scales_l[g / 2] >> g % 2 * 4 & 15;
    const int high = b.scales_h >> g * 2 & 3;
    return from_half(b.d) * static_cast<float>((low | high << 4) - 32);
}
__device__ __forceinline__ float value(const BlockIQ4_XS& b, int i) {
    const int g = i / 32;
    return scale_of(b, g) * static_cast<float>(non_linear(nibble(b.qs + g * 16, i % 32)));
}

// Block, and weights in it, of a type.
template <WeightType>
struct BlockOf;
#define YIVL_BLOCK(type, struct_type, weights)   \
    template <>                                  \
    struct BlockOf<WeightType::type> {           \
        using Block = struct_type;               \
        static constexpr int kWeights = weights; \
    };
YIVL_BLOCK(F16, Half, 1)
YIVL_BLOCK(BF16, Bfloat, 1)
YIVL_BLOCK(Q4_0, BlockQ4_0, kBlock)
YIVL_BLOCK(Q4_1, BlockQ4_1, kBlock)
YIVL_BLOCK(Q5_0, BlockQ5_0, kBlock)
YIVL_BLOCK(Q5_1, BlockQ5_1, kBlock)
YIVL_BLOCK(Q8_0, BlockQ8_0, kBlock)
YIVL_BLOCK(Q2_K, BlockQ2_K, kSuperBlock)
YIVL_BLOCK(Q3_K, BlockQ3_K, kSuperBlock)
YIVL_BLOCK(Q4_K, BlockQ4_K, kSuperBlock)
YIVL_BLOCK(Q5_K, BlockQ5_K, kSuperBlock)
YIVL_BLOCK(Q6_K, BlockQ6_K, kSuperBlock)
YIVL_BLOCK(IQ4_NL, BlockIQ4_NL, kBlock)
YIVL_BLOCK(IQ4_XS, BlockIQ4_XS, kSuperBlock)
#undef YIVL_BLOCK

// Weight `i` of a row.
template <WeightType kType>
__device__ __forceinline__ float weight_value(const std::byte* row, int64_t i) {
    if constexpr (kType == WeightType::F32) {
        return reinterpret_cast<const float*>(row)[i];
    } else if constexpr (kType == WeightType::F16) {
        return to_float(reinterpret_cast<const Half*>(row)[i]);
    } else if constexpr (kType == WeightType::BF16) {
        return to_float(reinterpret_cast<const Bfloat*>(row)[i]);
    } else {
        using Blocks = BlockOf<kType>;
        return value(reinterpret_cast<const typename Blocks::Block*>(row)[i / Blocks::kWeights],
                     static_cast<int>(i % Blocks::kWeights));
    }
}

// fn.template operator()<type>() for the type of a matrix: from a number of the file to a kernel of its own.
template <class Fn>
void with_type(WeightType type, Fn&& fn) {
    switch (type) {
        case WeightType::F32: return fn.template operator()<WeightType::F32>();
        case WeightType::F16: return fn.template operator()<WeightType::F16>();
        case WeightType::BF16: return fn.template operator()<WeightType::BF16>();
        case WeightType::Q4_0: return fn.template operator()<WeightType::Q4_0>();
        case WeightType::Q4_1: return fn.template operator()<WeightType::Q4_1>();
        case WeightType::Q5_0: return fn.template operator()<WeightType::Q5_0>();
        case WeightType::Q5_1: return fn.template operator()<WeightType::Q5_1>();
        case WeightType::Q8_0: return fn.template operator()<WeightType::Q8_0>();
        case WeightType::Q2_K: return fn.template operator()<WeightType::Q2_K>();
        case WeightType::Q3_K: return fn.template operator()<WeightType::Q3_K>();
        case WeightType::Q4_K: return fn.template operator()<WeightType::Q4_K>();
        case WeightType::Q5_K: return fn.template operator()<WeightType::Q5_K>();
        case WeightType::Q6_K: return fn.template operator()<WeightType::Q6_K>();
        case WeightType::IQ4_NL: return fn.template operator()<WeightType::IQ4_NL>();
        case WeightType::IQ4_XS: return fn.template operator()<WeightType::IQ4_XS>();
    }
}

}  // namespace yivl::cuda
