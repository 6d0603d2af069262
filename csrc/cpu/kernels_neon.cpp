// The kernels with NEON, which every 64-bit ARM CPU has, so that no target region is needed. Products of integers come
// in three variants: with 16-bit integers, and with the instructions for 8-bit ones that ARMv8.2 and later CPUs may
// have.
#include "cpu/isa.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include "cpu/dequant.h"
#include "cpu/kernels.h"
#include "cpu/target_region.h"

#define YIVL_TARGET_LAMBDA

namespace yivl::neon {

namespace {

typedef float32x4_t F;

constexpr int kLanes = 4;
constexpr int kTileRows = 6, kTileVectors = 4;
constexpr int kKeyBlock = 128;

inline F zero() { return vdupq_n_f32(0.0f); }
inline F load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, F v) { vst1q_f32(p, v); }
inline F load_n(const float* p, int64_t n) {
    F v = vsetq_lane_f32(p[0], zero(), 0);
    if (n > 1) v = vld1q_lane_f32(p + 1, v, 1);
    if (n > 2) v = vld1q_lane_f32(p + 2, v, 2);
    return v;
}
inline void store_n(float* p, F v, int64_t n) {
    vst1q_lane_f32(p, v, 0);
    if (n > 1) vst1q_lane_f32(p + 1, v, 1);
    if (n > 2) vst1q_lane_f32(p + 2, v, 2);
}

// A number in every lane. It is copied to the lanes only where it must be: fma takes it as it is.
struct Same {
    float number;
    operator F() const { return vdupq_n_f32(number); }
};
inline Same set1(float s) { return {s}; }

inline F add(F a, F b) { return vaddq_f32(a, b); }
inline F sub(F a, F b) { return vsubq_f32(a, b); }
inline F mul(F a, F b) { return vmulq_f32(a, b); }
inline F div(F a, F b) { return vdivq_f32(a, b); }
inline F max(F a, F b) { return vmaxq_f32(a, b); }
inline F min(F a, F b) { return vminq_f32(a, b); }
inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
// Left to itself, GCC would copy the number to all lanes first, which takes one of the units that multiply.
YIVL_INLINE F fma(Same a, F b, F c) {
    asm("fmla %0.4s, %1.4s, %2.s[0]" : "+w"(c) : "w"(b), "w"(a.number));
    return c;
}
inline F abs(F v) { return vabsq_f32(v); }
inline F below(F a, F b, F x, F y) { return vbslq_f32(vcltq_f32(a, b), x, y); }
inline F round(F v) { return vrndnq_f32(v); }
inline F scale(F v, F n) {
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(v), vshlq_n_s32(vcvtnq_s32_f32(n), 23)));
}

inline float sum(F v) { return vaddvq_f32(v); }
inline float largest(F v) { return vmaxvq_f32(v); }
// Pairs, then the halves of the vectors.
YIVL_INLINE void transpose(F (&r)[4]) {
    const auto two = [](F v) YIVL_INLINE_LAMBDA { return vreinterpretq_f64_f32(v); };
    const auto four = [](float64x2_t v) YIVL_INLINE_LAMBDA { return vreinterpretq_f32_f64(v); };
    const float64x2_t ab_even = two(vtrn1q_f32(r[0], r[1])), ab_odd = two(vtrn2q_f32(r[0], r[1]));
    const float64x2_t cd_even = two(vtrn1q_f32(r[2], r[3])), cd_odd = two(vtrn2q_f32(r[2], r[3]));
    r[0] = four(vtrn1q_f64(ab_even, cd_even));
    r[1] = four(vtrn1q_f64(ab_odd, cd_odd));
    r[2] = four(vtrn2q_f64(ab_even, cd_even));
    r[3] = four(vtrn2q_f64(ab_odd, cd_odd));
}

inline uint16x4_t four_halves(const std::byte* p) {
    uint16x4_t v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
}
inline F from_half(const std::byte* p) { return vcvt_f32_f16(vreinterpret_f16_u16(four_halves(p))); }
inline F from_bfloat(const std::byte* p) { return vreinterpretq_f32_u32(vshll_n_u16(four_halves(p), 16)); }

// Left to itself, GCC finds that a function which only prefetches does nothing, and drops the calls.
YIVL_INLINE void prefetch(const std::byte* p) { __builtin_prefetch(p); }
YIVL_INLINE void prefetch_far(const std::byte* p) { __builtin_prefetch(p, 0, 2); }

