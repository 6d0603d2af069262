// The quantisers, written once over a vector type. Each quantizers_<isa>.cpp includes this file inside its own
// namespace and target region, after these definitions:
//
//   F                        a vector of kLanes floats, with the operators + - * /
//   set1(s) load(p) store(p, v) abs(v)
//   above(a, b, x, y)        a > b ? x : y per lane
//   max(a, b), min(a, b)     b where a and b are equal
//
// A group is the weights that share a scale. Sixteen groups are handled side by side, one per lane: value i of group g
// is x[i][g]. Every decision is one lane's own.
//
// What is minimised is the weighted squared error, sum w (x - x')^2, w being the importance. A search tries scales in
// the form in which they will be stored, so that what it compares is the error that the file will have.
//
// No include guard, and no includes but its parts: standard headers must not be compiled inside a target region.

#include "quantize/groups_body.h"
#include "quantize/super_blocks_body.h"
#include "quantize/types_body.h"

namespace {

// ---- blocks of 32 with a scale of their own ----

template <class Type>
void quantize_scaled(const QuantizeSource& source, int64_t begin, int64_t end, std::byte* dst) {
    using Grid = typename Type::Grid;
    using Block = typename Type::Block;
    Groups<kBlock> g = {};
    Indices<kBlock> indices;
    alignas(64) float scale[kBatch];
    half_bits bits[kBatch];
    for (; begin < end; begin += kBatch) {
        const int n = end - begin < kBatch ? static_cast<int>(end - begin) : kBatch;
        for (int i = 0; i < n; ++i) fill(g, i, source, begin + i, kBlock);
        for (int lane = 0; lane < kBatch; lane += kLanes) store(scale + lane, fit_scale<Type>(g, lane));
        for (int i = 0; i < n; ++i) {
            const StoredHalf d = stored_half(scale[i], g.shrink[i]);
            scale[i] = d.value;
            bits[i] = d.bits;
        }
        indices_of_scale<Grid>(g, scale, indices);
        for (int i = 0; i < n; ++i, dst += sizeof(Block)) {
            Block block;
            block.d = bits[i];
            Type::pack(block, indices.q[i]);
            __builtin_memcpy(dst, &block, sizeof(block));
        }
    }
}

template <class Type>
void quantize_affine(const QuantizeSource& source, int64_t begin, int64_t end, std::byte* dst) {
    using Block = typename Type::Block;
    Groups<kBlock> g = {};
    Indices<kBlock> indices;
    alignas(64) float scale[kBatch], minimum[kBatch];
    half_bits d[kBatch], m[kBatch];
    for (; begin < end; begin += kBatch) {
        const int n = end - begin < kBatch ? static_cast<int>(end - begin) : kBatch;
        for (int i = 0; i < n; ++i) fill(g, i, source, begin + i, kBlock);
        for (int lane = 0; lane < kBatch; lane += kLanes) {
            const Affine fit = fit_affine<Type>(g, lane);
            store(scale + lane, fit.scale);
            store(minimum + lane, fit.minimum);
        }
        for (int i = 0; i < n; ++i) {
            const StoredHalf s = stored_half(scale[i], g.shrink[i]), low = stored_half(-minimum[i], g.shrink[i]);
            scale[i] = s.value;
            minimum[i] = -low.value;
            d[i] = s.bits;
            m[i] = low.bits;
        }
        indices_of_affine<Type::kTop>(g, scale, minimum, indices);
        for (int i = 0; i < n; ++i, dst += sizeof(Block)) {
            Block block;
            block.d = d[i];
            block.m = m[i];
            Type::pack(block, indices.q[i]);
            __builtin_memcpy(dst, &block, sizeof(block));
        }
    }
}

// ---- without a search: the bytes that every other program makes of these types ----

// Bits of the largest magnitude of a block.
inline float largest_magnitude(const float* x) {
    uint32_t largest = 0;
    for (int i = 0; i < kBlock; ++i) {
        const uint32_t magnitude = __builtin_bit_cast(uint32_t, x[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    return __builtin_bit_cast(float, largest);
}

// Where a half would be infinite, the largest half; 1 / d, or 0 where that is infinite.
inline float limited(float d) { return d >= 65520.0f ? kHalfMax : d <= -65520.0f ? -kHalfMax : d; }
inline float finite_inverse(float d) { return __builtin_fabsf(d) > 1e-38f ? 1.0f / d : 0.0f; }

void quantize_q8_0(const QuantizeSource& source, int64_t begin, int64_t end, std::byte* dst) {
    for (; begin < end; ++begin, dst += sizeof(BlockQ8_0)) {
        const float* x = source.values + begin * kBlock;
        const float d = limited(largest_magnitude(x) / 127.0f), inv = finite_inverse(d);
        BlockQ8_0 block;
        block.d = half_from_float(d);
        alignas(64) float q[kBlock];
        for (int i = 0; i < kBlock; i += kLanes) {
            const F t = load(x + i) * set1(inv);
            const F magnitude = min(abs(t), set1(127.0f));
            // Halves are rounded away from zero; the largest float below a half tells them.
            const F even = round(magnitude);
            const F away = even + above(magnitude - even, set1(0x1.fffffep-2f), set1(1.0f), zero());
            store(q + i, above(zero(), t, zero() - away, away));
        }
        for (int i = 0; i < kBlock; ++i) block.qs[i] = static_cast<int8_t>(static_cast<int>(q[i]));
        __builtin_memcpy(dst, &block, sizeof(block));
    }
}

void quantize_plain_q4_0(const QuantizeSource& source, int64_t begin, int64_t end, std::byte* dst) {
    for (; begin < end; ++begin, dst += sizeof(BlockQ4_0)) {
        const float* x = source.values + begin * kBlock;
        const float largest = largest_magnitude(x);
        int i = 0;
        while (__builtin_fabsf(x[i]) != largest) ++i;
        const float d = limited(x[i] / -8.0f), inv = finite_inverse(d);
        BlockQ4_0 block;
        block.d = half_from_float(d);
        uint8_t q[kBlock];
        for (int j = 0; j < kBlock; ++j) {
            const float t = x[j] * inv + 8.5f;
            q[j] = static_cast<uint8_t>(static_cast<int>(t < 0.0f ? 0.0f : t > 15.0f ? 15.0f : t));
        }
        pack_nibbles(block.qs, q);
        __builtin_memcpy(dst, &block, sizeof(block));
    }
}

void copy_f32(const QuantizeSource& source, int64_t begin, int64_t end, std::byte* dst) {
    __builtin_memcpy(dst, source.values + begin, static_cast<size_t>(end - begin) * sizeof(float));
}

void round_to_f16(const QuantizeSource& source, int64_t begin, int64_t end, std::byte* dst) {
    for (int64_t i = begin; i < end; ++i) {
        const half_bits h = half_from_float(source.values[i]);
        __builtin_memcpy(dst + (i - begin) * 2, &h, 2);
    }
}

void round_to_bf16(const QuantizeSource& source, int64_t begin, int64_t end, std::byte* dst) {
    for (int64_t i = begin; i < end; ++i) {
        const uint32_t bits = __builtin_bit_cast(uint32_t, source.values[i]);
        uint32_t magnitude = bits & 0x7fffffff;
        magnitude = magnitude < 0x7f7f0000 ? magnitude : 0x7f7f0000;  // the largest, as above
        const uint32_t rounded = (magnitude + 0x7fff + (magnitude >> 16 & 1)) >> 16;
        const uint16_t b = static_cast<uint16_t>(rounded | (bits >> 16 & 0x8000));
        __builtin_memcpy(dst + (i - begin) * 2, &b, 2);
    }
}

void quantize(WeightType type, const QuantizeSource& source, int64_t begin, int64_t end, std::byte* dst) {
    switch (type) {
        case WeightType::F32: return copy_f32(source, begin, end, dst);
        case WeightType::F16: return round_to_f16(source, begin, end, dst);
        case WeightType::BF16: return round_to_bf16(source, begin, end, dst);
        case WeightType::Q8_0: return quantize_q8_0(source, begin, end, dst);
        case WeightType::Q4_0:
            return source.weighted ? quantize_scaled<Q4_0>(source, begin, end, dst)
                                   : quantize_plain_q4_0(source, begin, end, dst);
        case WeightType::Q5_0: return quantize_scaled<Q5_0>(source, begin, end, dst);
        case WeightType::IQ4_NL: return quantize_scaled<IQ4_NL>(source, begin, end, dst);
        case WeightType::Q4_1: return quantize_affine<Q4_1>(source, begin, end, dst);
        case WeightType::Q5_1: return quantize_affine<Q5_1>(source, begin, end, dst);
        case WeightType::Q2_K: return quantize_super_affine<Q2_K>(source, begin, end, dst);
        case WeightType::Q3_K: return quantize_super_scaled<Q3_K>(source, begin, end, dst);
        case WeightType::Q4_K: return quantize_super_affine<Q4_K>(source, begin, end, dst);
        case WeightType::Q5_K: return quantize_super_affine<Q5_K>(source, begin, end, dst);
        case WeightType::Q6_K: return quantize_super_scaled<Q6_K>(source, begin, end, dst);
        case WeightType::IQ4_XS: return quantize_super_scaled<IQ4_XS>(source, begin, end, dst);
    }
}

}  // namespace
