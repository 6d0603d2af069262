// The kernels on whatever the compiler takes for granted: vectors of four floats, SSE2 on x86-64 and NEON on ARM64.
#include "cpu/dequant.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/target_region.h"

#define YIVL_TARGET_LAMBDA

namespace yivl::portable {

namespace {

typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));

constexpr int kLanes = 4;
constexpr int kTileRows = 4, kTileVectors = 2;
constexpr int kKeyBlock = 128;

inline F set1(float s) { return F{s, s, s, s}; }
inline F zero() { return set1(0.0f); }
inline F load(const float* p) {
    F v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
}
inline void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof(v)); }
inline F load_n(const float* p, int64_t n) { return F{p[0], n > 1 ? p[1] : 0.0f, n > 2 ? p[2] : 0.0f, 0.0f}; }
inline void store_n(float* p, F v, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

inline F add(F a, F b) { return a + b; }
inline F sub(F a, F b) { return a - b; }
inline F mul(F a, F b) { return a * b; }
inline F div(F a, F b) { return a / b; }
inline F fma(F a, F b, F c) { return a * b + c; }
inline F below(F a, F b, F x, F y) { return a < b ? x : y; }
inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }
inline F abs(F v) { return reinterpret_cast<F>(reinterpret_cast<I>(v) & 0x7fffffff); }
// 1.5 * 2^23 leaves no bits for a fraction.
inline F round(F v) { return (v + 12582912.0f) - 12582912.0f; }
inline F scale(F v, F n) { return reinterpret_cast<F>(reinterpret_cast<I>(v) + (__builtin_convertvector(n, I) << 23)); }
inline float sum(F v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float largest(F v) {
    const float a = v[0] < v[1] ? v[1] : v[0], b = v[2] < v[3] ? v[3] : v[2];
    return a < b ? b : a;
}
inline void transpose(F (&r)[kLanes]) {
    const F a = r[0], b = r[1], c = r[2], d = r[3];
    for (int i = 0; i < kLanes; ++i) r[i] = F{a[i], b[i], c[i], d[i]};
}

template <WeightType type>
inline F from_file(const std::byte* p) {
    float values[kLanes];
    dequantize_row(type, p, values, kLanes);
    return load(values);
}
inline F from_half(const std::byte* p) { return from_file<WeightType::F16>(p); }
inline F from_bfloat(const std::byte* p) { return from_file<WeightType::BF16>(p); }

inline void prefetch(const std::byte* p) { __builtin_prefetch(p); }
inline void prefetch_far(const std::byte* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace

#include "cpu/kernels_body.h"
#include "cpu/kernels_floats.h"

}  // namespace yivl::portable

namespace yivl {

const Kernels kPortableKernels = YIVL_KERNELS("portable", "", portable, nullptr);

}  // namespace yivl
