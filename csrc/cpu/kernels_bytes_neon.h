// The products of kernels_integer.h, to the bit, by instructions that multiply bytes: the integers of the weights fit
// one byte, those of x are cut in two, x = kHighByte * high + low. Included by kernels_neon.cpp once for each kind of
// instruction, after these definitions:
//
//   columns(p, stride, out)        16 bytes of kLanes rows; out[0] and out[1] hold columns [0, 8) as Sum takes them,
//                                  out[2] and out[3] columns [8, 16)
//   Sum                            multiply(w0, w1, x) adds the products of eight columns with eight high and eight low
//                                  bytes; total() has the sum of each row in a lane

namespace {

constexpr int kEights = kBlock / 8;  // of columns in a block

inline I and_bytes(I v, int n) { return vandq_s32(v, vreinterpretq_s32_s8(vdupq_n_s8(static_cast<int8_t>(n)))); }
inline I less_bytes(I v, int n) {
    return vreinterpretq_s32_s8(vsubq_s8(vreinterpretq_s8_s32(v), vdupq_n_s8(static_cast<int8_t>(n))));
}
// Shifts each byte, to the left if n is negative.
template <int n>
inline I down_bytes(I v) {
    const uint8x16_t bytes = vreinterpretq_u8_s32(v);
    if constexpr (n > 0) {
        return vreinterpretq_s32_u8(vshrq_n_u8(bytes, n));
    } else {
        return vreinterpretq_s32_u8(vshlq_n_u8(bytes, -n));
    }
}

// The low or the high nibble of each byte.
template <bool high>
inline I nibbles(I v) {
    return high ? down_bytes<4>(v) : and_bytes(v, 15);
}

// ---- weights ----
//
// unpack() as in kernels_integer.h. Vectors [0, 8) of a block are its columns. Where all of them or each half have an
// integer for a scale, that is vector 8, or 8 and 9, each as soon as its columns are there.

// As OfPairs, with the integer scales of a block.
template <bool one_scale, bool minimum, int scales>
struct OfBytes {
    using Sums = OfBytes;
    static constexpr bool kOneScale = one_scale, kMinimum = minimum;
    static constexpr int kScales = scales;
    static constexpr int kOffset = 0, kOrder = kPlainOrder;  // no offset is left
};
template <class Rows>
concept SummedAsBytes = requires { Rows::kScales; };

struct BytesQ8_0 : OfBytes<false, false, 0> {
    static constexpr int64_t kBytes = kSlabBlocks * sizeof(BlockQ8_0);
    template <class Sink>
    static YIVL_INLINE void unpack(const std::byte* p, int64_t row_bytes, Sink& sink) {
        repeat<kSlabBlocks>([&]<int b>() YIVL_INLINE_LAMBDA {
            const std::byte* const from = p + b * sizeof(BlockQ8_0);
            I q[8];
            columns(from + 2, row_bytes, q);
            columns(from + 18, row_bytes, q + 4);
            repeat<8>([&]<int i>() YIVL_INLINE_LAMBDA { sink.template vector<b, i>(q[i]); });
            sink.template finish<b>(halves(from, row_bytes), zero());
        });
    }
};

struct BytesQ4_0 : OfBytes<false, false, 0> {
    static constexpr int64_t kBytes = kSlabBlocks * sizeof(BlockQ4_0);
    template <class Sink>
    static YIVL_INLINE void unpack(const std::byte* p, int64_t row_bytes, Sink& sink) {
        repeat<kSlabBlocks>([&]<int b>() YIVL_INLINE_LAMBDA {
            const std::byte* const from = p + b * sizeof(BlockQ4_0);
            I q[4];
            columns(from + 2, row_bytes, q);
            repeat<8>([&]<int i>() YIVL_INLINE_LAMBDA {
                sink.template vector<b, i>(less_bytes(nibbles<(i >= 4)>(q[i % 4]), 8));
            });
            sink.template finish<b>(halves(from, row_bytes), zero());
        });
    }
};

struct BytesQ4_K : OfBytes<true, true, 1> {
    static constexpr int64_t kBytes = sizeof(BlockQ4_K);
    template <class Sink>
    static YIVL_INLINE void unpack(const std::byte* p, int64_t row_bytes, Sink& sink) {
        const SixBits six_bits(p, row_bytes);
        repeat<4>([&]<int two>() YIVL_INLINE_LAMBDA {
            I q[8];
            columns(p + 16 + two * 32, row_bytes, q);
            columns(p + 32 + two * 32, row_bytes, q + 4);
            repeat<2>([&]<int half>() YIVL_INLINE_LAMBDA {
                repeat<8>([&]<int i>() YIVL_INLINE_LAMBDA {
                    sink.template vector<two * 2 + half, i>(nibbles < half == 1 > (q[i]));
                });
                constexpr int g = two * 2 + half;
                sink.template vector<g, 8>(six_bits.template scale<g>());
                sink.template finish<g>(six_bits.d, six_bits.template offset<g>());
            });
        });
    }
};

struct BytesQ5_K : OfBytes<true, true, 1> {
    static constexpr int64_t kBytes = sizeof(BlockQ5_K);
    template <class Sink>
    static YIVL_INLINE void unpack(const std::byte* p, int64_t row_bytes, Sink& sink) {
        const SixBits six_bits(p, row_bytes);
        I fifth[8];
        columns(p + 16, row_bytes, fifth);
        columns(p + 32, row_bytes, fifth + 4);
        repeat<4>([&]<int two>() YIVL_INLINE_LAMBDA {
            I q[8];
            columns(p + 48 + two * 32, row_bytes, q);
            columns(p + 64 + two * 32, row_bytes, q + 4);
            repeat<2>([&]<int half>() YIVL_INLINE_LAMBDA {
                constexpr int g = two * 2 + half;
                repeat<8>([&]<int i>() YIVL_INLINE_LAMBDA {
                    // Bit g of each byte becomes bit 4.
                    const I high = and_bytes(down_bytes<g - 4>(fifth[i]), 16);
                    sink.template vector<g, i>(any_bits(nibbles < half == 1 > (q[i]), high));
                });
                sink.template vector<g, 8>(six_bits.template scale<g>());
                sink.template finish<g>(six_bits.d, six_bits.template offset<g>());
            });
        });
    }
};

struct BytesQ6_K : OfBytes<true, false, 2> {
    static constexpr int64_t kBytes = sizeof(BlockQ6_K);
    template <class Sink>
    static YIVL_INLINE void unpack(const std::byte* p, int64_t row_bytes, Sink& sink) {
        I scales[4];
        dwords(p + 192, row_bytes, scales);
        const F d = halves(p + 208, row_bytes);
        repeat<2>([&]<int half>() YIVL_INLINE_LAMBDA {
            // Columns [c, c + 16) of four blocks at a time.
            repeat<2>([&]<int part>() YIVL_INLINE_LAMBDA {
                I low[4], next[4], high[4];
                columns(p + half * 64 + part * 16, row_bytes, low);
                columns(p + half * 64 + part * 16 + 32, row_bytes, next);
                columns(p + 128 + half * 32 + part * 16, row_bytes, high);
                repeat<4>([&]<int b>() YIVL_INLINE_LAMBDA {
                    repeat<4>([&]<int i>() YIVL_INLINE_LAMBDA {
                        const I four = nibbles < b / 2 == 1 > ((b % 2 == 0 ? low : next)[i]);
                        // Bits 2b and 2b + 1 of each byte become bits 4 and 5.
                        const I two = and_bytes(down_bytes<b * 2 - 4>(high[i]), 48);
                        sink.template vector<half * 4 + b, part * 4 + i>(less_bytes(any_bits(four, two), 32));
                    });
                    constexpr int group = half * 8 + b * 2 + part;  // of 16 columns
                    sink.template vector<half * 4 + b, 8 + part>(signed_byte<group % 4>(scales[group / 4]));
                });
            });
            repeat<4>([&]<int b>() YIVL_INLINE_LAMBDA { sink.template finish<half * 4 + b>(d, zero()); });
        });
    }
};

struct ByteRows {
    using Q8_0 = BytesQ8_0;
    using Q4_0 = BytesQ4_0;
    using Q4_K = BytesQ4_K;
    using Q5_K = BytesQ5_K;
    using Q6_K = BytesQ6_K;
};

// ---- x ----

// Eight columns of a block: high bytes, then low bytes.
inline I eight_columns(const InputSlab& x, int64_t block, int eight) {
    return vreinterpretq_s32_s16(vld1q_s16(x.integers[block] + eight * 8));
}

inline void round_to_bytes(const float* x, float factor, int16_t* dst, int32_t* sums) {
    for (int part = 0; part < 2; ++part) {
        I sum = no_integers();
        for (int i = part * 16; i < part * 16 + 16; i += 8) {
            const EightIntegers eight(x + i, factor);
            sum = add_integers(sum, eight.sum());
            const int16x8_t all = eight.narrow();
            const int8x8_t low = vmovn_s16(vandq_s16(all, vdupq_n_s16(kHighByte - 1)));
            vst1q_s8(reinterpret_cast<int8_t*>(dst + i), vcombine_s8(vshrn_n_s16(all, 7), low));
        }
        sums[part] = vaddvq_s32(sum);
    }
}

// ---- one token ----

// Multiplies columns as soon as they are unpacked.
template <class Rows>
struct OneToken {
    F& total;
    const InputSlab& x;
    const int64_t n_blocks;
    Ahead<Rows>& ahead;
    I first;  // of two vectors that go together
    Sum sum;
    I scaled[kSlabBlocks];
    SlabSum slab;