// ---- integers ----
//
// Of bytes that dwords() brings together, bytes 0 and 1 of all lanes come first, then bytes 2 and 3: so one instruction
// multiplies the first halves of all lanes, and one the second.

typedef int32x4_t I;

constexpr int kIntegerTokens = 4;
constexpr bool kSumsOfPairs = false;

inline int16x8_t halves_of(I v) { return vreinterpretq_s16_s32(v); }
inline uint16x8_t unsigned_halves_of(I v) { return vreinterpretq_u16_s32(v); }
inline I lanes_of(int16x8_t v) { return vreinterpretq_s32_s16(v); }
inline I lanes_of(uint16x8_t v) { return vreinterpretq_s32_u16(v); }

inline I load_integers(const I* p) { return *p; }
inline void store_integers(I* p, I v) { *p = v; }
inline I integers(int32_t n) { return vdupq_n_s32(n); }
inline I no_integers() { return integers(0); }
inline I add_integers(I a, I b) { return vaddq_s32(a, b); }
inline I times_integers(I a, I b) { return vmulq_s32(a, b); }
inline I negative(I v) { return vnegq_s32(v); }
template <int n>
inline I up32(I v) {
    return vshlq_n_s32(v, n);
}
template <int n>
inline I down32(I v) {
    return n == 0 ? v : vshrq_n_s32(v, n == 0 ? 1 : n);
}
inline F to_floats(I v) { return vcvtq_f32_s32(v); }

// In the first lane, and zero in the others: multiply_pairs takes no more. GCC knows of no way without copying, and
// takes the numbers that an element can be of from few registers.
YIVL_INLINE I pair(const int16_t* p) {
    struct Pair {
        int16_t n[2];
    };
    I both;
    asm("ldr %s0, %1" : "=x"(both) : "m"(*reinterpret_cast<const Pair*>(p)));
    return both;
}
inline I multiply_pairs(I sums, I a, I b) {
    sums = vmlal_laneq_s16(sums, vget_low_s16(halves_of(a)), halves_of(b), 0);
    return vmlal_high_laneq_s16(sums, halves_of(a), halves_of(b), 1);
}
constexpr bool kFours = false;
inline I multiply_at(I sums, I a, const int16_t* p) { return multiply_pairs(sums, a, pair(p)); }
inline I low_bits(I v, int n) { return lanes_of(vandq_s16(halves_of(v), vdupq_n_s16(static_cast<int16_t>(n)))); }
inline I flip_bits(I v, int n) { return lanes_of(veorq_s16(halves_of(v), vdupq_n_s16(static_cast<int16_t>(n)))); }
inline I any_bits(I a, I b) { return vorrq_s32(a, b); }
template <int n>
inline I down(I v) {
    return n == 0 ? v : lanes_of(vshrq_n_u16(unsigned_halves_of(v), n == 0 ? 1 : n));
}
template <int n>
inline I up(I v) {
    return lanes_of(vshlq_n_u16(unsigned_halves_of(v), n));
}
template <int n>
inline I signed_down(I v) {
    return lanes_of(vshrq_n_s16(halves_of(v), n));
}
inline I less(I v, int n) { return lanes_of(vsubq_s16(halves_of(v), vdupq_n_s16(static_cast<int16_t>(n)))); }
inline I plus(I a, I b) { return lanes_of(vaddq_s16(halves_of(a), halves_of(b))); }
inline I times(I a, I b) { return lanes_of(vmulq_s16(halves_of(a), halves_of(b))); }
// Half n of each lane.
template <int n>
inline int16x4_t half(I v) {
    return n == 0 ? vget_low_s16(halves_of(v)) : vget_high_s16(halves_of(v));
}
template <int n>
inline I byte(I v) {
    return vandq_s32(vmovl_s16(half<n / 2>(down<n % 2 * 8>(v))), integers(0xff));
}
template <int n>
inline int16x4_t signed_half(I v) {
    const int16x4_t both = half<n / 2>(v);
    return vshr_n_s16(n % 2 == 0 ? vshl_n_s16(both, 8) : both, 8);
}
template <int n>
inline I signed_byte(I v) {
    return vmovl_s16(signed_half<n>(v));
}
template <int n>
inline I spread_byte(I v) {
    return lanes_of(vcombine_s16(signed_half<n>(v), signed_half<n>(v)));
}
template <int n>
inline F half_of_lane(I v) {
    return vcvt_f32_f16(vreinterpret_f16_s16(half<n>(v)));
}
inline I low_and_high(I a, I b) {
    return lanes_of(vcombine_s16(vget_low_s16(halves_of(a)), vget_high_s16(halves_of(b))));
}

