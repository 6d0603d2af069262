// Part of kernels_integer.h: one token, whose weights go from memory to the sum without a stop.
//
// Bits of a weight are multiplied where they stand in a lane of 16, as long as the sum of a block fits 32 bits: so one
// shift of the sum takes the place of one for every pair of columns.

namespace {

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

// Rows that a vector has no lanes for are few: they are copied to where all lanes may read.
struct RestOfRows {
    static constexpr int64_t kStride = 288;  // of a slab of the widest type and more
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

}  // namespace
