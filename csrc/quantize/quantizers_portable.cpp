// The quantisers on whatever the compiler takes for granted: vectors of four floats.
#include "cpu/target_region.h"
#include "half.h"
#include "quantize/quantizers.h"

#define YIVL_TARGET_LAMBDA

namespace yivl::portable {

namespace {

typedef float F __attribute__((vector_size(16)));

constexpr int kLanes = 4;

inline F set1(float s) { return F{s, s, s, s}; }
inline F load(const float* p) {
    F v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
}
inline void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof(v)); }
inline F above(F a, F b, F x, F y) { return a > b ? x : y; }
inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }
typedef int32_t I __attribute__((vector_size(16)));
inline F abs(F v) { return reinterpret_cast<F>(reinterpret_cast<I>(v) & 0x7fffffff); }

}  // namespace

#include "quantize/quantizers_body.h"

}  // namespace yivl::portable

namespace yivl {

const Quantizers kPortableQuantizers{portable::quantize};

}  // namespace yivl
