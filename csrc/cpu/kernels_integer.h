// Products of weights that a file holds as small integers, with x rounded to 15-bit integers: a common scale for every
// 32 columns of a row of x, a relative error of about 5e-5. Where integers are quicker than float32, weights of 16 bits
// are rounded in the same way, to about the same error. The products of 32 columns are summed exactly, whatever the
// order, and these sums are scaled and added in float32 in order of the columns. So one token alone, whose weights go
// from memory to the sum without a stop, gets the same values as one among many, for which they are unpacked once.
//
// Lanes are rows of the weights: four bytes of each of kLanes rows are brought together, from which come the
// integers of pairs of columns. Columns are paired as bytes 0 and 2, 1 and 3; those of 16-bit weights with their
// neighbours.
//
// Included as kernels_body.h is, after it, and needs besides the names listed there:
//
//   I                              a vector of kLanes int32, or of 2 * kLanes int16
//   kIntegerTokens                 tokens of a tile, which is two vectors of rows high
//   kHalvesAsIntegers              whether 16-bit weights are multiplied as integers
//   kSumsOfPairs                   whether many tokens are multiplied as sums: see multiply_pairs_of_sums
//   load_integers(p) store_integers(p, v) integers(n) no_integers() add_integers(a, b) times_integers(a, b)
//   negative(v)                    of int32
//   up32<n>(v) down32<n>(v) to_floats(v)    of int32: shifts (down32 with the sign)
//   pair(p)                        the two int16 at p, in every lane
//   multiply_pairs(sums, a, b)     sums + a[2l] * b[2l] + a[2l + 1] * b[2l + 1] in every lane l
//   multiply_pairs_at(sums, a, p)  the same with pair(p) for b
//   low_bits(v, n) any_bits(a, b) down<n>(v) up<n>(v) signed_down<n>(v) less(v, n) plus(a, b) times(a, b)    of int16:
//                                  v & n, a | b, shifts, v - n, a + b, the low half of a product
//   byte<n>(v)                     byte n of each lane, as int32
//   signed_byte<n>(v)              byte n of each lane with its sign, as int32
//   spread_byte<n>(v)              the same as two int16
//   half_of_lane<n>(v)             half n of each lane, a half-precision number, as a float
//   bfloat_of_lane<n>(v)           the same of a bfloat16 number
//   to_pairs(a, b)                 floats rounded to integers: a in the first half of each lane, b in the second
//   sqrt(v)                        of floats
//   dwords(p, stride, out)         out[j] = bytes [4j, 4j + 4) at p + l * stride in lane l, j in [0, 4)
//   halves(p, stride)              the half-precision number at p + l * stride in lane l, as a float
//   largest_magnitude(x)           of 32 numbers; a NaN is larger than all
//   squares_of_block(x, factor)    the sum of the squares of 32 numbers times `factor`
//   round_block(x, factor, dst, sums)   32 numbers times `factor`, to the nearest integers, their columns paired, and
//                                  the sums of the first 16 and of the others
//   round_in_order(x, factor, dst)      32 numbers times `factor`, to the nearest integers

namespace {

constexpr int kPairs = kBlock / 2;  // of columns in a block
constexpr int kSlabBlocks = kSuperBlock / kBlock;
// Both operands are cut into slabs of this many columns.
constexpr int64_t kSlabCols = kSuperBlock;
// Sixteen bits less two: 32 products of a row of Q6_K, integers up to 32 * 128, must not overflow 32 bits.
constexpr float kLargestInteger = 16383.0f;
// Where both operands are rounded, a block of each may be so long as a vector, rounding not counted: then no sum of
// products overflows 32 bits (Cauchy-Schwarz), and of ordinary numbers the largest have 15 bits.
constexpr float kLongestBlock = 46330.0f;
constexpr float kLargestPair = 32767.0f;

// A slab of one row of x.
struct alignas(64) InputSlab {
    int16_t integers[kSlabBlocks][kBlock];
    float scale[kSlabBlocks];
    float minus_sum[kSlabBlocks];         // of the rounded values
    int32_t sums[kSlabBlocks][2];         // of the integers of half a block
    int32_t minus_products[kSlabBlocks];  // of the integers of columns that are multiplied as sums, modulo 2^32
};

// ---- weights ----
//
// unpack(p, row_bytes, sink) takes kBlocks blocks of kLanes rows. The sink gets vector<b, i>(v) with the integers of
// the i-th pair of columns of block b, kOffset too large, then finish<b>(scale, minimum): weight = scale * integer -
// minimum. With kOneScale the blocks of a slab have one scale: integers that the file has for smaller groups of columns
// are in the integers.

template <int n, class Fn>
YIVL_INLINE void repeat(Fn&& fn) {
    if constexpr (n > 0) {
        repeat<n - 1>(fn);
        fn.template operator()<n - 1>();
    }
}

struct RowsQ8_0 {
    static constexpr int kBlocks = 1, kOffset = 0;
    static constexpr int64_t kBytes = sizeof(BlockQ8_0);
    static constexpr bool kMinimum = false, kOneScale = false;
    template <class Sink>
    static YIVL_INLINE void unpack(const std::byte* p, int64_t row_bytes, Sink& sink) {
        I q[8];
        dwords(p + 2, row_bytes, q);
        dwords(p + 18, row_bytes, q + 4);
        repeat<kPairs>([&]<int i>() YIVL_INLINE_LAMBDA {
            sink.template vector<0, i>(signed_down<8>(i % 2 == 0 ? up<8>(q[i / 2]) : q[i / 2]));
        });
        sink.template finish<0>(halves(p, row_bytes), zero());
    }
};

struct RowsQ4_0 {
    static constexpr int kBlocks = 1, kOffset = 8;
    static constexpr int64_t kBytes = sizeof(BlockQ4_0);
    static constexpr bool kMinimum = false, kOneScale = false;
    template <class Sink>
    static YIVL_INLINE void unpack(const std::byte* p, int64_t row_bytes, Sink& sink) {
        I q[4];
        dwords(p + 2, row_bytes, q);
        repeat<kPairs>([&]<int i>() YIVL_INLINE_LAMBDA {
            sink.template vector<0, i>(low_bits(down<i / 8 * 4 + i % 2 * 8>(q[i / 2 % 4]), 15));
        });
        sink.template finish<0>(halves(p, row_bytes), zero());
    }
};

// Scales and minima of a Q4_K or Q5_K block of kLanes rows: six bits each in the file.
struct SixBits {
    F d, minimum;
    I low_scales, high_scales, low_minima, high_minima;  // groups 0 to 3, 4 to 7 in the bytes of each lane

