// Vectors of 32 bytes for kernels_weights.h, the same with AVX2 and AVX-512. Included inside a target region.

namespace {

typedef __m256i B;

inline B bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const B*>(p)); }
inline B both(B a, int n) { return _mm256_and_si256(a, _mm256_set1_epi8(static_cast<char>(n))); }
inline B either(B a, B b) { return _mm256_or_si256(a, b); }
inline B minus(B a, int n) { return _mm256_sub_epi8(a, _mm256_set1_epi8(static_cast<char>(n))); }
template <int n>
inline B right(B a) {
    return _mm256_srli_epi16(a, n);
}
template <int n>
inline B left(B a) {
    return _mm256_slli_epi16(a, n);
}
inline void put(int8_t* p, B a) { _mm256_storeu_si256(reinterpret_cast<B*>(p), a); }

inline float half_to_float(half_bits h) { return _cvtsh_ss(h); }

// Left to itself, GCC finds that a function which only prefetches does nothing, and drops the calls.
YIVL_INLINE void prefetch(const std::byte* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace
