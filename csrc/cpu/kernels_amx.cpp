// Matrix products of many tokens on AMX tiles, in bfloat16 with float32 sums, those of attention among them. Everything
// else is computed by the AVX-512 kernels: unpacking weights for few tokens takes longer than multiplying them as
// integers.
//
// A tile of weights is 16 rows of 32 columns, a tile of x is 16 pairs of columns of up to 16 tokens, and an accumulator
// holds 16 weight rows by 16 tokens. Every output is summed over all columns, 32 at a time, in one such accumulator:
// storing it and loading it again changes nothing, so products may be cut to suit the caches.
#include "cpu/isa.h"

#if defined(__x86_64__) && defined(__linux__)

#include <immintrin.h>

#include "cpu/dequant.h"
#include "cpu/kernels.h"
#include "cpu/target_region.h"
#include "cpu/tiles.h"

#if !defined(__clang__)
// The undefined lanes that GCC's own intrinsics start from (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

YIVL_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,amx-tile,amx-bf16")
#define YIVL_TARGET_LAMBDA                                                                            \
    __attribute__((                                                                                   \
        target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,amx-tile,amx-" \
               "bf16")))

namespace yivl::amx {

#include "cpu/kernels_bytes_x86.h"

namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileCols = 32;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileTokens = 16;

// Tiles of a row that are multiplied at a time: x of two token tiles takes 32 kB of the first-level cache.
constexpr int64_t kChunkSteps = 16;

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- tiles: 0 to 3 accumulators, 4 and 5 weights, 6 and 7 tokens; all are whole ----

void begin_tiles() {
    struct alignas(64) Config {
        uint8_t palette = 1;
        uint8_t start_row = 0;
        uint8_t reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
        config.row_bytes[tile] = kTileBytes / kTileRows;
        config.rows[tile] = kTileRows;
    }
    configure_tiles(&config);
}

// ---- weights to bfloat16 ----

// Rounds to nearest, ties to even; the first 16 are the low half.
YIVL_INLINE __m512i to_bfloats(__m512 first, __m512 second) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

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

YIVL_INLINE void put_row(std::byte* dst, int64_t step, __m512i v) { _mm512_store_si512(dst + step * kTileBytes, v); }

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
        _mm512_store_ps(scales, _mm512_mul_ps(from_i8(b.scales), _mm512_set1_ps(half_to_float(b.d))));
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

// 32 values, of which the first n are read and the rest are 0.
YIVL_INLINE __mmask32 first(int64_t n) { return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1; }

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

YIVL_INLINE __m512i bfloats_of(const float* x, int64_t n) {
    const __mmask32 mask = first(n);
    return to_bfloats(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), x),
                      _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), x + 16));
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

// A file may place its blocks at odd addresses, which nobody who writes files does.
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

// ---- x, packed: a tile for each 16 tokens and 32 columns, 0 where there are fewer tokens. A chunk of columns of all
// tokens lies together, and in it the tiles of the same tokens. ----

YIVL_INLINE void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    YIVL_UNROLL
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    YIVL_UNROLL
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    YIVL_UNROLL
    for (int j = 0; j < 4; ++j) {
        t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
        t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    }
    YIVL_UNROLL
    for (int j = 0; j < 4; ++j) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
        r[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
        r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
    }
}

int64_t packed_bytes(int64_t n_tokens, int64_t cols) {
    return divide_up(n_tokens, kTileTokens) * divide_up(cols, kTileCols) * kTileBytes;
}

// A tile of n <= 16 rows of at most 32 floats each: pairs of neighbours, one row of the tile for each pair.
YIVL_INLINE void pack_tile(std::byte* tile, const float* x, int64_t stride, int64_t n, int64_t cols, bool reorder) {
    const __m512i order = evens_then_odds();
    __m512i r[16];
    YIVL_UNROLL
    for (int t = 0; t < 16; ++t) {
        r[t] = t < n ? bfloats_of(x + t * stride, cols) : _mm512_setzero_si512();
        if (reorder) r[t] = _mm512_permutexvar_epi16(order, r[t]);
    }
    transpose(r);
    YIVL_UNROLL
    for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + i * 64, r[i]);
}

void pack(std::byte* dst, const PackedInput& p, int64_t group) {
    const int64_t token = group * kTileTokens;
    const int64_t n = min64(kTileTokens, p.n_tokens - token);
    const int64_t steps = divide_up(p.cols, kTileCols), token_tiles = divide_up(p.n_tokens, kTileTokens);
    for (int64_t step = 0; step < steps; ++step) {
        const int64_t chunk = step / kChunkSteps * kChunkSteps;
        const int64_t n_steps = min64(kChunkSteps, steps - chunk);
        const int64_t col = step * kTileCols;
        pack_tile(dst + (chunk * token_tiles + group * n_steps + step - chunk) * kTileBytes,
                  p.x + token * p.x_stride + col, p.x_stride, n, p.cols - col, p.order == 1);
    }
}

// ---- products ----

// y[t][row] = or += sums + bias for n_rows <= 16 rows and n_tokens <= 16 tokens; `sums` is an accumulator as stored.
void put_sums(const PackedPiece& p, const std::byte* sums, int64_t row, int64_t n_rows, int64_t token,
              int64_t n_tokens) {
    __m512i r[16];
    YIVL_UNROLL
    for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(sums + i * 64);
    transpose(r);
    const __mmask16 mask = static_cast<__mmask16>(first(n_rows));
    const __m512 bias = p.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, p.bias + row);
    float* y = p.y + token * p.y_stride + row;
    YIVL_UNROLL
    for (int t = 0; t < 16; ++t) {
        if (t < n_tokens) {
            const __m512 sum = _mm512_castsi512_ps(r[t]);
            __m512 out = p.bias == nullptr ? sum : _mm512_add_ps(sum, bias);
            if (p.add) out = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y + t * p.y_stride), out);
            _mm512_mask_storeu_ps(y + t * p.y_stride, mask, out);
        }
    }
}

// Sums of two row tiles for two token tiles.
constexpr int64_t kSumBytes = 4 * kTileBytes;

// How a product is cut: for each block of rows, for each chunk of columns, which is unpacked once for all tokens, for
// two token tiles, for two row tiles. x of two token tiles stays in the first-level cache; the block's unpacked weights
// and the sums, which wait there from chunk to chunk, stay in the second-level cache.
struct Cut {
    int64_t steps, row_tiles, token_tiles;
    int64_t block;  // row tiles, even

    Cut(int64_t n_tokens, int64_t n_rows, int64_t cols)
        : steps(divide_up(cols, kTileCols)),
          row_tiles(divide_up(n_rows, kTileRows)),
          token_tiles(divide_up(n_tokens, kTileTokens)),
          // For few tokens weights are rather taken in the order of the file: x stays in the second-level cache anyway.
          block(token_tiles <= kFewTokenTiles ? 2 : divide_up(row_tiles, 2) * 2) {}

    int64_t weight_bytes() const { return block * kChunkSteps * kTileBytes; }
    int64_t sum_bytes() const { return block * divide_up(token_tiles, 2) * 2 * kTileBytes; }

private:
    static constexpr int64_t kFewTokenTiles = 8;
};

// What is brought nearer while the tiles multiply, a few lines at a time. Products take a sixth longer if x is not.
class Ahead {
public:
    Ahead(const std::byte* rows, int64_t row_bytes, int64_t n_bytes, int64_t n_rows, int64_t n_blocks)
        : rows_(rows),
          row_bytes_(row_bytes),
          n_bytes_(n_bytes),
          n_rows_(n_rows),
          rows_of_block_(divide_up(n_rows, n_blocks)) {}

    // Of the next block, to the first-level cache; x_lines lines of x with each step, to the second-level cache.
    void begin_block(const std::byte* sums, const std::byte* x, int64_t x_lines) {
        sums_ = sums;
        x_ = x;
        x_lines_ = x_lines;
        // The next weights, as in the file.
        for (int64_t i = 0; i < rows_of_block_ && n_rows_ > 0; ++i, --n_rows_, rows_ += row_bytes_) {
            for (int64_t byte = 0; byte < n_bytes_ + 63; byte += 64) _mm_prefetch(rows_ + byte, _MM_HINT_T1);
        }
    }
    YIVL_INLINE void step(int64_t i) {
        constexpr int kLines = 8;
        if (i < kSumBytes / (kLines * 64)) {
            YIVL_UNROLL
            for (int line = 0; line < kLines; ++line) _mm_prefetch(sums_ + (i * kLines + line) * 64, _MM_HINT_T0);
        }
        for (int64_t line = 0; line < x_lines_; ++line, x_ += 64) _mm_prefetch(x_, _MM_HINT_T1);
    }

private:
    const std::byte* rows_;
    int64_t row_bytes_, n_bytes_, n_rows_, rows_of_block_;
    const std::byte* sums_ = nullptr;
    const std::byte* x_ = nullptr;
    int64_t x_lines_ = 0;
};

// R x T tiles of sums (1 or 2 each) over `steps` tiles of weights and x; four tiles of sums have room at `sums`. Only x
// shall stay in the first-level cache.
template <int R, int T>
void multiply_block(std::byte* sums, bool first, const std::byte* w, const std::byte* x, int64_t steps, Ahead& ahead) {
    const auto load_sums = [=]<int r, int t>() YIVL_TARGET_LAMBDA {
        if constexpr (r < R && t < T) {
            constexpr int i = r * 2 + t;
            first ? zero_tile<i>() : load_passing_tile<i>(sums + i * kTileBytes, 64);
        }
    };
    const auto store_sums = [=]<int r, int t>() YIVL_TARGET_LAMBDA {
        if constexpr (r < R && t < T) store_tile<r * 2 + t>(sums + (r * 2 + t) * kTileBytes, 64);
    };
    load_sums.template operator()<0, 0>();
    load_sums.template operator()<0, 1>();
    load_sums.template operator()<1, 0>();
    load_sums.template operator()<1, 1>();
    for (int64_t i = 0; i < steps; ++i) {
        load_tile<6>(x + i * kTileBytes, 64);
        load_passing_tile<4>(w + i * kTileBytes, 64);
        multiply_tiles<0, 4, 6>();
        if constexpr (R == 2) {
            load_passing_tile<5>(w + (kChunkSteps + i) * kTileBytes, 64);
            multiply_tiles<2, 5, 6>();
        }
        ahead.step(i);
        if constexpr (T == 2) {
            load_tile<7>(x + (steps + i) * kTileBytes, 64);
            multiply_tiles<1, 4, 7>();
            if constexpr (R == 2) multiply_tiles<3, 5, 7>();
        }
    }
    store_sums.template operator()<0, 0>();
    store_sums.template operator()<0, 1>();
    store_sums.template operator()<1, 0>();
    store_sums.template operator()<1, 1>();
}

int64_t scratch_bytes(int64_t n_tokens, int64_t n_rows, int64_t cols) {
    const Cut c(n_tokens, n_rows, cols);
    return c.weight_bytes() + c.sum_bytes();
}