    YIVL_INLINE SixBits(const std::byte* p, int64_t row_bytes) {
        I w[4];
        dwords(p, row_bytes, w);
        d = half_of_lane<0>(w[0]);
        minimum = half_of_lane<1>(w[0]);
        low_scales = low_bits(w[1], 0x3f3f);
        low_minima = low_bits(w[2], 0x3f3f);
        high_scales = any_bits(low_bits(w[3], 0x0f0f), low_bits(down<2>(w[1]), 0x3030));
        high_minima = any_bits(low_bits(down<4>(w[3]), 0x0f0f), low_bits(down<2>(w[2]), 0x3030));
    }
    // Of group g, to be multiplied by `d`.
    template <int g>
    YIVL_INLINE I scale() const {
        return byte<g % 4>(g < 4 ? low_scales : high_scales);
    }
    template <int g>
    YIVL_INLINE I scale_of_pairs() const {
        return spread_byte<g % 4>(g < 4 ? low_scales : high_scales);
    }
    template <int g>
    YIVL_INLINE F offset() const {
        return mul(minimum, to_floats(byte<g % 4>(g < 4 ? low_minima : high_minima)));
    }
};

struct RowsQ4_K {
    static constexpr int kBlocks = kSlabBlocks, kOffset = 0;
    static constexpr int64_t kBytes = sizeof(BlockQ4_K);
    static constexpr bool kMinimum = true, kOneScale = true;
    template <class Sink>
    static YIVL_INLINE void unpack(const std::byte* p, int64_t row_bytes, Sink& sink) {
        const SixBits six_bits(p, row_bytes);
        repeat<4>([&]<int two>() YIVL_INLINE_LAMBDA {
            const std::byte* from = p + 16 + two * 32;
            I q[8];
            dwords(from, row_bytes, q);
            dwords(from + 16, row_bytes, q + 4);
            repeat<2>([&]<int half>() YIVL_INLINE_LAMBDA {
                constexpr int g = two * 2 + half;
                const I scale = six_bits.template scale_of_pairs<g>();
                repeat<kPairs>([&]<int i>() YIVL_INLINE_LAMBDA {
                    sink.template vector<g, i>(times(low_bits(down<half * 4 + i % 2 * 8>(q[i / 2]), 15), scale));
                });
                sink.template finish<g>(six_bits.d, six_bits.template offset<g>());
            });
        });
    }
};

struct RowsQ5_K {
    static constexpr int kBlocks = kSlabBlocks, kOffset = 0;
    static constexpr int64_t kBytes = sizeof(BlockQ5_K);
    static constexpr bool kMinimum = true, kOneScale = true;
    template <class Sink>
    static YIVL_INLINE void unpack(const std::byte* p, int64_t row_bytes, Sink& sink) {
        const SixBits six_bits(p, row_bytes);
        I fifth[8];
        dwords(p + 16, row_bytes, fifth);
        dwords(p + 32, row_bytes, fifth + 4);
        repeat<4>([&]<int two>() YIVL_INLINE_LAMBDA {
            const std::byte* from = p + 48 + two * 32;
            I q[8];
            dwords(from, row_bytes, q);
            dwords(from + 16, row_bytes, q + 4);
            repeat<2>([&]<int half>() YIVL_INLINE_LAMBDA {
                constexpr int g = two * 2 + half;
                const I scale = six_bits.template scale_of_pairs<g>();
                repeat<kPairs>([&]<int i>() YIVL_INLINE_LAMBDA {
                    // Bit g of each byte becomes bit 4.
                    constexpr int by = g - 4 + i % 2 * 8;
                    I high = fifth[i / 2];
                    if constexpr (by >= 0) {
                        high = down<by>(high);
                    } else {
                        high = up<-by>(high);
                    }
                    const I low = low_bits(down<half * 4 + i % 2 * 8>(q[i / 2]), 15);
                    sink.template vector<g, i>(times(any_bits(low, low_bits(high, 16)), scale));
                });
                sink.template finish<g>(six_bits.d, six_bits.template offset<g>());
            });
        });
    }
};

struct RowsQ6_K {
    static constexpr int kBlocks = kSlabBlocks, kOffset = 0;
    static constexpr int64_t kBytes = sizeof(BlockQ6_K);
    static constexpr bool kMinimum = false, kOneScale = true;
    template <class Sink>
    static YIVL_INLINE void unpack(const std::byte* p, int64_t row_bytes, Sink& sink) {
        I scales[4];
        dwords(p + 192, row_bytes, scales);
        const F d = halves(p + 208, row_bytes);
        repeat<2>([&]<int half>() YIVL_INLINE_LAMBDA {
            // Columns [c, c + 16) of four blocks at a time.
            repeat<2>([&]<int part>() YIVL_INLINE_LAMBDA {
                I low[4], next[4], high[4];
                dwords(p + half * 64 + part * 16, row_bytes, low);
                dwords(p + half * 64 + part * 16 + 32, row_bytes, next);
                dwords(p + 128 + half * 32 + part * 16, row_bytes, high);
                repeat<4>([&]<int b>() YIVL_INLINE_LAMBDA {
                    constexpr int group = half * 8 + b * 2 + part;  // of 16 columns
                    const I scale = spread_byte<group % 4>(scales[group / 4]);
                    repeat<kPairs / 2>([&]<int i>() YIVL_INLINE_LAMBDA {
                        const I four = low_bits(down<b / 2 * 4 + i % 2 * 8>((b % 2 == 0 ? low : next)[i / 2]), 15);
                        // Bits 2b and 2b + 1 of each byte become bits 4 and 5.
                        constexpr int by = b * 2 - 4 + i % 2 * 8;
                        I two = high[i / 2];
                        if constexpr (by >= 0) {
                            two = down<by>(two);
                        } else {
                            two = up<-by>(two);
                        }
                        const I q = less(any_bits(four, low_bits(two, 48)), 32);
                        sink.template vector<half * 4 + b, part*(kPairs / 2) + i>(times(q, scale));
                    });
                });
            });
            repeat<4>([&]<int b>() YIVL_INLINE_LAMBDA { sink.template finish<half * 4 + b>(d, zero()); });
        });
    }
};

// Weights of 16 bits: number<n>(v) is half n of each lane.
template <class Number>
struct RowsHalves {
    static constexpr int kBlocks = 1, kOffset = 0;
    static constexpr int64_t kBytes = kBlock * 2;
    static constexpr bool kMinimum = false, kOneScale = false;
    template <class Sink>
    static YIVL_INLINE void unpack(const std::byte* p, int64_t row_bytes, Sink& sink) {
        F w[kBlock];
        F most = zero();
        repeat<4>([&]<int quarter>() YIVL_INLINE_LAMBDA {
            I v[4];
            dwords(p + quarter * 16, row_bytes, v);
            repeat<4>([&]<int j>() YIVL_INLINE_LAMBDA {
                constexpr int i = quarter * 8 + j * 2;
                w[i] = Number::template of<0>(v[j]);
                w[i + 1] = Number::template of<1>(v[j]);
                most = max(most, max(abs(w[i]), abs(w[i + 1])));
            });
        });
        // What is smaller has no reciprocal, and counts as nothing.
        const F inverse = below(set1(1.0e-34f), most, div(set1(1.0f), most), zero());
        F squares[4] = {zero(), zero(), zero(), zero()};
        repeat<kBlock>([&]<int i>() YIVL_INLINE_LAMBDA {
            w[i] = mul(w[i], inverse);
            squares[i % 4] = fma(w[i], w[i], squares[i % 4]);
        });
        const F square = add(add(squares[0], squares[1]), add(squares[2], squares[3]));
        const F factor = min(div(set1(kLongestBlock), sqrt(square)), set1(kLargestPair));
        repeat<kPairs>([&]<int i>() YIVL_INLINE_LAMBDA {
            sink.template vector<0, i>(to_pairs(mul(w[2 * i], factor), mul(w[2 * i + 1], factor)));
        });
        // An infinity or no number must not get lost: both make `square` no number.
        sink.template finish<0>(fma(square, zero(), div(most, factor)), zero());
    }
};

struct Half {
    template <int n>
    static YIVL_INLINE F of(I v) {
        return half_of_lane<n>(v);
    }
};

struct Bfloat {
    template <int n>
    static YIVL_INLINE F of(I v) {
        return bfloat_of_lane<n>(v);
    }
};

struct PairRows {
    using Q8_0 = RowsQ8_0;
    using Q4_0 = RowsQ4_0;
    using Q4_K = RowsQ4_K;
    using Q5_K = RowsQ5_K;
    using Q6_K = RowsQ6_K;
};

// ---- one token ----
//
// Bits of a weight are multiplied where they stand in a lane of 16, as long as the sum of a block fits 32 bits: so one
// shift of the sum takes the place of one for every pair of columns.

// Weights come in two steps, a little at a time: fetched in one burst, they would keep loads from the cache waiting.
// Groups of kLanes rows that come later are fetched to the second-level cache in the order of the file, which is how
// memory and the hardware's own prefetching are quick; from there the next slab of these rows to the first-level cache,
// row by row.
constexpr int64_t kGroupsAhead = 2;

template <class Rows>
struct Ahead {
    static constexpr int64_t kSlabBytes = kSlabBlocks / Rows::kBlocks * Rows::kBytes;
    // The last bytes of a slab may share a line with the next.
    static constexpr int kRowLines = (kSlabBytes + 63) / 64, kNear = kLanes * kRowLines;
    static constexpr int kFar = (kLanes * kSlabBytes + 63) / 64;

