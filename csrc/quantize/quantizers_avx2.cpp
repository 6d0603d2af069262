// The quantisers with AVX2.
#include "quantize/quantizers.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/target_region.h"
#include "half.h"

YIVL_TARGET_BEGIN("avx2")
#define YIVL_TARGET_LAMBDA __attribute__((target("avx2")))

namespace yivl::avx2 {

namespace {

typedef __m256 F;

constexpr int kLanes = 8;

inline F set1(float s) { return _mm256_set1_ps(s); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline F above(F a, F b, F x, F y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F abs(F v) { return _mm256_andnot_ps(set1(-0.0f), v); }

}  // namespace

#include "quantize/quantizers_body.h"

}  // namespace yivl::avx2

YIVL_TARGET_END

namespace yivl {

const Quantizers kAvx2Quantizers{avx2::quantize};

}  // namespace yivl

#endif
