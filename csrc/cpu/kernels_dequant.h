// Dequantising, written once over a vector type: a block's integers are unpacked to bytes, then scaled. Included as
// kernels_body.h is, and needs besides the names listed there:
//
//   half_to_float(h)                                       one number
//   from_i8(p), from_half(p), from_bfloat(p)               kLanes numbers at p, as floats; p need not be aligned
//   dequantize_row                                         for what is not worth a fast path

namespace {

// dst[0..n) = scale * q, and with a minimum: scale * q - minimum. n is a multiple of 16. Products of the file's scales
// and integers are exact in float32, so the result is the same fused or not.
inline void scale_bytes(float* dst, const int8_t* q, float scale, int n) {
    for (int i = 0; i < n; i += kLanes) store(dst + i, mul(from_i8(q + i), set1(scale)));
}
inline void scale_bytes(float* dst, const int8_t* q, float scale, float minimum, int n) {
    for (int i = 0; i < n; i += kLanes) store(dst + i, sub(mul(from_i8(q + i), set1(scale)), set1(minimum)));
}

inline void unpack(float* dst, const BlockQ4_0& b) {
    int8_t q[kBlock];
    for (int i = 0; i < kBlock / 2; ++i) {
        q[i] = static_cast<int8_t>((b.qs[i] & 15) - 8);
        q[i + kBlock / 2] = static_cast<int8_t>((b.qs[i] >> 4) - 8);
    }
    scale_bytes(dst, q, half_to_float(b.d), kBlock);
}

inline void unpack(float* dst, const BlockQ8_0& b) { scale_bytes(dst, b.qs, half_to_float(b.d), kBlock); }

// Scales and minima, six bits each, of the 8 groups of a Q4_K or Q5_K block.
inline void scales_and_minima(const uint8_t* packed, uint8_t* scales, uint8_t* minima) {
    uint32_t w[3];
    __builtin_memcpy(w, packed, sizeof(w));
    const uint32_t s[2] = {w[0] & 0x3f3f3f3f, (w[2] & 0x0f0f0f0f) | ((w[0] >> 6 & 0x03030303) << 4)};
    const uint32_t m[2] = {w[1] & 0x3f3f3f3f, (w[2] >> 4 & 0x0f0f0f0f) | ((w[1] >> 6 & 0x03030303) << 4)};
    __builtin_memcpy(scales, s, sizeof(s));
    __builtin_memcpy(minima, m, sizeof(m));
}

template <class Block>
inline void scale_groups(float* dst, const int8_t* q, const Block& b) {
    uint8_t scales[8], minima[8];
    scales_and_minima(b.scales, scales, minima);
    const float d = half_to_float(b.d), dmin = half_to_float(b.dmin);
    for (int g = 0; g < 8; ++g) {
        scale_bytes(dst + g * 32, q + g * 32, d * static_cast<float>(scales[g]), dmin * static_cast<float>(minima[g]),
                    32);
    }
}

inline void unpack(float* dst, const BlockQ4_K& b) {
    int8_t q[kSuperBlock];
    for (int g = 0; g < 4; ++g) {
        for (int i = 0; i < 32; ++i) {
            const uint8_t byte = b.qs[g * 32 + i];
            q[g * 64 + i] = static_cast<int8_t>(byte & 15);
            q[g * 64 + 32 + i] = static_cast<int8_t>(byte >> 4);
        }
    }
    scale_groups(dst, q, b);
}

inline void unpack(float* dst, const BlockQ5_K& b) {
    int8_t q[kSuperBlock];
    for (int g = 0; g < 4; ++g) {
        for (int i = 0; i < 32; ++i) {
            const uint8_t byte = b.qs[g * 32 + i], high = static_cast<uint8_t>(b.qh[i] >> (2 * g));
            q[g * 64 + i] = static_cast<int8_t>((byte & 15) | (high & 1) << 4);
            q[g * 64 + 32 + i] = static_cast<int8_t>((byte >> 4) | (high & 2) << 3);
        }
    }
    scale_groups(dst, q, b);
}

inline void unpack(float* dst, const BlockQ6_K& b) {
    int8_t q[kSuperBlock];
    for (int half = 0; half < 2; ++half) {
        const uint8_t* ql = b.ql + half * 64;
        const uint8_t* qh = b.qh + half * 32;
        int8_t* to = q + half * 128;
        for (int i = 0; i < 32; ++i) {
            to[i] = static_cast<int8_t>(((ql[i] & 15) | (qh[i] & 3) << 4) - 32);
            to[i + 32] = static_cast<int8_t>(((ql[i + 32] & 15) | (qh[i] >> 2 & 3) << 4) - 32);
            to[i + 64] = static_cast<int8_t>(((ql[i] >> 4) | (qh[i] >> 4 & 3) << 4) - 32);
            to[i + 96] = static_cast<int8_t>(((ql[i + 32] >> 4) | (qh[i] >> 6) << 4) - 32);
        }
    }
    const float d = half_to_float(b.d);
    for (int g = 0; g < 16; ++g) scale_bytes(dst + g * 16, q + g * 16, d * static_cast<float>(b.scales[g]), 16);
}

template <class Block, int kWeights>
void unpack_blocks(float* dst, const std::byte* src, int64_t n) {
    const Block* blocks = reinterpret_cast<const Block*>(src);
    for (int64_t i = 0; i < n / kWeights; ++i) unpack(dst + i * kWeights, blocks[i]);
}

void unpack_halves(WeightType type, const std::byte* src, float* dst, int64_t n) {
    int64_t i = 0;
    if (type == WeightType::F16) {
        for (; i + kLanes <= n; i += kLanes) store(dst + i, from_half(src + i * 2));
    } else {
        for (; i + kLanes <= n; i += kLanes) store(dst + i, from_bfloat(src + i * 2));
    }
    if (i < n) dequantize_row(type, src + i * 2, dst + i, n - i);
}

void dequantize(WeightType type, const std::byte* src, float* dst, int64_t n) {
    // All blocks have even sizes; nobody writes a tensor at an odd address, but a file may claim so.
    if (reinterpret_cast<uintptr_t>(src) % alignof(half_bits) != 0) return dequantize_row(type, src, dst, n);
    switch (type) {
        case WeightType::F16:
        case WeightType::BF16: return unpack_halves(type, src, dst, n);
        case WeightType::Q8_0: return unpack_blocks<BlockQ8_0, kBlock>(dst, src, n);
        case WeightType::Q4_0: return unpack_blocks<BlockQ4_0, kBlock>(dst, src, n);
        case WeightType::Q4_K: return unpack_blocks<BlockQ4_K, kSuperBlock>(dst, src, n);
        case WeightType::Q5_K: return unpack_blocks<BlockQ5_K, kSuperBlock>(dst, src, n);
        case WeightType::Q6_K: return unpack_blocks<BlockQ6_K, kSuperBlock>(dst, src, n);
        default: return dequantize_row(type, src, dst, n);
    }
}

}  // namespace
