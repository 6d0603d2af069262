// Part of kernels_integer.h: weights of each type as integers.
//
// unpack(p, row_bytes, sink) takes a slab of kLanes rows, kBytes of each. The sink gets vector<b, i>(v) with the
// integers of the i-th pair of columns of block b, kOffset too large, then finish<b>(scale, minimum): weight = scale *
// integer - minimum. kOrder is the order of columns in which x is packed.

namespace {

// fn<0>() to fn<n - 1>(), in this order.
template <int n, class Fn>
YIVL_INLINE void repeat(Fn&& fn) {
    [&]<int... i>(std::integer_sequence<int, i...>)
        YIVL_INLINE_LAMBDA { (fn.template operator()<i>(), ...); }(std::make_integer_sequence<int, n>());
}

// Four bits of each half of a lane.
template <int first>
YIVL_INLINE I nibble(I v) {
    const I from = down<first>(v);
    return first == 12 ? from : low_bits(from, 15);
}

// A slab of blocks of a half-precision scale and 4 n bytes. Two blocks are an odd number of dwords long, so that all is
// brought together in whole dwords, scales too. In the first of two blocks the columns are then out of step by the
// scale: of each 16 bytes the last two come first (kOrderQ4_0 and kOrderQ8_0). Calls dword<block, i>(bytes) for each of
// the n dwords, then scale<block>(scale).
template <int n, class Dword, class Scale>
YIVL_INLINE void blocks_with_scales(const std::byte* p, int64_t row_bytes, Dword&& dword, Scale&& scale) {
    constexpr int kTwo = 2 * n + 1;
    I four[4], first = no_integers(), split = no_integers();
    repeat<kSlabBlocks / 2 * kTwo>([&]<int at>() YIVL_INLINE_LAMBDA {
        if constexpr (at % 4 == 0) dwords(p + at * 4, row_bytes, four);
        const I bytes = four[at % 4];
        constexpr int b = at / kTwo * 2, i = at % kTwo;
        if constexpr (i > n) {
            dword.template operator()<b + 1, i - n - 1>(bytes);
            if constexpr (i == 2 * n) scale.template operator()<b + 1>(half_of_lane<1>(split));
        } else if constexpr (i % 4 != 0) {
            dword.template operator()<b, i>(bytes);
        } else {
            if constexpr (i > 0) dword.template operator()<b, i - 4>(low_and_high(bytes, split));
            if constexpr (i == n) scale.template operator()<b>(half_of_lane<0>(first));
            if constexpr (i == 0) first = bytes;
            split = bytes;
        }
    });
}

// What the sums of a type are made of, by which tiles are told apart. With kOneScale the blocks of a slab have one
// scale: integers that the file has for smaller groups of columns are in the integers.
template <bool one_scale, bool minimum>
struct OfPairs {
    using Sums = OfPairs;
    static constexpr bool kOneScale = one_scale, kMinimum = minimum;
};

struct RowsQ8_0 : OfPairs<false, false> {
    static constexpr int kOffset = 0, kOrder = kOrderQ8_0;
    static constexpr int64_t kBytes = kSlabBlocks * sizeof(BlockQ8_0);
    template <class Sink>
    static YIVL_INLINE void unpack(const std::byte* p, int64_t row_bytes, Sink& sink) {
        const auto dword = [&]<int b, int i>(I bytes) YIVL_INLINE_LAMBDA {
            sink.template vector<b, i * 2>(signed_down<8>(up<8>(bytes)));
            sink.template vector<b, i * 2 + 1>(signed_down<8>(bytes));
        };
        blocks_with_scales<8>(p, row_bytes, dword,
                              [&]<int b>(F scale) YIVL_INLINE_LAMBDA { sink.template finish<b>(scale, zero()); });
    }
};

struct RowsQ4_0 : OfPairs<false, false> {
    static constexpr int kOffset = 8, kOrder = kOrderQ4_0;
    static constexpr int64_t kBytes = kSlabBlocks * sizeof(BlockQ4_0);
    template <class Sink>
    static YIVL_INLINE void unpack(const std::byte* p, int64_t row_bytes, Sink& sink) {
        const auto dword = [&]<int b, int i>(I bytes) YIVL_INLINE_LAMBDA {
            repeat<4>([&]<int n>() YIVL_INLINE_LAMBDA {
                sink.template vector<b, n / 2 * 8 + i * 2 + n % 2>(nibble<n / 2 * 4 + n % 2 * 8>(bytes));
            });
        };
        blocks_with_scales<4>(p, row_bytes, dword,
                              [&]<int b>(F scale) YIVL_INLINE_LAMBDA { sink.template finish<b>(scale, zero()); });
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

struct RowsQ4_K : OfPairs<true, true> {
    static constexpr int kOffset = 0, kOrder = kPlainOrder;
    static constexpr int64_t kBytes = sizeof(BlockQ4_K);
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
                    sink.template vector<g, i>(times(nibble<half * 4 + i % 2 * 8>(q[i / 2]), scale));
                });
                sink.template finish<g>(six_bits.d, six_bits.template offset<g>());
            });
        });
    }
};

struct RowsQ5_K : OfPairs<true, true> {
    static constexpr int kOffset = 0, kOrder = kPlainOrder;
    static constexpr int64_t kBytes = sizeof(BlockQ5_K);
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
                    const I low = nibble<half * 4 + i % 2 * 8>(q[i / 2]);
                    sink.template vector<g, i>(times(any_bits(low, low_bits(high, 16)), scale));
                });
                sink.template finish<g>(six_bits.d, six_bits.template offset<g>());
            });
        });
    }
};

struct RowsQ6_K : OfPairs<true, false> {
    static constexpr int kOffset = 0, kOrder = kPlainOrder;
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
                dwords(p + half * 64 + part * 16, row_bytes, low);
                dwords(p + half * 64 + part * 16 + 32, row_bytes, next);
                dwords(p + 128 + half * 32 + part * 16, row_bytes, high);
                repeat<4>([&]<int b>() YIVL_INLINE_LAMBDA {
                    constexpr int group = half * 8 + b * 2 + part;  // of 16 columns
                    const I scale = spread_byte<group % 4>(scales[group / 4]);
                    repeat<kPairs / 2>([&]<int i>() YIVL_INLINE_LAMBDA {
                        const I four = nibble<b / 2 * 4 + i % 2 * 8>((b % 2 == 0 ? low : next)[i / 2]);
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

struct PairRows {
    using Q8_0 = RowsQ8_0;
    using Q4_0 = RowsQ4_0;
    using Q4_K = RowsQ4_K;
    using Q5_K = RowsQ5_K;
    using Q6_K = RowsQ6_K;
};

}  // namespace
