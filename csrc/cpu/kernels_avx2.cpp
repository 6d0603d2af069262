// The kernels with AVX2, FMA and F16C.
#include "cpu/isa.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/dequant.h"
#include "cpu/kernels.h"
#include "cpu/target_region.h"

YIVL_TARGET_BEGIN("avx2,fma,f16c")
#define YIVL_TARGET_LAMBDA __attribute__((target("avx2,fma,f16c")))

namespace yivl::avx2 {

#include "cpu/reads_x86.h"

namespace {

typedef __m256 F;

constexpr int kLanes = 8;
constexpr int kTileRows = 6, kTileVectors = 2;
constexpr int kKeyBlock = 128;

inline F set1(float s) { return _mm256_set1_ps(s); }
inline F zero() { return _mm256_setzero_ps(); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }

alignas(32) constexpr int32_t kFirst[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
inline __m256i first(int64_t n) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kFirst + kLanes - n)); }
inline F load_n(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
inline void store_n(float* p, F v, int64_t n) { _mm256_maskstore_ps(p, first(n), v); }

inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F abs(F v) { return _mm256_andnot_ps(set1(-0.0f), v); }
inline F below(F a, F b, F x, F y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
inline F round(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F scale(F v, F n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), exponent));
}

inline __m128 halves_added(F v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }
inline float sum(F v) {
    __m128 s = halves_added(v);
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float largest(F v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
// Pairs, then fours of each half, then the halves of the vectors.
YIVL_INLINE void transpose(F (&r)[8]) {
    F t[8];
    YIVL_UNROLL
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    YIVL_UNROLL
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    YIVL_UNROLL
    for (int j = 0; j < 4; ++j) {
        t[j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
        t[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
    }
    YIVL_UNROLL
    for (int j = 0; j < 8; ++j) r[j] = t[j];
}

inline F from_half(const std::byte* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline F from_bfloat(const std::byte* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// ---- integers ----

typedef __m256i I;

constexpr bool kSumsOfPairs = false;
constexpr int kIntegerTokens = 6;

inline I load_integers(const I* p) { return _mm256_load_si256(p); }
inline void store_integers(I* p, I v) { _mm256_store_si256(p, v); }
inline I integers(int32_t n) { return _mm256_set1_epi32(n); }
inline I no_integers() { return _mm256_setzero_si256(); }
inline I add_integers(I a, I b) { return _mm256_add_epi32(a, b); }
inline I times_integers(I a, I b) { return _mm256_mullo_epi32(a, b); }
inline I negative(I v) { return _mm256_sub_epi32(no_integers(), v); }
template <int n>
inline I up32(I v) {
    return _mm256_slli_epi32(v, n);
}
template <int n>
inline I down32(I v) {
    return _mm256_srai_epi32(v, n);
}
inline F to_floats(I v) { return _mm256_cvtepi32_ps(v); }
inline I pair(const int16_t* p) {
    int32_t both;
    __builtin_memcpy(&both, p, sizeof(both));
    return _mm256_set1_epi32(both);
}
inline I low_bits(I v, int n) { return _mm256_and_si256(v, _mm256_set1_epi16(static_cast<int16_t>(n))); }
inline I flip_bits(I v, int n) { return _mm256_xor_si256(v, _mm256_set1_epi16(static_cast<int16_t>(n))); }
inline I any_bits(I a, I b) { return _mm256_or_si256(a, b); }
template <int n>
inline I down(I v) {
    return _mm256_srli_epi16(v, n);
}
template <int n>
inline I up(I v) {
    return _mm256_slli_epi16(v, n);
}
template <int n>
inline I signed_down(I v) {
    return _mm256_srai_epi16(v, n);
}
inline I less(I v, int n) { return _mm256_sub_epi16(v, _mm256_set1_epi16(static_cast<int16_t>(n))); }
inline I plus(I a, I b) { return _mm256_add_epi16(a, b); }
inline I times(I a, I b) { return _mm256_mullo_epi16(a, b); }
template <int n>
inline I byte(I v) {
    return _mm256_and_si256(_mm256_srli_epi32(v, n * 8), _mm256_set1_epi32(0xff));
}
template <int n>
inline I signed_byte(I v) {
    return down32<24>(up32<24 - n * 8>(v));
}
template <int n>
inline I spread_byte(I v) {
    const __m128i high =
        _mm_setr_epi8(-1, n, -1, n, -1, n + 4, -1, n + 4, -1, n + 8, -1, n + 8, -1, n + 12, -1, n + 12);
    return _mm256_srai_epi16(_mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(high)), 8);
}
template <int n>
inline F half_of_lane(I v) {
    const I low = n == 0 ? _mm256_and_si256(v, _mm256_set1_epi32(0xffff)) : _mm256_srli_epi32(v, 16);
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}
inline I low_and_high(I a, I b) { return _mm256_blend_epi16(a, b, 0xaa); }

// 16 bytes of two rows side by side, four rows apart, then a transposition of each four by four.
YIVL_INLINE void dwords(const std::byte* p, int64_t stride, I* out) {
    const std::byte* p4 = p + 4 * stride;
    YIVL_IN_REGISTER(p4);
    const auto two_rows = [=](int64_t first) YIVL_INLINE_LAMBDA {
        const auto row = [=](const std::byte* from) YIVL_INLINE_LAMBDA {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + first * stride));
        };
        return _mm256_inserti128_si256(_mm256_castsi128_si256(row(p)), row(p4), 1);
    };
    const I a = two_rows(0), b = two_rows(1), c = two_rows(2), d = two_rows(3);
    const I ab_low = _mm256_unpacklo_epi32(a, b), ab_high = _mm256_unpackhi_epi32(a, b);
    const I cd_low = _mm256_unpacklo_epi32(c, d), cd_high = _mm256_unpackhi_epi32(c, d);
    out[0] = _mm256_unpacklo_epi64(ab_low, cd_low);
    out[1] = _mm256_unpackhi_epi64(ab_low, cd_low);
    out[2] = _mm256_unpacklo_epi64(ab_high, cd_high);
    out[3] = _mm256_unpackhi_epi64(ab_high, cd_high);
}
YIVL_INLINE F halves(const std::byte* p, int64_t stride) { return _mm256_cvtph_ps(eight_halves(p, stride)); }

inline int32_t sum_of_integers(I v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
inline float largest_magnitude(const float* x) {
    const auto some = [x](int i) YIVL_TARGET_LAMBDA {
        return _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const I*>(x + i)), _mm256_set1_epi32(0x7fffffff));
    };
    const I v = _mm256_max_epi32(_mm256_max_epi32(some(0), some(8)), _mm256_max_epi32(some(16), some(24)));
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return __builtin_bit_cast(float, _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1))));
}
inline void round_block(const float* x, float factor, int16_t* dst, int32_t* sums) {
    const auto sixteen = [x, factor, dst](int i) YIVL_TARGET_LAMBDA {
        const I a = _mm256_cvtps_epi32(mul(load(x + i), set1(factor)));
        const I b = _mm256_cvtps_epi32(mul(load(x + i + 8), set1(factor)));
        const I all = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
        _mm256_store_si256(reinterpret_cast<I*>(dst + i),
                           _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(all, 0xd8), 0xd8));
        return sum_of_integers(_mm256_add_epi32(a, b));
    };
    sums[0] = sixteen(0);
    sums[1] = sixteen(16);
}

}  // namespace