    template <int b, int i>
    YIVL_INLINE void vector(I v) {
        if constexpr (i >= 2 * kEights) {
            const I part = times_integers(sum.total(), v);
            scaled[b] = i == 2 * kEights ? part : add_integers(scaled[b], part);
            sum = Sum();
        } else if constexpr (i % 2 == 0) {
            first = v;
        } else {
            ahead.template fetch<b * kEights + i / 2, kSlabBlocks * kEights>();
            sum.multiply(first, v, eight_columns(x, b, i / 2));
        }
    }
    template <int b>
    YIVL_INLINE void finish(F scale, F minimum) {
        if constexpr (Rows::kOneScale) {
            slab.add_block(scaled[b], x, b);
            if constexpr (Rows::kMinimum) total = fma(minimum, set1(x.minus_sum[b]), total);
            if constexpr (b == kSlabBlocks - 1) slab.add_to(total, scale);
        } else {
            if (b < n_blocks) add_block(total, sum.total(), scale, x, b);
            sum = Sum();
        }
    }
};

template <SummedAsBytes Rows>
YIVL_INLINE void multiply_slab(Rows, F& total, const std::byte* p, int64_t row_bytes, const InputSlab& x,
                               int64_t n_blocks, Ahead<Rows>& ahead) {
    OneToken<Rows> sink{total, x, n_blocks, ahead, {}, {}, {}, {}};
    Rows::unpack(p, row_bytes, sink);
}

// ---- many tokens ----

// As its namesake for pairs.
template <int T, SummedAsBytes Sums>
void multiply_tile(Sums, NextTurn& next_turn, F* sums, const WeightSlab* w, const InputSlab* x, int64_t n_blocks,
                   bool first) {
    constexpr int R = kIntegerRows;
    constexpr int kParts = Sums::kScales == 2 ? 2 : 1;
    F total[R][T];
    SlabSum slab[R][T];
    YIVL_UNROLL
    for (int r = 0; r < R; ++r) {
        YIVL_UNROLL
        for (int t = 0; t < T; ++t) total[r][t] = first ? zero() : sums[r * kIntegerTokens + t];
    }
    for (int64_t b = 0; b < n_blocks; ++b) {
        next_turn.fetch_some();
        YIVL_UNROLL
        for (int t = 0; t < T; ++t) prefetch(reinterpret_cast<const std::byte*>(x[T + t].integers[b]));
        I block[R][T];
        YIVL_UNROLL
        for (int part = 0; part < kParts; ++part) {
            Sum acc[R][T];
            YIVL_UNROLL
            for (int i = part * kEights / kParts; i < (part + 1) * kEights / kParts; ++i) {
                YIVL_UNROLL
                for (int t = 0; t < T; ++t) {
                    const I xs = eight_columns(x[t], b, i);
                    YIVL_UNROLL
                    for (int r = 0; r < R; ++r) {
                        const I* const pair = w[r].blocks[b].pairs + i * 2;
                        acc[r][t].multiply(load_integers(pair), load_integers(pair + 1), xs);
                    }
                }
            }
            YIVL_UNROLL
            for (int r = 0; r < R; ++r) {
                YIVL_UNROLL
                for (int t = 0; t < T; ++t) {
                    I sum = acc[r][t].total();
                    if constexpr (Sums::kScales > 0) {
                        sum = times_integers(sum, load_integers(&w[r].blocks[b].pairs[2 * kEights + part]));
                    }
                    block[r][t] = part == 0 ? sum : add_integers(block[r][t], sum);
                }
            }
        }
        YIVL_UNROLL
        for (int r = 0; r < R; ++r) {
            const WeightBlock& weights = w[r].blocks[b];
            YIVL_UNROLL
            for (int t = 0; t < T; ++t) {
                if constexpr (Sums::kOneScale) {
                    slab[r][t].add_block(block[r][t], x[t], b);
                    if constexpr (Sums::kMinimum) {
                        total[r][t] = fma(weights.minimum, set1(x[t].minus_sum[b]), total[r][t]);
                    }
                } else {
                    add_block(total[r][t], block[r][t], weights.scale, x[t], b);
                }
            }
        }
    }
    YIVL_UNROLL
    for (int r = 0; r < R; ++r) {
        YIVL_UNROLL
        for (int t = 0; t < T; ++t) {
            if constexpr (Sums::kOneScale) slab[r][t].add_to(total[r][t], w[r].blocks[0].scale);
            sums[r * kIntegerTokens + t] = total[r][t];
        }
    }
}

// ---- the table ----

int64_t multiply_add_bytes(int64_t rounds) {
    constexpr int kSums = 6;
    Sum acc[kSums];
    const I w = integers(1), x = integers(2);
    for (int64_t r = 0; r < rounds; ++r) {
        YIVL_UNROLL
        for (int i = 0; i < kSums; ++i) acc[i].multiply(w, w, x);
    }
    for (int i = 0; i < kSums; ++i) {
        const I total = acc[i].total();
        asm volatile("" : : "m"(total));  // or the compiler would leave it all out
    }
    return rounds * kSums * kLanes * 8 * 2;
}

const PackedKernels kByteKernels = {
    .tokens = kTokensOfGroup,
    .order = order_of_integers<ByteRows>,
    .packed_bytes = packed_integer_bytes,
    .pack = pack_integers<round_to_bytes>,
    .scratch_bytes = integer_scratch_bytes,
    .linear = multiply_integers<ByteRows>,
    .multiply_add = multiply_add_bytes,
};

}  // namespace
