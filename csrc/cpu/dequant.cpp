#include "cpu/dequant.h"

#include <bit>
#include <cassert>
#include <cstring>

#include "half.h"

namespace yivl {

static_assert(std::endian::native == std::endian::little, "the bytes of a GGUF file are little-endian");

namespace {

// The non-linear 4-bit values of IQ4_NL and IQ4_XS, from the GGUF type's definition.
constexpr int8_t kNonLinear4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

void unpack(float* dst, const BlockQ4_0& b) {
    const float d = half_to_float(b.d);
    for (int i = 0; i < kBlock / 2; ++i) {
        dst[i] = d * static_cast<float>((b.qs[i] & 15) - 8);
        dst[i + kBlock / 2] = d * static_cast<float>((b.qs[i] >> 4) - 8);
    }
}

void unpack(float* dst, const BlockQ4_1& b) {
    const float d = half_to_float(b.d), m = half_to_float(b.m);
    for (int i = 0; i < kBlock / 2; ++i) {
        dst[i] = d * static_cast<float>(b.qs[i] & 15) + m;
        dst[i + kBlock / 2] = d * static_cast<float>(b.qs[i] >> 4) + m;
    }
}

// Value i of a 5-bit block: bits 0 to 3 from qs, bit 4 from qh.
template <class Block>
int five_bits(const Block& b, int i) {
    const int low = i < kBlock / 2 ? b.qs[i] & 15 : b.qs[i - kBlock / 2] >> 4;
    return low | ((b.qh[i / 8] >> (i % 8)) & 1) << 4;
}

void unpack(float* dst, const BlockQ5_0& b) {
    const float d = half_to_float(b.d);
    for (int i = 0; i < kBlock; ++i) dst[i] = d * static_cast<float>(five_bits(b, i) - 16);
}

void unpack(float* dst, const BlockQ5_1& b) {
    const float d = half_to_float(b.d), m = half_to_float(b.m);
    for (int i = 0; i < kBlock; ++i) dst[i] = d * static_cast<float>(five_bits(b, i)) + m;
}

void unpack(float* dst, const BlockQ8_0& b) {
    const float d = half_to_float(b.d);
    for (int i = 0; i < kBlock; ++i) dst[i] = d * static_cast<float>(b.qs[i]);
}

// 16 groups of 16; 128 values lie in 32 bytes, two bits each.
void unpack(float* dst, const BlockQ2_K& b) {
    const float d = half_to_float(b.d), dmin = half_to_float(b.dmin);
    for (int g = 0; g < 16; ++g) {
        const float scale = d * static_cast<float>(b.scales[g] & 15);
        const float minimum = dmin * static_cast<float>(b.scales[g] >> 4);
        const uint8_t* qs = b.qs + g / 8 * 32 + g % 2 * 16;
        const int shift = g % 8 / 2 * 2;
        for (int i = 0; i < 16; ++i) {
            dst[g * 16 + i] = scale * static_cast<float>((qs[i] >> shift) & 3) - minimum;
        }
    }
}

void unpack(float* dst, const BlockQ3_K& b) {
    const float d = half_to_float(b.d);
    for (int g = 0; g < 16; ++g) {
        const int low = g < 8 ? b.scales[g] & 15 : b.scales[g - 8] >> 4;
        const int high = (b.scales[8 + g % 4] >> (g / 4 * 2)) & 3;
        const float scale = d * static_cast<float>((low | high << 4) - 32);
        const uint8_t* qs = b.qs + g / 8 * 32 + g % 2 * 16;
        const uint8_t* hmask = b.hmask + g % 2 * 16;
        const int shift = g % 8 / 2 * 2;
        for (int i = 0; i < 16; ++i) {
            const int q = ((qs[i] >> shift) & 3) - ((hmask[i] >> (g / 2)) & 1 ? 0 : 4);
            dst[g * 16 + i] = scale * static_cast<float>(q);
        }
    }
}

// Scale and minimum, six bits each, of group g of 8 in a Q4_K or Q5_K block.
void scale_and_minimum(const uint8_t* scales, int g, int& scale, int& minimum) {
    if (g < 4) {
        scale = scales[g] & 63;
        minimum = scales[g + 4] & 63;
    } else {
        scale = (scales[g + 4] & 15) | (scales[g - 4] >> 6) << 4;
        minimum = (scales[g + 4] >> 4) | (scales[g] >> 6) << 4;
    }
}

void unpack(float* dst, const BlockQ4_K& b) {
    const float d = half_to_float(b.d), dmin = half_to_float(b.dmin);
    for (int g = 0; g < 8; ++g) {
        int s, m;
        scale_and_minimum(b.scales, g, s, m);
        const float scale = d * static_cast<float>(s), minimum = dmin * static_cast<float>(m);
        const uint8_t* qs = b.qs + g / 2 * 32;
        const int shift = g % 2 * 4;
        for (int i = 0; i < 32; ++i) {
            dst[g * 32 + i] = scale * static_cast<float>((qs[i] >> shift) & 15) - minimum;
        }
    }
}

void unpack(float* dst, const BlockQ5_K& b) {
    const float d = half_to_float(b.d), dmin = half_to_float(b.dmin);
    for (int g = 0; g < 8; ++g) {
        int s, m;
        scale_and_minimum(b.scales, g, s, m);
        const float scale = d * static_cast<float>(s), minimum = dmin * static_cast<float>(m);
        const uint8_t* qs = b.qs + g / 2 * 32;
        const int shift = g % 2 * 4;
        for (int i = 0; i < 32; ++i) {
            const int q = ((qs[i] >> shift) & 15) | ((b.qh[i] >> g) & 1) << 4;
            dst[g * 32 + i] = scale * static_cast<float>(q) - minimum;
        }
    }
}

void unpack(float* dst, const BlockQ6_K& b) {
    const float d = half_to_float(b.d);
    for (int g = 0; g < 8; ++g) {
        const uint8_t* ql = b.ql + g / 4 * 64 + g % 2 * 32;
        const uint8_t* qh = b.qh + g / 4 * 32;
        const int low_shift = g % 4 / 2 * 4, high_shift = g % 4 * 2;
        for (int i = 0; i < 32; ++i) {
            const float scale = d * static_cast<float>(b.scales[g * 2 + i / 16]);
            const int q = ((ql[i] >> low_shift) & 15) | ((qh[i] >> high_shift) & 3) << 4;
            dst[g * 32 + i] = scale * static_cast<float>(q - 32);
        }
    }
}

void unpack(float* dst, const BlockIQ4_NL& b) {
    const float d = half_to_float(b.d);
    for (int i = 0; i < kBlock / 2; ++i) {
        dst[i] = d * static_cast<float>(kNonLinear4[b.qs[i] & 15]);
        dst[i + kBlock / 2] = d * static_cast<float>(kNonLinear4[b.qs[i] >> 4]);
    }
}

void unpack(float* dst, const BlockIQ4_XS& b) {
    const float d = half_to_float(b.d);
    for (int g = 0; g < 8; ++g) {
        const int low = (b.scales_l[g / 2] >> (g % 2 * 4)) & 15;
        const int high = (b.scales_h >> (g * 2)) & 3;
        const float scale = d * static_cast<float>((low | high << 4) - 32);
        const uint8_t* qs = b.qs + g * 16;
        for (int i = 0; i < 16; ++i) {
            dst[g * 32 + i] = scale * static_cast<float>(kNonLinear4[qs[i] & 15]);
            dst[g * 32 + i + 16] = scale * static_cast<float>(kNonLinear4[qs[i] >> 4]);
        }
    }
}

// A file's blocks lie at even addresses, but bytes that a caller gives may lie anywhere: blocks are copied out.
template <class Block, int kWeights>
void unpack_blocks(float* dst, const std::byte* src, int64_t n) {
    assert(n % kWeights == 0);
    for (int64_t i = 0; i < n; i += kWeights, src += sizeof(Block)) {
        Block block;
        std::memcpy(&block, src, sizeof(block));
        unpack(dst + i, block);
    }
}

void unpack_half(float* dst, const std::byte* src, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        half_bits h;
        std::memcpy(&h, src + i * 2, sizeof(h));
        dst[i] = half_to_float(h);
    }
}

void unpack_bfloat(float* dst, const std::byte* src, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        uint16_t high;
        std::memcpy(&high, src + i * 2, sizeof(high));
        dst[i] = std::bit_cast<float>(static_cast<uint32_t>(high) << 16);
    }
}

}  // namespace

