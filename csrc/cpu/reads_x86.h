// Reads that are the same with AVX2 and AVX-512. Included inside a target region, before kernels_body.h.

namespace {

// Left to itself, GCC finds that a function which only prefetches does nothing, and drops the calls.
YIVL_INLINE void prefetch(const std::byte* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
YIVL_INLINE void prefetch_far(const std::byte* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

// Bytes 0, 4, 2, 6, 1, 5, 3, 7 of each eight.
inline __m128i eights() { return _mm_setr_epi8(0, 4, 2, 6, 1, 5, 3, 7, 8, 12, 10, 14, 9, 13, 11, 15); }

// The two bytes at each of eight places.
YIVL_INLINE __m128i eight_halves(const std::byte* p, int64_t stride) {
    const std::byte* p4 = p + 4 * stride;
    YIVL_IN_REGISTER(p4);
    const auto half = [stride](const std::byte* from, int64_t r) YIVL_INLINE_LAMBDA {
        uint16_t h;
        __builtin_memcpy(&h, from + r * stride, sizeof(h));
        return static_cast<int>(h);
    };
    __m128i v = _mm_cvtsi32_si128(half(p, 0));
    v = _mm_insert_epi16(v, half(p, 1), 1);
    v = _mm_insert_epi16(v, half(p, 2), 2);
    v = _mm_insert_epi16(v, half(p, 3), 3);
    v = _mm_insert_epi16(v, half(p4, 0), 4);
    v = _mm_insert_epi16(v, half(p4, 1), 5);
    v = _mm_insert_epi16(v, half(p4, 2), 6);
    return _mm_insert_epi16(v, half(p4, 3), 7);
}

}  // namespace
