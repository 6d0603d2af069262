// Weights of every type unpacked to bfloat16, rows of tiles, to be included among the AMX kernels.

// 32 bytes.
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

YIVL_INLINE __m512 steps_from(float first) {
    const __m512 steps = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_ps(steps, _mm512_set1_ps(first));
}
YIVL_INLINE __m512 from_i8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
YIVL_INLINE __m512 from_half(const std::byte* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Four-bit types look their values up in a table made for each block. What finds the indices takes the columns in
// another order, all even ones before all odd ones; x is packed in the same order.
bool even_columns_first(WeightType type) {
    return type == WeightType::Q4_0 || type == WeightType::Q4_K || type == WeightType::Q5_K;
}
int order(WeightType type) { return type == WeightType::F32 ? -1 : even_columns_first(type) ? 1 : 0; }
YIVL_INLINE __m512i evens_then_odds() {
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                        1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    return _mm512_load_si512(kOrder);
}

// Where the integers of a block lie, for _mm512_multishift_epi64_epi8: bit `low` of each even byte for the first 16
// columns, of each odd byte for the others, and the bits above it, twice each since a look-up takes bytes. Every second
// 8 bytes of the first half come from `other` bits further, where 32 columns lie in 16 bytes.
YIVL_INLINE __m512i bits_from(int low, int other) {
    const auto fields = [low](int bit) YIVL_TARGET_LAMBDA {
        uint64_t n = 0;
        for (int i = 0; i < 8; ++i) n |= static_cast<uint64_t>((low + bit + i / 2 * 16) & 63) << (i * 8);
        return static_cast<int64_t>(n);
    };
    const int64_t a = fields(0), b = fields(other), c = fields(8), d = fields(8 + other);
    return _mm512_setr_epi64(a, a, b, b, c, c, d, d);
}
// Bytes 2 * i and 2 * i + 1 for the index i in bits 1 to 4; plus 32 for the second half of a table.
YIVL_INLINE __m512i entries(__m512i bits) {
    return _mm512_ternarylogic_epi64(bits, _mm512_set1_epi8(0x1e), _mm512_set1_epi16(0x0100), 0xea);
}
YIVL_INLINE __m512i second_entries(__m512i bits) {
    return _mm512_ternarylogic_epi64(bits, _mm512_set1_epi8(0x1e), _mm512_set1_epi16(0x2120), 0xea);
}

// Small integers are brought together in general registers: a wide load would have to wait until every narrow store
// before it has left for the cache, and everything after it with it.
YIVL_INLINE __m128i two_words(uint64_t a, uint64_t b) {
    return _mm_set_epi64x(static_cast<int64_t>(b), static_cast<int64_t>(a));
}

// The scales of n <= 8 blocks as floats; the rest 0.
template <class Block>
YIVL_INLINE void read_scales(const Block* blocks, int64_t n, float (&scales)[8]) {
    const auto half = [=](int64_t j) YIVL_TARGET_LAMBDA {
        uint64_t d = j < n ? blocks[j].d : 0;
        asm("" : "+r"(d));  // GCC would do this with shuffles, which are what unpacking is short of
        return d;
    };
    const auto four = [=](int64_t j) YIVL_TARGET_LAMBDA {
        return half(j) | half(j + 1) << 16 | half(j + 2) << 32 | half(j + 3) << 48;
    };
    _mm256_storeu_ps(scales, _mm256_cvtph_ps(two_words(four(0), four(4))));
    YIVL_IN_MEMORY(scales);
}

// blocks_8(blocks, n, dst) for every 8 blocks of a row, n a constant but for the last.
template <class Block, void (*blocks_8)(const Block*, int64_t, std::byte*)>
YIVL_INLINE void row_of_blocks(const std::byte* src, int64_t n, std::byte* dst) {
    const Block* blocks = reinterpret_cast<const Block*>(src);
    for (n /= kBlock; n >= 8; n -= 8, blocks += 8, dst += 8 * kTileBytes) blocks_8(blocks, 8, dst);
    if (n > 0) blocks_8(blocks, n, dst);
}

// n <= kChunkSteps * 32 weights of each of some rows. 32 of them become a row of a tile, 64 bytes at dst; the next 32
// are the same row of the next tile.
struct Rows {
    WeightType type;
    const std::byte* src;
    int64_t row_bytes;
    int64_t n_rows;
    int64_t n;
    std::byte* dst;
};
typedef void (*Unpack)(const Rows& rows);

// one_row(src, n, dst) for each.
template <void (*one_row)(const std::byte*, int64_t, std::byte*)>
void unpack_rows(const Rows& rows) {
    for (int64_t r = 0; r < rows.n_rows; ++r) one_row(rows.src + r * rows.row_bytes, rows.n, rows.dst + r * 64);
}

YIVL_INLINE void blocks_q4_0(const BlockQ4_0* blocks, int64_t n, std::byte* dst) {
    float scales[8];
    read_scales(blocks, n, scales);
    const __m512i places = bits_from(-1, 4);
    const __m512 steps = steps_from(-8);
    const auto nibbles = [&](int64_t j) YIVL_TARGET_LAMBDA {
        const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i*>(blocks[j].qs));
        return _mm512_multishift_epi64_epi8(places, _mm512_broadcast_i32x4(q));
    };
    YIVL_UNROLL
    for (int64_t j = 0; j < n; j += 2) {
        const __m512i table = to_bfloats(_mm512_mul_ps(steps, _mm512_set1_ps(scales[j])),
                                         _mm512_mul_ps(steps, _mm512_set1_ps(scales[j + 1])));
        put_row(dst, j, _mm512_permutexvar_epi8(entries(nibbles(j)), table));
        if (j + 1 < n) put_row(dst, j + 1, _mm512_permutexvar_epi8(second_entries(nibbles(j + 1)), table));
    }
}