void dequantize_row(WeightType type, const std::byte* src, float* dst, int64_t n) {
    switch (type) {
        case WeightType::F32: std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float)); return;
        case WeightType::F16: return unpack_half(dst, src, n);
        case WeightType::BF16: return unpack_bfloat(dst, src, n);
        case WeightType::Q4_0: return unpack_blocks<BlockQ4_0, kBlock>(dst, src, n);
        case WeightType::Q4_1: return unpack_blocks<BlockQ4_1, kBlock>(dst, src, n);
        case WeightType::Q5_0: return unpack_blocks<BlockQ5_0, kBlock>(dst, src, n);
        case WeightType::Q5_1: return unpack_blocks<BlockQ5_1, kBlock>(dst, src, n);
        case WeightType::Q8_0: return unpack_blocks<BlockQ8_0, kBlock>(dst, src, n);
        case WeightType::Q2_K: return unpack_blocks<BlockQ2_K, kSuperBlock>(dst, src, n);
        case WeightType::Q3_K: return unpack_blocks<BlockQ3_K, kSuperBlock>(dst, src, n);
        case WeightType::Q4_K: return unpack_blocks<BlockQ4_K, kSuperBlock>(dst, src, n);
        case WeightType::Q5_K: return unpack_blocks<BlockQ5_K, kSuperBlock>(dst, src, n);
        case WeightType::Q6_K: return unpack_blocks<BlockQ6_K, kSuperBlock>(dst, src, n);
        case WeightType::IQ4_NL: return unpack_blocks<BlockIQ4_NL, kBlock>(dst, src, n);
        case WeightType::IQ4_XS: return unpack_blocks<BlockIQ4_XS, kSuperBlock>(dst, src, n);
    }
    assert(false);
}

}  // namespace yivl