// 16 bytes of each of four rows.
struct FourRows {
    I a, b, c, d;

    YIVL_INLINE FourRows(const std::byte* p, int64_t stride) {
        const auto row = [=](int64_t r) YIVL_INLINE_LAMBDA {
            return vreinterpretq_s32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(p + r * stride)));
        };
        a = row(0);
        b = row(1);
        c = row(2);
        d = row(3);
    }
};

inline int64x2_t eights(I v) { return vreinterpretq_s64_s32(v); }
inline I fours(int64x2_t v) { return vreinterpretq_s32_s64(v); }

YIVL_INLINE void dwords(const std::byte* p, int64_t stride, I* out) {
    const FourRows r(p, stride);
    const I ab_even = lanes_of(vtrn1q_s16(halves_of(r.a), halves_of(r.b)));
    const I ab_odd = lanes_of(vtrn2q_s16(halves_of(r.a), halves_of(r.b)));
    const I cd_even = lanes_of(vtrn1q_s16(halves_of(r.c), halves_of(r.d)));
    const I cd_odd = lanes_of(vtrn2q_s16(halves_of(r.c), halves_of(r.d)));
    const int64x2_t even_02 = eights(vtrn1q_s32(ab_even, cd_even)), even_13 = eights(vtrn2q_s32(ab_even, cd_even));
    const int64x2_t odd_02 = eights(vtrn1q_s32(ab_odd, cd_odd)), odd_13 = eights(vtrn2q_s32(ab_odd, cd_odd));
    out[0] = fours(vtrn1q_s64(even_02, odd_02));
    out[1] = fours(vtrn1q_s64(even_13, odd_13));
    out[2] = fours(vtrn2q_s64(even_02, odd_02));
    out[3] = fours(vtrn2q_s64(even_13, odd_13));
}

YIVL_INLINE F halves(const std::byte* p, int64_t stride) {
    const auto at = [=](int64_t r) YIVL_INLINE_LAMBDA { return reinterpret_cast<const uint16_t*>(p + r * stride); };
    uint16x4_t v = vld1_dup_u16(at(0));
    v = vld1_lane_u16(at(1), v, 1);
    v = vld1_lane_u16(at(2), v, 2);
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_lane_u16(at(3), v, 3)));
}

inline float largest_magnitude(const float* x) {
    I most = no_integers();
    YIVL_UNROLL
    for (int i = 0; i < 32; i += 4) {
        most = vmaxq_s32(most, vandq_s32(vreinterpretq_s32_f32(load(x + i)), integers(0x7fffffff)));
    }
    return __builtin_bit_cast(float, vmaxvq_s32(most));
}

// Eight numbers times `factor`, to the nearest integers.
struct EightIntegers {
    I a, b;

    YIVL_INLINE EightIntegers(const float* x, float factor)
        : a(vcvtnq_s32_f32(vmulq_n_f32(load(x), factor))), b(vcvtnq_s32_f32(vmulq_n_f32(load(x + 4), factor))) {}
    int16x8_t narrow() const { return vmovn_high_s32(vmovn_s32(a), b); }
    I sum() const { return vaddq_s32(a, b); }
};

inline void round_block(const float* x, float factor, int16_t* dst, int32_t* sums) {
    const uint8x16_t paired = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
    for (int part = 0; part < 2; ++part) {
        I sum = no_integers();
        for (int i = part * 16; i < part * 16 + 16; i += 8) {
            const EightIntegers eight(x + i, factor);
            sum = add_integers(sum, eight.sum());
            vst1q_u8(reinterpret_cast<uint8_t*>(dst + i), vqtbl1q_u8(vreinterpretq_u8_s16(eight.narrow()), paired));
        }
        sums[part] = vaddvq_s32(sum);
    }
}

}  // namespace

#include "cpu/kernels_body.h"
#include "cpu/kernels_floats.h"
#include "cpu/kernels_integer.h"