    const std::byte* near;
    int64_t row_bytes;
    const std::byte* far;

    // What step `step` of the n_steps of a slab fetches.
    template <int step, int n_steps>
    YIVL_INLINE void fetch() {
        repeat<(step + 1) * kNear / n_steps - step * kNear / n_steps>([&]<int i>() YIVL_INLINE_LAMBDA {
            constexpr int n = step * kNear / n_steps + i;
            prefetch(near + n % kRowLines * 64);
            if constexpr (n % kRowLines == kRowLines - 1) near += row_bytes;
        });
        repeat<(step + 1) * kFar / n_steps - step * kFar / n_steps>(
            [&]<int i>() YIVL_INLINE_LAMBDA { prefetch_far(far + (step * kFar / n_steps + i) * 64); });
    }
    // The share of a block of 32 columns.
    YIVL_INLINE void fetch_some(int64_t block) {
        for (int64_t n = kLanes * (block + 1) / kSlabBlocks - kLanes * block / kSlabBlocks; n > 0; --n) {
            YIVL_UNROLL
            for (int line = 0; line < kRowLines; ++line) prefetch(near + line * 64);
            near += row_bytes;
        }
        for (int64_t n = kFar * (block + 1) / kSlabBlocks - kFar * block / kSlabBlocks; n > 0; --n, far += 64) {
            prefetch_far(far);
        }
    }
};

// The low or the high nibbles of bytes times x. `offset` counts as often as a nibble of byte 0 does.
template <bool high>
struct NibbleSum {
    I even, odd;

    explicit YIVL_INLINE NibbleSum(I offset) : even(offset), odd(no_integers()) {}

    // x begins with the columns of bytes 0 and 2; those of bytes 1 and 3 follow.
    YIVL_INLINE void add(I bytes, const int16_t* x) {
        even = multiply_pairs_at(even, low_bits(bytes, high ? 0x00f0 : 0x000f), x);
        odd = multiply_pairs_at(odd, high ? down<12>(bytes) : low_bits(bytes, 0x0f00), x + 2);
    }
    YIVL_INLINE I total() const {
        return high ? add_integers(down32<4>(even), odd) : add_integers(even, down32<8>(odd));
    }
};

// Bits [first, first + n) of bytes, times x and `factor`.
template <int first, int n, int factor>
struct BitSum {
    I sum;