// Tile rows beyond the last row of the weights keep what they held: they only make sums that nobody reads.
void linear(const PackedPiece& p, std::byte* scratch, bool (*stop)(const void*), const void* stop_arg) {
    const Unpack unpack = unpacker(p.type, p.w);
    const TypeInfo& info = type_info(p.type);
    const Cut c(p.n_tokens, p.n_rows, p.cols);
    std::byte* const waiting = scratch + c.weight_bytes();
    const auto weights = [&](int64_t row, int64_t step) {
        return p.w + row * kTileRows * p.row_bytes + step * kTileCols / info.block * info.bytes;
    };
    const auto unpacked = [&](int64_t row) { return scratch + row * kChunkSteps * kTileBytes; };
    begin_tiles();
    for (int64_t first = 0; first < c.row_tiles; first += c.block) {
        const int64_t last = min64(first + c.block, c.row_tiles);
        const int64_t row_pairs = divide_up(last - first, 2), token_pairs = divide_up(c.token_tiles, 2);
        for (int64_t step = 0; step < c.steps; step += kChunkSteps) {
            if (stop(stop_arg)) return release_tiles();
            const int64_t n_steps = min64(kChunkSteps, c.steps - step);
            const bool complete = step + n_steps == c.steps;
            for (int64_t r = first; r < last; ++r) {
                unpack({.type = p.type,
                        .src = weights(r, step),
                        .row_bytes = p.row_bytes,
                        .n_rows = min64(kTileRows, p.n_rows - r * kTileRows),
                        .n = min64(n_steps * kTileCols, p.cols - step * kTileCols),
                        .dst = unpacked(r - first)});
            }
            const int64_t x_bytes = 2 * n_steps * kTileBytes;  // of two token tiles
            Ahead ahead(complete ? weights(last, 0) : weights(first, step + n_steps), p.row_bytes,
                        n_steps * kTileCols / info.block * info.bytes, (last - first) * kTileRows,
                        row_pairs * token_pairs);
            for (int64_t t = 0; t < c.token_tiles; t += 2) {
                const bool two_tokens = t + 1 < c.token_tiles;
                const std::byte* const x = p.x + step * c.token_tiles * kTileBytes + t / 2 * x_bytes;
                std::byte* const sums = waiting + t / 2 * row_pairs * kSumBytes;
                for (int64_t r = 0; r < row_pairs; ++r) {
                    const bool two_rows = first + r * 2 + 1 < last;
                    const auto multiply = two_rows ? (two_tokens ? multiply_block<2, 2> : multiply_block<2, 1>)
                                                   : (two_tokens ? multiply_block<1, 2> : multiply_block<1, 1>);
                    ahead.begin_block(sums + (r + 1) * kSumBytes, x + x_bytes + r * divide_up(x_bytes, row_pairs),
                                      row_pairs == 1 ? 0 : divide_up(2 * kTileBytes / 64, row_pairs));
                    multiply(sums + r * kSumBytes, step == 0, unpacked(r * 2), x, n_steps, ahead);
                }
                if (!complete) continue;
                // All rows of 16 tokens together: each token's row of y lies in a page of its own.
                for (int64_t i = 0; i < min64(2, c.token_tiles - t); ++i) {
                    const int64_t token = (t + i) * kTileTokens;
                    for (int64_t r = first; r < last; ++r) {
                        put_sums(p, sums + ((r - first) * 2 + i) * kTileBytes, r * kTileRows,
                                 min64(kTileRows, p.n_rows - r * kTileRows), token,
                                 min64(kTileTokens, p.n_tokens - token));
                    }
                }
            }
        }
    }
    release_tiles();
}

#include "cpu/attention_amx.h"

int64_t multiply_add(int64_t rounds) {
    begin_tiles();
    alignas(64) static constexpr std::byte kZeros[kTileBytes] = {};
    load_tile<4>(kZeros, 64);
    load_tile<5>(kZeros, 64);
    load_tile<6>(kZeros, 64);
    load_tile<7>(kZeros, 64);
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
    for (int64_t i = 0; i < rounds; ++i) {
        multiply_tiles<0, 4, 6>();
        multiply_tiles<1, 4, 7>();
        multiply_tiles<2, 5, 6>();
        multiply_tiles<3, 5, 7>();
    }
    release_tiles();
    return rounds * 4 * kTileRows * kTileTokens * kTileCols * 2;
}

}  // namespace

}  // namespace yivl::amx

YIVL_TARGET_END

namespace yivl {

const PackedKernels kAmxPackedKernels = {
    .tokens = amx::kTileTokens,
    .order = amx::order,
    .packed_bytes = amx::packed_bytes,
    .pack = amx::pack,
    .scratch_bytes = amx::scratch_bytes,
    .linear = amx::linear,
    .multiply_add = amx::multiply_add,
};

const AttentionTiles kAmxAttentionKernels = {
    .memory_bytes = amx::attention_memory_bytes,
    .queries = amx::pack_queries,
    .scores = amx::scores,
    .values = amx::add_values,
};

}  // namespace yivl

#endif