YIVL_INLINE void blocks_q8_0(const BlockQ8_0* blocks, int64_t n, std::byte* dst) {
    float scales[8];
    read_scales(blocks, n, scales);
    YIVL_UNROLL
    for (int64_t j = 0; j < n; ++j) {
        const __m512 d = _mm512_set1_ps(scales[j]);
        const int8_t* q = blocks[j].qs;
        put_row(dst, j, to_bfloats(_mm512_mul_ps(from_i8(q), d), _mm512_mul_ps(from_i8(q + 16), d)));
    }
}

// Scales and minima of the 8 groups of a Q4_K or Q5_K block: six bits each in the file.
struct Groups {
    float scale[8];
    float minimum[8];
};

template <class Block>
YIVL_INLINE void read_groups(const Block& b, Groups& groups) {
    uint32_t w[3];
    __builtin_memcpy(w, b.scales, sizeof(w));
    const uint64_t scale = (w[0] & 0x3f3f3f3f) | uint64_t{(w[2] & 0x0f0f0f0f) | (w[0] >> 6 & 0x03030303) << 4} << 32;
    const uint64_t minimum = (w[1] & 0x3f3f3f3f) | uint64_t{(w[2] >> 4 & 0x0f0f0f0f) | (w[1] >> 6 & 0x03030303) << 4}
                                                       << 32;
    const __m512 q = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(two_words(scale, minimum)));
    // d eight times, dmin eight times.
    uint32_t halves;
    __builtin_memcpy(&halves, &b.d, sizeof(halves));
    const __m512 both_halves = _mm512_castps128_ps512(_mm_cvtph_ps(_mm_cvtsi32_si128(static_cast<int>(halves))));
    const __m512 d =
        _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), both_halves);
    _mm512_storeu_ps(&groups.scale[0], _mm512_mul_ps(q, d));
    YIVL_IN_MEMORY(groups);
}

YIVL_INLINE __m512 scaled(__m512 steps, const Groups& groups, int g) {
    return _mm512_fmsub_ps(steps, _mm512_set1_ps(groups.scale[g]), _mm512_set1_ps(groups.minimum[g]));
}

YIVL_INLINE void row_q4_k(const std::byte* src, int64_t n, std::byte* dst) {
    const __m512i even_groups = bits_from(-1, 0), odd_groups = bits_from(3, 0);
    const __m512 steps = steps_from(0);
    for (; n > 0; n -= kSuperBlock, src += sizeof(BlockQ4_K), dst += 8 * kTileBytes) {
        const BlockQ4_K& b = *reinterpret_cast<const BlockQ4_K*>(src);
        Groups groups;
        read_groups(b, groups);
        YIVL_UNROLL
        for (int g = 0; g < 8; g += 2) {
            const __m512i table = to_bfloats(scaled(steps, groups, g), scaled(steps, groups, g + 1));
            const __m512i q = _mm512_broadcast_i64x4(bytes(b.qs + g * 16));
            put_row(dst, g, _mm512_permutexvar_epi8(entries(_mm512_multishift_epi64_epi8(even_groups, q)), table));
            put_row(dst, g + 1,
                    _mm512_permutexvar_epi8(second_entries(_mm512_multishift_epi64_epi8(odd_groups, q)), table));
        }
    }
}

YIVL_INLINE void row_q5_k(const std::byte* src, int64_t n, std::byte* dst) {
    const __m512i even_groups = bits_from(-1, 0), odd_groups = bits_from(3, 0);
    const __m512 low_steps = steps_from(0), high_steps = steps_from(16);
    for (; n > 0; n -= kSuperBlock, src += sizeof(BlockQ5_K), dst += 8 * kTileBytes) {
        const BlockQ5_K& b = *reinterpret_cast<const BlockQ5_K*>(src);
        Groups groups;
        read_groups(b, groups);
        const __m512i fifth = _mm512_broadcast_i64x4(bytes(b.qh));
        YIVL_UNROLL
        for (int g = 0; g < 8; ++g) {
            const __m512i table = to_bfloats(scaled(low_steps, groups, g), scaled(high_steps, groups, g));
            const __m512i q = _mm512_broadcast_i64x4(bytes(b.qs + g / 2 * 32));
            const __m512i low = _mm512_multishift_epi64_epi8(g % 2 == 0 ? even_groups : odd_groups, q);
            // Bit g of each byte becomes bit 5.
            const __m512i high = _mm512_multishift_epi64_epi8(bits_from(g - 5, 0), fifth);
            const __m512i choice = _mm512_ternarylogic_epi64(_mm512_set1_epi8(0x20), high, low, 0xca);
            put_row(
                dst, g,
                _mm512_permutexvar_epi8(
                    _mm512_ternarylogic_epi64(choice, _mm512_set1_epi8(0x3e), _mm512_set1_epi16(0x0100), 0xea), table));
        }
    }
}