    YIVL_INLINE BitSum() : sum(no_integers()) {}
    // `odd` holds bytes 1 and 3 in place of 0 and 2.
    YIVL_INLINE void add(I bytes, I odd, const int16_t* x) {
        constexpr int kMask = ((1 << n) - 1) << first;
        sum = multiply_pairs_at(sum, low_bits(bytes, kMask), x);
        sum = multiply_pairs_at(sum, low_bits(odd, kMask), x + 2);
    }
    YIVL_INLINE I total() const {
        constexpr int kFactor = __builtin_ctz(factor);
        if constexpr (kFactor >= first) {
            return up32<kFactor - first>(sum);
        } else {
            return down32<first - kFactor>(sum);
        }
    }
};

// total += weights of a block times x, from the sum of the integers.
YIVL_INLINE void add_block(F& total, I sum, F scale, const InputSlab& x, int64_t block) {
    total = fma(to_floats(sum), mul(scale, set1(x.scale[block])), total);
}

// The same for a slab whose blocks have one scale.
struct SlabSum {
    F sum;

    YIVL_INLINE SlabSum() : sum(zero()) {}
    YIVL_INLINE void add_block(I block_sum, const InputSlab& x, int64_t block) {
        sum = fma(to_floats(block_sum), set1(x.scale[block]), sum);
    }
    YIVL_INLINE void add_to(F& total, F scale) const { total = fma(sum, scale, total); }
    YIVL_INLINE void add_to(F& total, const SixBits& six_bits, const InputSlab& x) const {
        repeat<kSlabBlocks>([&]<int b>() YIVL_INLINE_LAMBDA {
            total = fma(six_bits.template offset<b>(), set1(x.minus_sum[b]), total);
        });
        add_to(total, six_bits.d);
    }
};

// total += a row's blocks from p, times blocks [block, block + Rows::kBlocks) of x, in every lane
YIVL_INLINE void multiply_blocks(RowsQ8_0, F& total, const std::byte* p, int64_t row_bytes, const InputSlab& x,
                                 int64_t block, Ahead<RowsQ8_0>& ahead) {
    I q[8], sums[4];
    ahead.fetch_some(block);
    dwords(p + 2, row_bytes, q);
    dwords(p + 18, row_bytes, q + 4);
    YIVL_UNROLL
    for (int i = 0; i < 4; ++i) sums[i] = no_integers();
    repeat<8>([&]<int j>() YIVL_INLINE_LAMBDA {
        const int16_t* const from = x.integers[block] + j * 4;
        I &even = sums[j % 2 * 2], &odd = sums[j % 2 * 2 + 1];
        even = multiply_pairs_at(even, signed_down<8>(up<8>(q[j])), from);
        odd = multiply_pairs_at(odd, signed_down<8>(q[j]), from + 2);
    });
    const I sum = add_integers(add_integers(sums[0], sums[1]), add_integers(sums[2], sums[3]));
    add_block(total, sum, halves(p, row_bytes), x, block);
}

YIVL_INLINE void multiply_blocks(RowsQ4_0, F& total, const std::byte* p, int64_t row_bytes, const InputSlab& x,
                                 int64_t block, Ahead<RowsQ4_0>& ahead) {
    I q[4];
    ahead.fetch_some(block);
    dwords(p + 2, row_bytes, q);
    NibbleSum<false> low(integers(-8 * (x.sums[block][0] + x.sums[block][1])));
    NibbleSum<true> high(no_integers());
    repeat<4>([&]<int j>() YIVL_INLINE_LAMBDA {
        low.add(q[j], x.integers[block] + j * 4);
        high.add(q[j], x.integers[block] + kBlock / 2 + j * 4);
    });
    add_block(total, add_integers(low.total(), high.total()), halves(p, row_bytes), x, block);
}

YIVL_INLINE void multiply_blocks(RowsQ4_K, F& total, const std::byte* p, int64_t row_bytes, const InputSlab& x, int64_t,
                                 Ahead<RowsQ4_K>& ahead) {
    const SixBits six_bits(p, row_bytes);
    SlabSum slab;
    repeat<4>([&]<int two>() YIVL_INLINE_LAMBDA {
        I q[8];
        dwords(p + 16 + two * 32, row_bytes, q);
        dwords(p + 32 + two * 32, row_bytes, q + 4);
        NibbleSum<false> low(no_integers());
        NibbleSum<true> high(no_integers());
        repeat<8>([&]<int j>() YIVL_INLINE_LAMBDA {
            ahead.template fetch<two * 8 + j, 32>();
            low.add(q[j], x.integers[two * 2] + j * 4);
            high.add(q[j], x.integers[two * 2 + 1] + j * 4);
        });
        slab.add_block(times_integers(low.total(), six_bits.template scale<two * 2>()), x, two * 2);
        slab.add_block(times_integers(high.total(), six_bits.template scale<two * 2 + 1>()), x, two * 2 + 1);
    });
    slab.add_to(total, six_bits, x);
}

YIVL_INLINE void multiply_blocks(RowsQ5_K, F& total, const std::byte* p, int64_t row_bytes, const InputSlab& x, int64_t,
                                 Ahead<RowsQ5_K>& ahead) {
    const SixBits six_bits(p, row_bytes);
    SlabSum slab;
    I fifth[8], odd_fifth[8];
    dwords(p + 16, row_bytes, fifth);
    dwords(p + 32, row_bytes, fifth + 4);
    YIVL_UNROLL
    for (int j = 0; j < 8; ++j) odd_fifth[j] = down<8>(fifth[j]);
    repeat<4>([&]<int two>() YIVL_INLINE_LAMBDA {
        I q[8];
        dwords(p + 48 + two * 32, row_bytes, q);
        dwords(p + 64 + two * 32, row_bytes, q + 4);
        NibbleSum<false> low(no_integers());
        NibbleSum<true> high(no_integers());
        BitSum<two * 2, 1, 16> low_fifth;
        BitSum<two * 2 + 1, 1, 16> high_fifth;
        repeat<8>([&]<int j>() YIVL_INLINE_LAMBDA {
            ahead.template fetch<two * 8 + j, 32>();
            low.add(q[j], x.integers[two * 2] + j * 4);
            low_fifth.add(fifth[j], odd_fifth[j], x.integers[two * 2] + j * 4);
            high.add(q[j], x.integers[two * 2 + 1] + j * 4);
            high_fifth.add(fifth[j], odd_fifth[j], x.integers[two * 2 + 1] + j * 4);
        });
        const I first = add_integers(low.total(), low_fifth.total());
        const I second = add_integers(high.total(), high_fifth.total());
        slab.add_block(times_integers(first, six_bits.template scale<two * 2>()), x, two * 2);
        slab.add_block(times_integers(second, six_bits.template scale<two * 2 + 1>()), x, two * 2 + 1);
    });
    slab.add_to(total, six_bits, x);
}

YIVL_INLINE void multiply_blocks(RowsQ6_K, F& total, const std::byte* p, int64_t row_bytes, const InputSlab& x, int64_t,
                                 Ahead<RowsQ6_K>& ahead) {
    I scales[4];
    dwords(p + 192, row_bytes, scales);
    SlabSum slab;
    repeat<2>([&]<int half>() YIVL_INLINE_LAMBDA {
        I sums[4];
        // Columns [c, c + 16) of four blocks at a time.
        repeat<2>([&]<int part>() YIVL_INLINE_LAMBDA {
            I low[4], next[4], high[4], odd_high[4];
            dwords(p + half * 64 + part * 16, row_bytes, low);
            dwords(p + half * 64 + part * 16 + 32, row_bytes, next);
            dwords(p + 128 + half * 32 + part * 16, row_bytes, high);
            YIVL_UNROLL
            for (int j = 0; j < 4; ++j) odd_high[j] = down<8>(high[j]);
            repeat<4>([&]<int b>() YIVL_INLINE_LAMBDA {
                NibbleSum<b / 2 == 1> four(integers(-32 * x.sums[half * 4 + b][part] * (b / 2 == 1 ? 16 : 1)));
                BitSum<b * 2, 2, 16> two;
                repeat<4>([&]<int j>() YIVL_INLINE_LAMBDA {
                    ahead.template fetch<((half * 2 + part) * 4 + b) * 4 + j, 64>();
                    const int16_t* const from = x.integers[half * 4 + b] + part * (kBlock / 2) + j * 4;
                    four.add((b % 2 == 0 ? low : next)[j], from);
                    two.add(high[j], odd_high[j], from);
                });
                constexpr int kGroup = half * 8 + b * 2 + part;  // of 16 columns
                const I scale = signed_byte<kGroup % 4>(scales[kGroup / 4]);
                const I sum = times_integers(add_integers(four.total(), two.total()), scale);
                sums[b] = part == 0 ? sum : add_integers(sums[b], sum);
            });
        });
        repeat<4>([&]<int b>() YIVL_INLINE_LAMBDA { slab.add_block(sums[b], x, half * 4 + b); });
    });
    slab.add_to(total, halves(p + 208, row_bytes));
}

// Multiplies what is unpacked at once.
struct MultiplySink {
    F& total;
    const InputSlab& x;
    int64_t block;
    I sums[4];

