// Part of kernels_integer.h: one token, whose weights go from memory to the sum without a stop.
//
// Bits of a weight are multiplied where they stand in a lane of 16, as long as the sum of a block fits 32 bits: so one
// shift of the sum takes the place of one for every pair of columns.

namespace {

// Weights come in two steps, a little at a time: fetched in one burst, they would keep loads from the cache waiting,
// and where a CPU has no place left for lines under way, it drops the rest. The next group of kLanes rows is fetched in
// the order of the file, which is how memory and the hardware's own prefetching are quick, to the second-level cache
// (or, with kManyLines, to the first); then slabs of each of these rows to the first, kSlabsAhead of their use.
constexpr int64_t kSlabsAhead = 2;

template <class Rows, bool kManyLines = false>
struct Ahead {
    // The last bytes of a slab may share a line with the next.
    static constexpr int kRowLines = (Rows::kBytes + 63) / 64, kNear = kLanes * kRowLines;
    static constexpr int kFar = (kLanes * Rows::kBytes + 63) / 64;

    const std::byte* near;
    int64_t row_bytes;
    const std::byte* far;

    // What step `step` of the n_steps of a slab fetches.
    template <int step, int n_steps>
    YIVL_INLINE void fetch() {
        YIVL_STAYS_HERE();
        YIVL_UNROLL
        for (int n = step * kNear / n_steps; n < (step + 1) * kNear / n_steps; ++n) {
            prefetch(near + n % kRowLines * 64);
            if (n % kRowLines == kRowLines - 1) near += row_bytes;
        }
        YIVL_UNROLL
        for (int n = step * kFar / n_steps; n < (step + 1) * kFar / n_steps; ++n) {
            kManyLines ? prefetch(far + n * 64) : prefetch_far(far + n * 64);
        }
    }
};

// What is summed here are products of four bytes of each lane with four columns of x, which are either two pairs of
// integers, those of bytes 0 and 2 and of bytes 1 and 3, or (kFours) their high and then their low bytes.
struct FourSum {
    I first, second;

    // `offset` counts once.
    explicit YIVL_INLINE FourSum(I offset)
        : first(kFours ? no_integers() : offset), second(kFours ? offset : no_integers()) {}

    YIVL_INLINE void add(I to_first, I to_second, const int16_t* x) {
        first = multiply_at(first, to_first, x);
        second = multiply_at(second, to_second, x + 2);
    }
    // `second` counts for 1 / 2^down if the bytes were multiplied where they stand.
    template <int down>
    YIVL_INLINE I total() const {
        return kFours ? add_integers(up32<kLowBits>(first), second) : add_integers(first, down32<down>(second));
    }
};

// The low or the high nibbles of bytes times x.
template <bool high>
struct NibbleSum : FourSum {
    YIVL_INLINE NibbleSum() : FourSum(no_integers()) {}

    YIVL_INLINE void add(I bytes, const int16_t* x) {
        if constexpr (kFours) {
            const I nibbles = low_bits(bytes, high ? 0xf0f0 : 0x0f0f);
            FourSum::add(nibbles, nibbles, x);
        } else {
            FourSum::add(low_bits(bytes, high ? 0x00f0 : 0x000f), high ? down<12>(bytes) : low_bits(bytes, 0x0f00), x);
        }
    }
    YIVL_INLINE I total() const {
        if constexpr (!high) return FourSum::total<8>();
        if constexpr (kFours) return down32<4>(FourSum::total<0>());
        return add_integers(down32<4>(first), second);
    }
};

// Bytes below 128 times x.
struct ByteSum : FourSum {
    explicit YIVL_INLINE ByteSum(I offset) : FourSum(offset) {}

    YIVL_INLINE void add(I bytes, const int16_t* x) {
        if constexpr (kFours) {
            FourSum::add(bytes, bytes, x);
        } else {
            FourSum::add(low_bits(bytes, 0x00ff), low_bits(bytes, 0x7f00), x);
        }
    }
    YIVL_INLINE I total() const { return FourSum::total<8>(); }
};

// Signed bytes times x.
struct SignedByteSum : FourSum {
    YIVL_INLINE SignedByteSum() : FourSum(no_integers()) {}