#include "cpu/kernels_body.h"
#include "cpu/kernels_floats.h"

namespace plain {

namespace {
constexpr bool kFours = false;

YIVL_INLINE I multiply_pairs(I sums, I a, I b) {
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
    YIVL_SUMMED(sums);
    return sums;
}
YIVL_INLINE I multiply_at(I sums, I a, const int16_t* p) { return multiply_pairs(sums, a, pair(p)); }
}  // namespace

#include "cpu/kernels_integer.h"

}  // namespace plain

// With the instruction that does both, AVX-VNNI's.
namespace vnni {

namespace {
constexpr bool kFours = true;

inline I shuffle_eights(I v) { return _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(eights())); }
YIVL_INLINE I multiply_pairs(I sums, I a, I b) {
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sums) : "x"(a), "x"(b));
    return sums;
}
YIVL_INLINE I multiply_at(I sums, I a, const int16_t* p) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(a), "x"(pair(p)));
    return sums;
}
}  // namespace

#include "cpu/kernels_integer.h"

}  // namespace vnni

}  // namespace yivl::avx2

YIVL_TARGET_END

namespace yivl {

const Kernels kAvx2Kernels = YIVL_KERNELS("avx2", "", avx2, &avx2::plain::kIntegerKernels);
const Kernels kAvx2VnniKernels = YIVL_KERNELS("avx2", "vnni", avx2, &avx2::vnni::kIntegerKernels);

}  // namespace yivl

#endif