    YIVL_INLINE MultiplySink(F& to, const InputSlab& input, int64_t b) : total(to), x(input), block(b) {
        YIVL_UNROLL
        for (I& sum : sums) sum = no_integers();
    }
    template <int, int i>
    YIVL_INLINE void vector(I v) {
        sums[i % 4] = multiply_pairs_at(sums[i % 4], v, x.integers[block] + i * 2);
    }
    template <int>
    YIVL_INLINE void finish(F scale, F) {
        add_block(total, add_integers(add_integers(sums[0], sums[1]), add_integers(sums[2], sums[3])), scale, x, block);
    }
};

template <class Number>
YIVL_INLINE void multiply_blocks(RowsHalves<Number>, F& total, const std::byte* p, int64_t row_bytes,
                                 const InputSlab& x, int64_t block, Ahead<RowsHalves<Number>>& ahead) {
    ahead.fetch_some(block);
    MultiplySink sink(total, x, block);
    RowsHalves<Number>::unpack(p, row_bytes, sink);
}

// Rows that a vector has no lanes for are few: they are copied to where all lanes may read.
struct RestOfRows {
    static constexpr int64_t kStride = kSlabCols * 2 + 32;  // of a slab of the widest type and more
    alignas(64) std::byte bytes[kLanes * kStride];

    YIVL_INLINE void copy(const std::byte* p, int64_t row_bytes, int64_t n_rows, int64_t n_bytes) {
        for (int64_t r = 0; r < kLanes; ++r) {
            __builtin_memcpy(bytes + r * kStride, p + (r < n_rows ? r : 0) * row_bytes, static_cast<size_t>(n_bytes));
        }
    }
};

// y = or += sum + bias for n lanes
inline void put_outputs(const PackedPiece& p, int64_t token, int64_t row, F sum, int64_t n) {
    float* const y = p.y + token * p.y_stride + row;
    if (p.bias != nullptr) sum = add(sum, load_some(p.bias + row, n));
    if (p.add) sum = add(load_some(y, n), sum);
    store_some(y, sum, n);
}

template <class Rows>
void multiply_one(const PackedPiece& p) {
    const InputSlab* const x = reinterpret_cast<const InputSlab*>(p.x);
    const int64_t n_slabs = (p.cols + kSlabCols - 1) / kSlabCols;
    RestOfRows rest;
    for (int64_t row = 0; row < p.n_rows; row += kLanes) {
        const std::byte* const w = p.w + row * p.row_bytes;
        const int64_t n = min64(kLanes, p.n_rows - row);
        F total = zero();
        for (int64_t slab = 0; slab < n_slabs; ++slab) {
            // Beyond the end of these rows the next begin.
            const std::byte* const near =
                slab + 1 < n_slabs ? w + (slab + 1) * Ahead<Rows>::kSlabBytes : w + kLanes * p.row_bytes;
            Ahead<Rows> ahead{near, p.row_bytes,
                              w + kLanes * (kGroupsAhead * p.row_bytes + slab * Ahead<Rows>::kSlabBytes)};
            const int64_t n_blocks = min64(kSlabBlocks, p.cols / kBlock - slab * kSlabBlocks);
            for (int64_t block = 0; block < n_blocks; block += Rows::kBlocks) {
                const std::byte* from = w + (slab * kSlabBlocks + block) / Rows::kBlocks * Rows::kBytes;
                int64_t stride = p.row_bytes;
                if (n < kLanes) {
                    rest.copy(from, stride, n, Rows::kBytes);
                    from = rest.bytes;
                    stride = RestOfRows::kStride;
                }
                multiply_blocks(Rows(), total, from, stride, x[slab], block, ahead);
            }
        }
        put_outputs(p, 0, row, total, n);
    }
}

// ---- many tokens ----

// A block of kLanes rows, unpacked.
struct WeightBlock {
    I pairs[kPairs];
    F scale, minimum;
    I minus_products;  // as those of x
};
// A slab of kLanes rows.
struct WeightSlab {
    WeightBlock blocks[kSlabBlocks];
};

// Whether weights are multiplied as sums: their integers are so small that a sum with one of x has 16 bits.
template <class Rows>
constexpr bool kAsSums = kSumsOfPairs;
template <class Number>
constexpr bool kAsSums<RowsHalves<Number>> = false;

template <class Rows>
struct StoreSink {
    WeightBlock* blocks;