    YIVL_INLINE void add(I bytes, const int16_t* x) {
        if constexpr (kFours) {
            const I more = flip_bits(bytes, 0x8080);
            FourSum::add(more, more, x);
        } else {
            FourSum::add(signed_down<8>(up<8>(bytes)), signed_down<8>(bytes), x);
        }
    }
    // With kFours 128 times x too large.
    YIVL_INLINE I total() const { return FourSum::total<0>(); }
};

// Nibbles of bytes, and bits [from, from + n) of others above them.
template <bool high, int from, int n>
YIVL_INLINE I nibbles_and_bits(I nibbles, I bits) {
    constexpr int kMask = ((1 << n) - 1) * 0x1010;
    if constexpr (high) nibbles = down<4>(nibbles);
    if constexpr (from < 4) {
        bits = up<4 - from>(bits);
    } else {
        bits = down<from - 4>(bits);
    }
    return any_bits(low_bits(nibbles, 0x0f0f), low_bits(bits, kMask));
}

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

// total += a slab from p times x, n_blocks of it, in every lane

template <class Next>
YIVL_INLINE void multiply_slab(RowsQ8_0, F& total, const std::byte* p, int64_t row_bytes, const InputSlab& x,
                               int64_t n_blocks, Next& ahead) {
    SignedByteSum sum;
    const auto dword = [&]<int b, int i>(I bytes) YIVL_INLINE_LAMBDA {
        ahead.template fetch<b * 8 + i, 64>();
        sum.add(bytes, x.integers[b] + i * 4);
    };
    blocks_with_scales<8>(p, row_bytes, dword, [&]<int b>(F scale) YIVL_INLINE_LAMBDA {
        if (b < n_blocks) add_block(total, add_integers(sum.total(), integers(x.missing[b])), scale, x, b);
        sum = SignedByteSum();
    });
}

template <class Next>
YIVL_INLINE void multiply_slab(RowsQ4_0, F& total, const std::byte* p, int64_t row_bytes, const InputSlab& x,
                               int64_t n_blocks, Next& ahead) {
    NibbleSum<false> low;
    NibbleSum<true> high;
    const auto dword = [&]<int b, int i>(I bytes) YIVL_INLINE_LAMBDA {
        ahead.template fetch<b * 4 + i, 32>();
        low.add(bytes, x.integers[b] + i * 4);
        high.add(bytes, x.integers[b] + kBlock / 2 + i * 4);
    };
    blocks_with_scales<4>(p, row_bytes, dword, [&]<int b>(F scale) YIVL_INLINE_LAMBDA {
        const I sum = add_integers(add_integers(low.total(), high.total()), integers(x.missing[b]));
        if (b < n_blocks) add_block(total, sum, scale, x, b);
        low = NibbleSum<false>();
        high = NibbleSum<true>();
    });
}

template <class Next>
YIVL_INLINE void multiply_slab(RowsQ4_K, F& total, const std::byte* p, int64_t row_bytes, const InputSlab& x, int64_t,
                               Next& ahead) {
    const SixBits six_bits(p, row_bytes);
    SlabSum slab;
    repeat<4>([&]<int two>() YIVL_INLINE_LAMBDA {
        I q[8];
        dwords(p + 16 + two * 32, row_bytes, q);
        dwords(p + 32 + two * 32, row_bytes, q + 4);
        NibbleSum<false> low;
        NibbleSum<true> high;
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

template <class Next>
YIVL_INLINE void multiply_slab(RowsQ5_K, F& total, const std::byte* p, int64_t row_bytes, const InputSlab& x, int64_t,
                               Next& ahead) {
    const SixBits six_bits(p, row_bytes);
    SlabSum slab;
    I fifth[8];
    dwords(p + 16, row_bytes, fifth);
    dwords(p + 32, row_bytes, fifth + 4);
    repeat<4>([&]<int two>() YIVL_INLINE_LAMBDA {
        I q[8];
        dwords(p + 48 + two * 32, row_bytes, q);
        dwords(p + 64 + two * 32, row_bytes, q + 4);
        ByteSum low(no_integers()), high(no_integers());
        repeat<8>([&]<int j>() YIVL_INLINE_LAMBDA {
            ahead.template fetch<two * 8 + j, 32>();
            low.add(nibbles_and_bits<false, two * 2, 1>(q[j], fifth[j]), x.integers[two * 2] + j * 4);
            high.add(nibbles_and_bits<true, two * 2 + 1, 1>(q[j], fifth[j]), x.integers[two * 2 + 1] + j * 4);
        });
        slab.add_block(times_integers(low.total(), six_bits.template scale<two * 2>()), x, two * 2);
        slab.add_block(times_integers(high.total(), six_bits.template scale<two * 2 + 1>()), x, two * 2 + 1);
    });
    slab.add_to(total, six_bits, x);
}

template <class Next>
YIVL_INLINE void multiply_slab(RowsQ6_K, F& total, const std::byte* p, int64_t row_bytes, const InputSlab& x, int64_t,
                               Next& ahead) {
    I scales[4];
    dwords(p + 192, row_bytes, scales);
    SlabSum slab;
    repeat<2>([&]<int half>() YIVL_INLINE_LAMBDA {
        I sums[4];
        // Columns [c, c + 16) of four blocks at a time.
        repeat<2>([&]<int part>() YIVL_INLINE_LAMBDA {
            I low[4], next[4], high[4];
            dwords(p + half * 64 + part * 16, row_bytes, low);
            dwords(p + half * 64 + part * 16 + 32, row_bytes, next);
            dwords(p + 128 + half * 32 + part * 16, row_bytes, high);
            repeat<4>([&]<int b>() YIVL_INLINE_LAMBDA {
                ByteSum bytes(integers(-32 * x.sums[half * 4 + b][part]));
                repeat<4>([&]<int j>() YIVL_INLINE_LAMBDA {
                    ahead.template fetch<((half * 2 + part) * 4 + b) * 4 + j, 64>();
                    bytes.add(nibbles_and_bits < b / 2 == 1, b * 2, 2 > ((b % 2 == 0 ? low : next)[j], high[j]),
                              x.integers[half * 4 + b] + part * (kBlock / 2) + j * 4);
                });
                constexpr int kGroup = half * 8 + b * 2 + part;  // of 16 columns
                const I scale = signed_byte<kGroup % 4>(scales[kGroup / 4]);
                const I sum = times_integers(bytes.total(), scale);
                sums[b] = part == 0 ? sum : add_integers(sums[b], sum);
            });
        });
        repeat<4>([&]<int b>() YIVL_INLINE_LAMBDA { slab.add_block(sums[b], x, half * 4 + b); });
    });
    slab.add_to(total, halves(p + 208, row_bytes));
}

// A slab of fewer rows than lanes or fewer blocks than others: it is copied to where a whole one may be read.
struct RestOfSlab {
    static constexpr int64_t kStride = 288;  // the widest type and more
    alignas(64) std::byte bytes[kLanes * kStride];

    template <class Rows>
    YIVL_INLINE void replace(const std::byte*& p, int64_t& row_bytes, int64_t n_rows, int64_t n_blocks) {
        if (n_rows >= kLanes && n_blocks == kSlabBlocks) return;
        for (int64_t r = 0; r < kLanes; ++r) {
            __builtin_memcpy(bytes + r * kStride, p + (r < n_rows ? r : 0) * row_bytes,
                             static_cast<size_t>(n_blocks * Rows::kBytes / kSlabBlocks));
        }
        p = bytes;
        row_bytes = kStride;
    }
};

// y = or += sum + bias for n lanes
inline void put_outputs(const PackedPiece& p, int64_t token, int64_t row, F sum, int64_t n) {
    float* const y = p.y + token * p.y_stride + row;
    if (p.bias != nullptr) sum = add(sum, load_some(p.bias + row, n));
    if (p.add) sum = add(load_some(y, n), sum);
    store_some(y, sum, n);
}

template <class Rows, bool kManyLines>
void multiply_one(const PackedPiece& p) {
    const InputSlab* const x = reinterpret_cast<const InputSlab*>(p.x);
    const int64_t n_slabs = (p.cols + kSlabCols - 1) / kSlabCols;
    RestOfSlab rest;
    for (int64_t row = 0; row < p.n_rows; row += kLanes) {
        const std::byte* const w = p.w + row * p.row_bytes;
        const int64_t n = min64(kLanes, p.n_rows - row);
        F total = zero();
        for (int64_t slab = 0; slab < n_slabs; ++slab) {
            // Beyond the end of these rows the next begin.
            const int64_t later = slab + kSlabsAhead;
            const std::byte* const near = w + later * Rows::kBytes + (later < n_slabs ? 0 : (kLanes - 1) * p.row_bytes);
            Ahead<Rows, kManyLines> ahead{near, p.row_bytes, w + kLanes * (p.row_bytes + slab * Rows::kBytes)};
            const int64_t n_blocks = min64(kSlabBlocks, p.cols / kBlock - slab * kSlabBlocks);
            const std::byte* from = w + slab * Rows::kBytes;
            int64_t stride = p.row_bytes;
            rest.replace<Rows>(from, stride, n, n_blocks);
            multiply_slab(Rows(), total, from, stride, x[slab], n_blocks, ahead);
        }
        put_outputs(p, 0, row, total, n);
    }
    p.finished(0, 0, p.n_rows);
}

}  // namespace