// With instructions that multiply bytes and sum up four or eight products. In target regions of their own they could
// not use what is defined above, and outside of such regions assemblers refuse them, Clang's whatever .arch says. So
// they are written as numbers: .Lnumber_v7 is 7, a register's place in them.

asm(".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15\n\t.set .Lnumber_v\\n, \\n\n.endr\n"
    ".irp n, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31\n\t.set .Lnumber_v\\n, \\n\n.endr\n");

#define YIVL_INSTRUCTION(code) ".inst " code " | .Lnumber_%0 | .Lnumber_%1 << 5 | .Lnumber_%2 << 16"

namespace {
constexpr int kHighByte = 128;  // what the high byte of x counts
}

namespace dotprod {

namespace {

// Rows in the lanes, four columns each: of columns [0, 8) in out[0] and out[1], of [8, 16) in the others.
YIVL_INLINE void columns(const std::byte* p, int64_t stride, I* out) {
    const FourRows r(p, stride);
    const int64x2_t ab_even = eights(vtrn1q_s32(r.a, r.b)), ab_odd = eights(vtrn2q_s32(r.a, r.b));
    const int64x2_t cd_even = eights(vtrn1q_s32(r.c, r.d)), cd_odd = eights(vtrn2q_s32(r.c, r.d));
    out[0] = fours(vtrn1q_s64(ab_even, cd_even));
    out[1] = fours(vtrn1q_s64(ab_odd, cd_odd));
    out[2] = fours(vtrn2q_s64(ab_even, cd_even));
    out[3] = fours(vtrn2q_s64(ab_odd, cd_odd));
}

// sdot sums.4s, w.16b, x.4b[four]
template <int four>
YIVL_INLINE void multiply_four(I& sums, I w, I x) {
    asm(YIVL_INSTRUCTION("(0x4f80e000 + %3)") : "+w"(sums) : "w"(w), "w"(x), "i"(four % 2 << 21 | four / 2 << 11));
}

// Sums of the products with the high bytes of x and with the low bytes.
struct Sum {
    I high = no_integers(), low = no_integers();

    YIVL_INLINE void multiply(I w0, I w1, I x) {
        multiply_four<0>(high, w0, x);
        multiply_four<1>(high, w1, x);
        multiply_four<2>(low, w0, x);
        multiply_four<3>(low, w1, x);
    }
    YIVL_INLINE I total() const { return vmlaq_n_s32(low, high, kHighByte); }
};

}  // namespace

#include "cpu/kernels_bytes_neon.h"

}  // namespace dotprod

namespace i8mm {

namespace {

// Eight columns of rows 0 and 1, and of rows 2 and 3.
YIVL_INLINE void columns(const std::byte* p, int64_t stride, I* out) {
    const FourRows r(p, stride);
    out[0] = fours(vtrn1q_s64(eights(r.a), eights(r.b)));
    out[1] = fours(vtrn1q_s64(eights(r.c), eights(r.d)));
    out[2] = fours(vtrn2q_s64(eights(r.a), eights(r.b)));
    out[3] = fours(vtrn2q_s64(eights(r.c), eights(r.d)));
}

// smmla sums.4s, w.16b, x.16b
YIVL_INLINE void multiply_matrices(I& sums, I w, I x) {
    asm(YIVL_INSTRUCTION("0x4e80a400") : "+w"(sums) : "w"(w), "w"(x));
}

// Sums of two rows, with the high bytes of x and with the low bytes side by side.
struct Sum {
    I first = no_integers(), second = no_integers();

    YIVL_INLINE void multiply(I w0, I w1, I x) {
        multiply_matrices(first, w0, x);
        multiply_matrices(second, w1, x);
    }
    YIVL_INLINE I total() const { return vmlaq_n_s32(vuzp2q_s32(first, second), vuzp1q_s32(first, second), kHighByte); }
};

}  // namespace

#include "cpu/kernels_bytes_neon.h"

}  // namespace i8mm

}  // namespace yivl::neon

namespace yivl {

const Kernels kNeonKernels = YIVL_KERNELS("neon", "", neon, &neon::kIntegerKernels);
const Kernels kNeonDotprodKernels = YIVL_KERNELS("neon", "dotprod", neon, &neon::dotprod::kByteKernels);
const Kernels kNeonI8mmKernels = YIVL_KERNELS("neon", "i8mm", neon, &neon::i8mm::kByteKernels);

}  // namespace yivl

#endif