    template <int b, int i>
    YIVL_INLINE void vector(I v) {
        if constexpr (Rows::kOffset != 0) v = less(v, Rows::kOffset);
        store_integers(&blocks[b].pairs[i], v);
    }
    template <int b>
    YIVL_INLINE void finish(F scale, F minimum) {
        blocks[b].scale = scale;
        blocks[b].minimum = minimum;
        if constexpr (kAsSums<Rows>) {
            I products = no_integers();
            repeat<kPairs / 2>([&]<int i>() YIVL_INLINE_LAMBDA {
                products = multiply_pairs(products, blocks[b].pairs[i * 2], blocks[b].pairs[i * 2 + 1]);
            });
            blocks[b].minus_products = negative(products);
        }
    }
};

// Columns [col, col + n_blocks * 32) of n rows from p, the first of a slab.
template <class Rows>
void unpack_slab(WeightSlab& slab, const std::byte* p, int64_t row_bytes, int64_t n_rows, int64_t n_blocks) {
    RestOfRows rest;
    if (n_rows < kLanes) {
        rest.copy(p, row_bytes, n_rows, n_blocks / Rows::kBlocks * Rows::kBytes);
        p = rest.bytes;
        row_bytes = RestOfRows::kStride;
    }
    for (int64_t b = 0; b < n_blocks; b += Rows::kBlocks, p += Rows::kBytes) {
        StoreSink<Rows> sink{slab.blocks + b};
        Rows::unpack(p, row_bytes, sink);
    }
}

// A tile: so many vectors of rows by kIntegerTokens tokens.
constexpr int kIntegerRows = 2;
constexpr int64_t kSideRows = kIntegerRows * kLanes;
constexpr int kTileSums = kIntegerRows * kIntegerTokens;

// Half of the multiplications, and additions in their place, for a unit of their own (Winograd, "A New Algorithm for
// Inner Product", 1968): (w0 + x1) (w1 + x0) = w0 x0 + w1 x1 + w0 w1 + x0 x1. The last two depend on one operand only,
// and the sums begin without them. All is exact modulo 2^32.
YIVL_INLINE I multiply_pairs_of_sums(I sums, const I* w, I x0, I x1) {
    return multiply_pairs(sums, plus(w[0], x1), plus(w[1], x0));
}

// `sums` (rows, tokens) += a tile of T tokens over a slab, or = if `first`. What the next tile takes is fetched
// meanwhile.
template <int T, class Rows>
YIVL_INLINE void multiply_tile(Rows, F* sums, const WeightSlab* w, const InputSlab* x, int64_t n_blocks, bool first) {
    constexpr int R = kIntegerRows;
    F total[R][T];
    const auto begin = [&] YIVL_INLINE_LAMBDA {
        YIVL_UNROLL
        for (int r = 0; r < R; ++r) {
            YIVL_UNROLL
            for (int t = 0; t < T; ++t) total[r][t] = first ? zero() : sums[r * kIntegerTokens + t];
        }
    };
    F slab[R][T];
    if constexpr (Rows::kOneScale) {
        YIVL_UNROLL
        for (int r = 0; r < R; ++r) {
            YIVL_UNROLL
            for (int t = 0; t < T; ++t) slab[r][t] = zero();
        }
    } else {
        begin();
    }
    for (int64_t b = 0; b < n_blocks; ++b) {
        I acc[R][T];
        YIVL_UNROLL
        for (int r = 0; r < R; ++r) {
            YIVL_UNROLL
            for (int t = 0; t < T; ++t) {
                acc[r][t] = no_integers();
                if constexpr (kAsSums<Rows>) {
                    acc[r][t] = add_integers(w[r].blocks[b].minus_products, integers(x[t].minus_products[b]));
                }
            }
        }
        YIVL_UNROLL
        for (int t = 0; t < T; ++t) prefetch(reinterpret_cast<const std::byte*>(x[T + t].integers[b]));
        if (b < T) prefetch(reinterpret_cast<const std::byte*>(x[T + b].scale));
        prefetch(reinterpret_cast<const std::byte*>(sums + kTileSums) + b * 2 * 64);
        prefetch(reinterpret_cast<const std::byte*>(sums + kTileSums) + (b * 2 + 1) * 64);
        constexpr int kStep = kAsSums<Rows> ? 2 : 1;
        YIVL_UNROLL
        for (int i = 0; i < kPairs; i += kStep) {
            I ws[R][kStep];
            YIVL_UNROLL
            for (int r = 0; r < R; ++r) {
                YIVL_UNROLL
                for (int j = 0; j < kStep; ++j) ws[r][j] = load_integers(&w[r].blocks[b].pairs[i + j]);
            }
            YIVL_UNROLL
            for (int t = 0; t < T; ++t) {
                const I xs = pair(x[t].integers[b] + i * 2);
                if constexpr (kAsSums<Rows>) {
                    const I next = pair(x[t].integers[b] + i * 2 + 2);
                    YIVL_UNROLL
                    for (int r = 0; r < R; ++r) acc[r][t] = multiply_pairs_of_sums(acc[r][t], ws[r], xs, next);
                } else {
                    YIVL_UNROLL
                    for (int r = 0; r < R; ++r) acc[r][t] = multiply_pairs(acc[r][t], ws[r][0], xs);
                }
            }
        }
        YIVL_UNROLL
        for (int t = 0; t < T; ++t) {
            const F scale = set1(x[t].scale[b]);
            YIVL_UNROLL
            for (int r = 0; r < R; ++r) {
                if constexpr (Rows::kOneScale) {
                    slab[r][t] = fma(to_floats(acc[r][t]), scale, slab[r][t]);
                } else {
                    total[r][t] = fma(to_floats(acc[r][t]), mul(w[r].blocks[b].scale, scale), total[r][t]);
                }
            }
        }
    }
    if constexpr (Rows::kOneScale) {
        begin();
        if constexpr (Rows::kMinimum) {
            for (int64_t b = 0; b < n_blocks; ++b) {
                YIVL_UNROLL
                for (int t = 0; t < T; ++t) {
                    const F minus_sum = set1(x[t].minus_sum[b]);
                    YIVL_UNROLL
                    for (int r = 0; r < R; ++r) total[r][t] = fma(w[r].blocks[b].minimum, minus_sum, total[r][t]);
                }
            }
        }
        YIVL_UNROLL
        for (int r = 0; r < R; ++r) {
            YIVL_UNROLL
            for (int t = 0; t < T; ++t) total[r][t] = fma(slab[r][t], w[r].blocks[0].scale, total[r][t]);
        }
    }
    YIVL_UNROLL
    for (int r = 0; r < R; ++r) {
        YIVL_UNROLL
        for (int t = 0; t < T; ++t) sums[r * kIntegerTokens + t] = total[r][t];
    }
}

// Tokens whose slabs of x and sums stay in the second-level cache, while the weights are unpacked for each of them:
// more where that takes long.
template <class Rows>
constexpr int64_t kTokensAtOnce = 48 * kIntegerTokens;
template <class Number>
constexpr int64_t kTokensAtOnce<RowsHalves<Number>> = 96 * kIntegerTokens;
constexpr int64_t kMostTokensAtOnce = 96 * kIntegerTokens;

// Tokens [token, token + n_tokens) of the piece. The last tile may be wider and higher than what is left: what it
// computes from memory that happens to lie there is not read. With `few` tokens it is narrower, and the next
// rows of the file are fetched.
template <class Rows, bool few>
void multiply_some(const PackedPiece& p, int64_t token, int64_t n_tokens, std::byte* scratch, bool (*stop)(const void*),
                   const void* stop_arg) {
    WeightSlab* const w = reinterpret_cast<WeightSlab*>(scratch);
    F* const sums = reinterpret_cast<F*>(scratch + kIntegerRows * sizeof(WeightSlab));
    const int64_t n_slabs = (p.cols + kSlabCols - 1) / kSlabCols;
    const int64_t n_tiles = (n_tokens + kIntegerTokens - 1) / kIntegerTokens;
    constexpr int64_t kSlabBytes = kSlabBlocks / Rows::kBlocks * Rows::kBytes;
    for (int64_t s = 0; s < n_slabs; ++s) {
        if (stop(stop_arg)) return;
        const int64_t n_blocks = min64(kSlabCols, p.cols - s * kSlabCols) / kBlock;
        // A slab's tokens lie side by side.
        const InputSlab* const x = reinterpret_cast<const InputSlab*>(p.x) + s * p.n_tokens + token;
        for (int64_t row = 0; row < p.n_rows; row += kSideRows) {
            const std::byte* const from = p.w + row * p.row_bytes + s * kSlabBytes;
            for (int r = 0; r < kIntegerRows; ++r) {
                const int64_t n_rows = min64(kLanes, p.n_rows - row - r * kLanes);
                if (n_rows > 0) unpack_slab<Rows>(w[r], from + r * kLanes * p.row_bytes, p.row_bytes, n_rows, n_blocks);
            }
            // What the next turn unpacks, while this one multiplies.
            const bool more = row + kSideRows < p.n_rows;
            const std::byte* const next = more ? from + kSideRows * p.row_bytes : p.w + (s + 1) * kSlabBytes;
            for (int64_t r = 0; r < min64(kSideRows, p.n_rows - (more ? row + kSideRows : 0)); ++r) {
                for (int64_t line = 0; line < kSlabBytes; line += 64) prefetch(next + r * p.row_bytes + line);
            }
            if constexpr (few) {
                const std::byte* const far = p.w + kSideRows * (p.row_bytes + s * kSlabBytes);
                for (int64_t line = 0; line < kSideRows * kSlabBytes; line += 64) prefetch_far(far + line);
            }
            F* const mine = sums + row / kSideRows * n_tiles * kTileSums;
            const auto multiply = [&]<int T>(int64_t tile) YIVL_TARGET_LAMBDA {
                multiply_tile<T>(Rows(), mine + tile * kTileSums, w, x + tile * kIntegerTokens, n_blocks, s == 0);
            };
            const int64_t full = few ? n_tokens / kIntegerTokens : n_tiles;
            for (int64_t tile = 0; tile < full; ++tile) multiply.template operator()<kIntegerTokens>(tile);
            if constexpr (few) {
                constexpr int kThird = kIntegerTokens / 3;
                const int64_t rest = n_tokens - full * kIntegerTokens;
                if (rest > 2 * kThird) {
                    multiply.template operator()<kIntegerTokens>(full);
                } else if (rest > kThird) {
                    multiply.template operator()<2 * kThird>(full);
                } else if (rest > 0) {
                    multiply.template operator()<kThird>(full);
                }
            }
        }
    }
    for (int64_t row = 0; row < p.n_rows; row += kLanes) {
        const F* const mine = sums + row / kSideRows * n_tiles * kTileSums + row % kSideRows / kLanes * kIntegerTokens;
        for (int64_t t = 0; t < n_tokens; ++t) {
            put_outputs(p, token + t, row, mine[t / kIntegerTokens * kTileSums + t % kIntegerTokens],
                        min64(kLanes, p.n_rows - row));
        }
    }
}

// Values of x that stay in the second-level cache.
constexpr int64_t kFewValues = 3 << 16;

// So few tokens that weights are taken in the order of the file, and fetched in it.
template <class Rows>
void multiply_few(const PackedPiece& p, std::byte* scratch, bool (*stop)(const void*), const void* stop_arg) {
    PackedPiece side = p;
    for (int64_t row = 0; row < p.n_rows; row += kSideRows) {
        side.y = p.y + row;
        side.w = p.w + row * p.row_bytes;
        side.n_rows = min64(kSideRows, p.n_rows - row);
        if (p.bias != nullptr) side.bias = p.bias + row;
        multiply_some<Rows, true>(side, 0, p.n_tokens, scratch, stop, stop_arg);
    }
}

template <class Rows>
void multiply_many(const PackedPiece& p, std::byte* scratch, bool (*stop)(const void*), const void* stop_arg) {
    if (p.n_tokens * p.cols <= kFewValues) return multiply_few<Rows>(p, scratch, stop, stop_arg);
    for (int64_t token = 0; token < p.n_tokens; token += kTokensAtOnce<Rows>) {
        multiply_some<Rows, false>(p, token, min64(kTokensAtOnce<Rows>, p.n_tokens - token), scratch, stop, stop_arg);
    }
}

// ---- the table ----

// Order 1 is for 16-bit weights.
int order_of_integers(WeightType type, int64_t cols) {
    switch (type) {
        case WeightType::F16:
        case WeightType::BF16: return kHalvesAsIntegers && cols % kBlock == 0 ? 1 : -1;
        case WeightType::Q8_0:
        case WeightType::Q4_0:
        case WeightType::Q4_K:
        case WeightType::Q5_K:
        case WeightType::Q6_K: return 0;
        default: return -1;
    }
}

int64_t packed_integer_bytes(int64_t n_tokens, int64_t cols) {
    const int64_t slabs = n_tokens * ((cols + kSlabCols - 1) / kSlabCols);
    return (slabs + kIntegerTokens) * static_cast<int64_t>(sizeof(InputSlab));  // with room for the last tile
}

template <auto round>
void pack_block(InputSlab& slab, int64_t b, const float* x, int order) {
    const float most = largest_magnitude(x);
    if (!(most <= 3.4028234e38f)) {  // an infinity or no number: neither may get lost
        for (int16_t& n : slab.integers[b]) n = 0;
        slab.scale[b] = slab.minus_sum[b] = __builtin_nanf("");
        slab.sums[b][0] = slab.sums[b][1] = slab.minus_products[b] = 0;
        return;
    }
    // What is smaller has no reciprocal, and counts as nothing.
    const bool some = most > 1.0e-34f;
    float large = kLargestInteger;
    if (order == 1 && some) {
        const float longest = kLongestBlock / __builtin_sqrtf(squares_of_block(x, 1.0f / most));
        large = longest < kLargestPair ? longest : kLargestPair;
    }
    const float scale = some ? most / large : 0.0f;
    const float factor = some ? large / most : 0.0f;
    slab.scale[b] = scale;
    if (order == 1) return round_in_order(x, factor, slab.integers[b]);
    round(x, factor, slab.integers[b], slab.sums[b]);
    if constexpr (kSumsOfPairs) {
        uint32_t products = 0;
        for (int i = 0; i < kBlock; i += 4) {
            const int16_t* const x0 = slab.integers[b] + i;
            products += static_cast<uint32_t>(x0[0] * x0[2]) + static_cast<uint32_t>(x0[1] * x0[3]);
        }
        slab.minus_products[b] = static_cast<int32_t>(-products);
    }
    slab.minus_sum[b] = -scale * static_cast<float>(slab.sums[b][0] + slab.sums[b][1]);
}

template <auto round = round_block>
void pack_integers(std::byte* dst, const PackedInput& p, int64_t group) {
    InputSlab* const slabs = reinterpret_cast<InputSlab*>(dst);
    const int64_t end = min64(group * 16 + 16, p.n_tokens);
    for (int64_t t = group * 16; t < end; ++t) {
        for (int64_t col = 0; col < p.cols; col += kBlock) {
            pack_block<round>(slabs[col / kSlabCols * p.n_tokens + t], col % kSlabCols / kBlock,
                              p.x + t * p.x_stride + col, p.order);
        }
    }
}

int64_t integer_scratch_bytes(int64_t n_tokens, int64_t n_rows, int64_t) {
    const int64_t tiles = ((n_rows + kSideRows - 1) / kSideRows) *
                          ((min64(n_tokens, kMostTokensAtOnce) + kIntegerTokens - 1) / kIntegerTokens);
    return kIntegerRows * static_cast<int64_t>(sizeof(WeightSlab)) +
           tiles * kTileSums * static_cast<int64_t>(sizeof(F));
}

template <class Rows = PairRows>
void multiply_integers(const PackedPiece& piece, std::byte* scratch, bool (*stop)(const void*), const void* stop_arg) {
    const auto with = [&]<class Type>(Type) YIVL_TARGET_LAMBDA {
        if (piece.n_tokens == 1) {
            multiply_one<Type>(piece);
        } else {
            multiply_many<Type>(piece, scratch, stop, stop_arg);
        }
    };
    switch (piece.type) {
        case WeightType::Q8_0: return with(typename Rows::Q8_0());
        case WeightType::Q4_0: return with(typename Rows::Q4_0());
        case WeightType::Q4_K: return with(typename Rows::Q4_K());
        case WeightType::Q5_K: return with(typename Rows::Q5_K());
        case WeightType::Q6_K: return with(typename Rows::Q6_K());
        default: break;
    }
    if constexpr (kHalvesAsIntegers) {
        piece.type == WeightType::F16 ? with(RowsHalves<Half>()) : with(RowsHalves<Bfloat>());
    }
}

int64_t multiply_add_integers(int64_t rounds) {
    constexpr int kSums = 12;
    I acc[kSums];
    YIVL_UNROLL
    for (int i = 0; i < kSums; ++i) acc[i] = integers(i);
    const I one = integers(1);
    for (int64_t r = 0; r < rounds; ++r) {
        YIVL_UNROLL
        for (int i = 0; i < kSums; ++i) acc[i] = multiply_pairs(acc[i], acc[i], one);
    }
    for (int i = 1; i < kSums; ++i) acc[0] = add_integers(acc[0], acc[i]);
    asm volatile("" : : "m"(acc[0]));  // or the compiler would leave it all out
    return rounds * kSums * kLanes * 4;
}

const PackedKernels kIntegerKernels = {
    .tokens = 16,
    .order = order_of_integers,
    .packed_bytes = packed_integer_bytes,
    .pack = pack_integers<>,
    .scratch_bytes = integer_scratch_bytes,
    .linear = multiply_integers<>,
    .multiply_add = multiply_add_integers,
};

}  // namespace