YIVL_INLINE void row_q6_k(const std::byte* src, int64_t n, std::byte* dst) {
    for (; n > 0; n -= kSuperBlock, src += sizeof(BlockQ6_K), dst += 8 * kTileBytes) {
        const BlockQ6_K& b = *reinterpret_cast<const BlockQ6_K*>(src);
        alignas(64) float scales[16];
        _mm512_store_ps(scales, _mm512_mul_ps(from_i8(b.scales), _mm512_set1_ps(_cvtsh_ss(b.d))));
        YIVL_IN_MEMORY(scales);
        YIVL_UNROLL
        for (int half = 0; half < 2; ++half) {
            const B low = bytes(b.ql + half * 64), next = bytes(b.ql + half * 64 + 32), high = bytes(b.qh + half * 32);
            alignas(32) int8_t q[128];
            put(q, minus(either(both(low, 15), both(left<4>(high), 48)), 32));
            put(q + 32, minus(either(both(next, 15), both(left<2>(high), 48)), 32));
            put(q + 64, minus(either(both(right<4>(low), 15), both(high, 48)), 32));
            put(q + 96, minus(either(both(right<4>(next), 15), both(right<2>(high), 48)), 32));
            YIVL_UNROLL
            for (int g = 0; g < 4; ++g) {
                const float* scale = scales + half * 8 + g * 2;
                put_row(dst, half * 4 + g,
                        to_bfloats(_mm512_mul_ps(from_i8(q + g * 32), _mm512_set1_ps(scale[0])),
                                   _mm512_mul_ps(from_i8(q + g * 32 + 16), _mm512_set1_ps(scale[1]))));
            }
        }
    }
}

YIVL_INLINE void row_f16(const std::byte* src, int64_t n, std::byte* dst) {
    for (; n >= kTileCols; n -= kTileCols, src += kTileCols * 2, dst += kTileBytes) {
        put_row(dst, 0, to_bfloats(from_half(src), from_half(src + 32)));
    }
    if (n > 0) {
        alignas(64) std::byte rest[64];
        _mm512_store_si512(rest, _mm512_maskz_loadu_epi16(first(n), src));
        put_row(dst, 0, to_bfloats(from_half(rest), from_half(rest + 32)));
    }
}

YIVL_INLINE void row_bf16(const std::byte* src, int64_t n, std::byte* dst) {
    for (; n >= kTileCols; n -= kTileCols, src += kTileCols * 2, dst += kTileBytes) {
        put_row(dst, 0, _mm512_loadu_si512(src));
    }
    if (n > 0) put_row(dst, 0, _mm512_maskz_loadu_epi16(first(n), src));
}

void unpack_any(const Rows& rows) {
    const bool reorder = even_columns_first(rows.type);
    for (int64_t r = 0; r < rows.n_rows; ++r) {
        float values[kChunkSteps * kTileCols];
        dequantize_row(rows.type, rows.src + r * rows.row_bytes, values, rows.n);
        for (int64_t i = 0; i < rows.n; i += kTileCols) {
            __m512i v = bfloats_of(values + i, rows.n - i);
            if (reorder) v = _mm512_permutexvar_epi16(evens_then_odds(), v);
            put_row(rows.dst + r * 64, i / kTileCols, v);
        }
    }
}

// A file's tensors begin on multiples of 8 and blocks have even sizes: only other bytes, as of a test's array, lie at
// odd addresses.
Unpack unpacker(WeightType type, const std::byte* src) {
    if (reinterpret_cast<uintptr_t>(src) % alignof(half_bits) != 0) return unpack_any;
    switch (type) {
        case WeightType::F16: return unpack_rows<row_f16>;
        case WeightType::BF16: return unpack_rows<row_bf16>;
        case WeightType::Q8_0: return unpack_rows<row_of_blocks<BlockQ8_0, blocks_q8_0>>;
        case WeightType::Q4_0: return unpack_rows<row_of_blocks<BlockQ4_0, blocks_q4_0>>;
        case WeightType::Q4_K: return unpack_rows<row_q4_k>;
        case WeightType::Q5_K: return unpack_rows<row_q5_k>;
        case WeightType::Q6_K: return unpack_rows<row_q6_k>;
        default: return unpack_any;
    }
}
