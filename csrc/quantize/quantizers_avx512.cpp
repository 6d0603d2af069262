// The quantisers with AVX-512 F, BW, DQ and VL.
#include "quantize/quantizers.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/target_region.h"
#include "half.h"

#if !defined(__clang__)
// The undefined lanes that GCC's own intrinsics start from (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

YIVL_TARGET_BEGIN("avx2,avx512f,avx512bw,avx512dq,avx512vl")
#define YIVL_TARGET_LAMBDA __attribute__((target("avx2,avx512f,avx512bw,avx512dq,avx512vl")))

namespace yivl::avx512 {

namespace {

typedef __m512 F;

constexpr int kLanes = 16;

inline F set1(float s) { return _mm512_set1_ps(s); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline F above(F a, F b, F x, F y) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F abs(F v) { return _mm512_abs_ps(v); }

}  // namespace

#include "quantize/quantizers_body.h"

}  // namespace yivl::avx512

YIVL_TARGET_END

namespace yivl {

const Quantizers kAvx512Quantizers{avx512::quantize};

}  // namespace yivl

#endif
