// The kernels with AVX-512 F, BW, DQ and VL: what every server CPU since 2017 and every desktop CPU with AVX-512 has.
#include "cpu/isa.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/dequant.h"
#include "cpu/kernels.h"
#include "cpu/target_region.h"

#if !defined(__clang__)
// The undefined lanes that GCC's own intrinsics start from (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

YIVL_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define YIVL_TARGET_LAMBDA __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")))

namespace yivl::avx512 {

#include "cpu/reads_x86.h"
#include "cpu/transpose_avx512.h"

namespace {

typedef __m512 F;

constexpr int kLanes = 16;
constexpr int kTileRows = 12, kTileVectors = 2;
constexpr int kKeyBlock = 256;

inline F set1(float s) { return _mm512_set1_ps(s); }
inline F zero() { return _mm512_setzero_ps(); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }

inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline F load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline void store_n(float* p, F v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }

inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F abs(F v) { return _mm512_abs_ps(v); }
inline F below(F a, F b, F x, F y) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x); }
inline F round(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F scale(F v, F n) { return _mm512_scalef_ps(v, n); }

inline float sum(F v) { return _mm512_reduce_add_ps(v); }
inline float largest(F v) { return _mm512_reduce_max_ps(v); }

inline F from_half(const std::byte* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F from_bfloat(const std::byte* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// ---- integers ----

typedef __m512i I;

constexpr int kIntegerTokens = 6;

inline I load_integers(const I* p) { return _mm512_load_si512(p); }
inline void store_integers(I* p, I v) { _mm512_store_si512(p, v); }
inline I integers(int32_t n) { return _mm512_set1_epi32(n); }
inline I no_integers() { return _mm512_setzero_si512(); }
inline I add_integers(I a, I b) { return _mm512_add_epi32(a, b); }
inline I times_integers(I a, I b) { return _mm512_mullo_epi32(a, b); }
inline I negative(I v) { return _mm512_sub_epi32(no_integers(), v); }
template <int n>
inline I up32(I v) {
    return _mm512_slli_epi32(v, n);
}
template <int n>
inline I down32(I v) {
    return _mm512_srai_epi32(v, n);
}
inline F to_floats(I v) { return _mm512_cvtepi32_ps(v); }
inline I pair(const int16_t* p) {
    int32_t both;
    __builtin_memcpy(&both, p, sizeof(both));
    return _mm512_set1_epi32(both);
}
inline I low_bits(I v, int n) { return _mm512_and_si512(v, _mm512_set1_epi16(static_cast<int16_t>(n))); }
inline I flip_bits(I v, int n) { return _mm512_xor_si512(v, _mm512_set1_epi16(static_cast<int16_t>(n))); }
inline I any_bits(I a, I b) { return _mm512_or_si512(a, b); }
template <int n>
inline I down(I v) {
    return _mm512_srli_epi16(v, n);
}
template <int n>
inline I up(I v) {
    return _mm512_slli_epi16(v, n);
}
template <int n>
inline I signed_down(I v) {
    return _mm512_srai_epi16(v, n);
}
inline I less(I v, int n) { return _mm512_sub_epi16(v, _mm512_set1_epi16(static_cast<int16_t>(n))); }
inline I plus(I a, I b) { return _mm512_add_epi16(a, b); }
inline I times(I a, I b) { return _mm512_mullo_epi16(a, b); }
template <int n>
inline I byte(I v) {
    return _mm512_and_si512(_mm512_srli_epi32(v, n * 8), _mm512_set1_epi32(0xff));
}
template <int n>
inline I signed_byte(I v) {
    return down32<24>(up32<24 - n * 8>(v));
}
template <int n>
inline I spread_byte(I v) {
    const __m128i high =
        _mm_setr_epi8(-1, n, -1, n, -1, n + 4, -1, n + 4, -1, n + 8, -1, n + 8, -1, n + 12, -1, n + 12);
    return _mm512_srai_epi16(_mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(high)), 8);
}
template <int n>
inline F half_of_lane(I v) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(v, n * 16)));
}
inline I lanes_swapped(I v) { return _mm512_shuffle_epi32(v, _MM_PERM_CDAB); }
inline int32_t sum_of_lanes(I v, uint32_t bits) {
    return _mm512_mask_reduce_add_epi32(static_cast<__mmask16>(bits), v);
}
inline I low_and_high(I a, I b) { return _mm512_mask_blend_epi16(0x55555555, b, a); }

// 16 bytes of four rows side by side, four rows apart, then a transposition of each four by four.
YIVL_INLINE void dwords(const std::byte* p, int64_t stride, I* out) {
    const std::byte *p4 = p + 4 * stride, *p8 = p + 8 * stride;
    YIVL_IN_REGISTER(p4);
    YIVL_IN_REGISTER(p8);
    const std::byte* p12 = p4 + 8 * stride;
    YIVL_IN_REGISTER(p12);
    const auto four_rows = [=](int64_t first) YIVL_INLINE_LAMBDA {
        const auto row = [=](const std::byte* from) YIVL_INLINE_LAMBDA {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + first * stride));
        };
        __m512i v = _mm512_castsi128_si512(row(p));
        v = _mm512_inserti32x4(v, row(p4), 1);
        v = _mm512_inserti32x4(v, row(p8), 2);
        return _mm512_inserti32x4(v, row(p12), 3);
    };
    const I a = four_rows(0), b = four_rows(1), c = four_rows(2), d = four_rows(3);
    const I ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
    const I cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
    out[0] = _mm512_unpacklo_epi64(ab_low, cd_low);
    out[1] = _mm512_unpackhi_epi64(ab_low, cd_low);
    out[2] = _mm512_unpacklo_epi64(ab_high, cd_high);
    out[3] = _mm512_unpackhi_epi64(ab_high, cd_high);
}

YIVL_INLINE F halves(const std::byte* p, int64_t stride) {
    return _mm512_cvtph_ps(_mm256_set_m128i(eight_halves(p + 8 * stride, stride), eight_halves(p, stride)));
}

inline float largest_magnitude(const float* x) {
    const I magnitude = _mm512_set1_epi32(0x7fffffff);
    const I a = _mm512_and_si512(_mm512_loadu_si512(x), magnitude);
    const I b = _mm512_and_si512(_mm512_loadu_si512(x + 16), magnitude);
    return __builtin_bit_cast(float, _mm512_reduce_max_epi32(_mm512_max_epi32(a, b)));
}
inline void round_block(const float* x, float factor, int16_t* dst, int32_t* sums) {
    const I a = _mm512_cvtps_epi32(mul(load(x), set1(factor)));
    const I b = _mm512_cvtps_epi32(mul(load(x + 16), set1(factor)));
    const I all = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(a)), _mm512_cvtepi32_epi16(b), 1);
    _mm512_store_si512(dst, _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(all, 0xd8), 0xd8));
    sums[0] = _mm512_reduce_add_epi32(a);
    sums[1] = _mm512_reduce_add_epi32(b);
}

}  // namespace

#include "cpu/kernels_body.h"
#include "cpu/kernels_floats.h"

namespace plain {

namespace {
constexpr bool kSumsOfPairs = false;
constexpr bool kFours = false;

YIVL_INLINE I multiply_pairs(I sums, I a, I b) {
    sums = _mm512_add_epi32(sums, _mm512_madd_epi16(a, b));
    YIVL_SUMMED(sums);
    return sums;
}
YIVL_INLINE I multiply_at(I sums, I a, const int16_t* p) { return multiply_pairs(sums, a, pair(p)); }
}  // namespace

#include "cpu/kernels_integer.h"

}  // namespace plain

// With the instruction that does both. In a region of its own it could not use what is defined above.
namespace vnni {

namespace {
constexpr bool kFours = true;

inline I shuffle_eights(I v) { return _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(eights())); }
YIVL_INLINE I multiply_pairs(I sums, I a, I b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
    return sums;
}
YIVL_INLINE I multiply_at(I sums, I a, const int16_t* p) {
    struct Four {
        int8_t bytes[4];
    };
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(a), "m"(*reinterpret_cast<const Four*>(p)));
    return sums;
}
}  // namespace

namespace products {

namespace {
constexpr bool kSumsOfPairs = false;
}  // namespace

#include "cpu/kernels_integer.h"

}  // namespace products

// For AMD's CPUs, which add in other units than they multiply in.
namespace sums {

namespace {
constexpr bool kSumsOfPairs = true;
}  // namespace

#include "cpu/kernels_integer.h"

namespace {
constexpr PackedKernels kManyLinesKernels = integer_kernels(multiply_integers<PairRows, true>);
}  // namespace

}  // namespace sums

}  // namespace vnni

}  // namespace yivl::avx512

YIVL_TARGET_END

namespace yivl {

const Kernels kAvx512Kernels = YIVL_KERNELS("avx512", "", avx512, &avx512::plain::kIntegerKernels);
const Kernels kAvx512VnniKernels = YIVL_KERNELS("avx512", "vnni", avx512, &avx512::vnni::products::kIntegerKernels);
const Kernels kAvx512VnniSumsKernels =
    YIVL_KERNELS("avx512", "vnni, sums", avx512, &avx512::vnni::sums::kIntegerKernels);
const Kernels kAvx512VnniSumsManyLinesKernels =
    YIVL_KERNELS("avx512", "vnni, sums, many lines", avx512, &avx512::vnni::sums::kManyLinesKernels);

}  // namespace yivl

#endif
