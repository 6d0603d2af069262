// Weights as floats, written once over a vector type: a block's integers are unpacked and scaled in registers, and each
// vector goes to a sink, which stores it or multiplies it by x. Included as kernels_body.h is, after it, and needs
// besides the names listed there:
//
//   half_to_float(h), halves_to_floats(dst, src)   one number; 16 numbers
//   from_i8(p), from_half(p), from_bfloat(p)       kLanes numbers at p, as floats; p need not be aligned
//   scale_halves(dst, p, a, b)                     dst[0..8) = a * p[i], dst[8..16) = b * p[i]
//   B                                              a vector of 32 bytes, with
//   bytes(p), put(p, a)                            load, store
//   both(a, n) either(a, b) minus(a, n)            a & n, a | b, a - n
//   right<n>(a) left<n>(a)                         shifted, n < 8: bits of the neighbouring byte may come in
//   block_of_nibbles(p, scale, sink)               16 bytes: values [0, 16) are scale * (low half of p[i] - 8), [16,
//   32)
//                                                  the high halves
//   pair_of_nibbles(p, scale, minimum, i, sink)    32 bytes: values [i, i + 32) are scale[0] * low half of p[i] -
//                                                  minimum[0], [i + 32, i + 64) the high halves, scale[1], minimum[1]
//   prefetch(p)                                    the cache line at p, soon
//   dequantize_row                                 for what is not worth a fast path
//
// A sink is called in order of i: sink(i, v) takes values [i, i + kLanes) of a block. Products of the file's scales and
// integers are exact in float32, so values are the same whether a subtraction is fused or not.

namespace {

struct Store {
    float* dst;
    YIVL_INLINE void operator()(int64_t i, F v) { store(dst + i, v); }
};

struct MultiplyAdd {
    const float* x;
    F& acc;
    YIVL_INLINE void operator()(int64_t i, F v) { acc = fma(load(x + i), v, acc); }
};

template <class Sink>
YIVL_INLINE void scale_bytes(const int8_t* q, float scale, int64_t i, int64_t n, Sink& sink) {
    YIVL_UNROLL
    for (int64_t j = 0; j < n; j += kLanes) sink(i + j, mul(from_i8(q + j), set1(scale)));
}
template <class Sink>
YIVL_INLINE void scale_bytes(const int8_t* q, float scale, float minimum, int64_t i, int64_t n, Sink& sink) {
    YIVL_UNROLL
    for (int64_t j = 0; j < n; j += kLanes) sink(i + j, sub(mul(from_i8(q + j), set1(scale)), set1(minimum)));
}

// ---- blocks of 32: `d` is the scale ----

template <class Sink>
YIVL_INLINE void unpack(const BlockQ4_0& b, float d, Sink sink) {
    block_of_nibbles(b.qs, d, sink);
}

template <class Sink>
YIVL_INLINE void unpack(const BlockQ8_0& b, float d, Sink sink) {
    scale_bytes(b.qs, d, 0, kBlock, sink);
}

// ---- blocks of 256 ----

// Scales and minima of the 8 groups of a Q4_K or Q5_K block: six bits each in the file.
struct Groups {
    alignas(64) float scale[8];
    float minimum[8];
};

template <class Block>
YIVL_INLINE void read_groups(const Block& b, Groups& groups) {
    uint32_t w[3];
    __builtin_memcpy(w, b.scales, sizeof(w));
    const uint32_t six_bits[4] = {w[0] & 0x3f3f3f3f, (w[2] & 0x0f0f0f0f) | ((w[0] >> 6 & 0x03030303) << 4),  //
                                  w[1] & 0x3f3f3f3f, (w[2] >> 4 & 0x0f0f0f0f) | ((w[1] >> 6 & 0x03030303) << 4)};
    alignas(16) int8_t q[16];
    __builtin_memcpy(q, six_bits, sizeof(q));
    scale_halves(groups.scale, q, half_to_float(b.d), half_to_float(b.dmin));
    YIVL_IN_MEMORY(groups);
}

template <class Sink>
YIVL_INLINE void unpack(const BlockQ4_K& b, Sink sink) {
    Groups groups;
    read_groups(b, groups);
    YIVL_UNROLL
    for (int g = 0; g < 8; g += 2) {
        pair_of_nibbles(b.qs + g * 16, groups.scale + g, groups.minimum + g, g * 32, sink);
    }
}

template <int g, class Sink>
YIVL_INLINE void unpack_pair(const BlockQ5_K& b, const Groups& groups, B high, Sink& sink) {
    const B low = bytes(b.qs + g * 16);
    alignas(32) int8_t q[64];
    put(q, either(both(low, 15), both(g < 4 ? left<4 - g>(high) : right<g - 4>(high), 16)));
    put(q + 32, either(both(right<4>(low), 15), both(g < 3 ? left<3 - g>(high) : right<g - 3>(high), 16)));
    scale_bytes(q, groups.scale[g], groups.minimum[g], g * 32, 32, sink);
    scale_bytes(q + 32, groups.scale[g + 1], groups.minimum[g + 1], g * 32 + 32, 32, sink);
}

template <class Sink>
YIVL_INLINE void unpack(const BlockQ5_K& b, Sink sink) {
    Groups groups;
    read_groups(b, groups);
    const B high = bytes(b.qh);
    unpack_pair<0>(b, groups, high, sink);
    unpack_pair<2>(b, groups, high, sink);
    unpack_pair<4>(b, groups, high, sink);
    unpack_pair<6>(b, groups, high, sink);
}

template <class Sink>
YIVL_INLINE void unpack(const BlockQ6_K& b, Sink sink) {
    alignas(64) float scales[16];
    const float d = half_to_float(b.d);
    scale_halves(scales, b.scales, d, d);
    YIVL_IN_MEMORY(scales);
    for (int half = 0; half < 2; ++half) {
        const B low = bytes(b.ql + half * 64), next = bytes(b.ql + half * 64 + 32), high = bytes(b.qh + half * 32);
        alignas(32) int8_t q[128];
        put(q, minus(either(both(low, 15), both(left<4>(high), 48)), 32));
        put(q + 32, minus(either(both(next, 15), both(left<2>(high), 48)), 32));
        put(q + 64, minus(either(both(right<4>(low), 15), both(high, 48)), 32));
        put(q + 96, minus(either(both(right<4>(next), 15), both(right<2>(high), 48)), 32));
        YIVL_UNROLL
        for (int g = 0; g < 8; ++g) scale_bytes(q + g * 16, scales[half * 8 + g], half * 128 + g * 16, 16, sink);
    }
}

// ---- rows of weights, a slab at most: Row::each(p, n, sinks) unpacks n weights of R rows side by side ----

// Blocks of 32, with their scales converted sixteen at a time.
template <class Block>
struct SimpleRow {
    static constexpr int64_t kWeights = 16 * kBlock;

    template <int R, class MakeSink>
    static YIVL_INLINE void each(const std::byte* p, int64_t row_bytes, int64_t n, int64_t ahead, MakeSink make_sink) {
        const int64_t n_blocks = n / kBlock;
        for (int64_t i = 0; i < n_blocks; i += 16) {
            const int64_t some = min64(16, n_blocks - i);
            alignas(64) float scales[R][16];
            const Block* blocks[R];
            YIVL_UNROLL
            for (int r = 0; r < R; ++r) {
                blocks[r] = reinterpret_cast<const Block*>(p + r * row_bytes) + i;
                alignas(32) half_bits halves[16] = {};
                for (int64_t j = 0; j < some; ++j) halves[j] = blocks[r][j].d;
                halves_to_floats(scales[r], halves);
            }
            for (int64_t j = 0; j < some; ++j) {
                YIVL_UNROLL
                for (int r = 0; r < R; ++r) {
                    prefetch(reinterpret_cast<const std::byte*>(blocks[r] + j) + ahead);
                    unpack(blocks[r][j], scales[r][j], make_sink(r, (i + j) * kBlock));
                }
            }
        }
    }
};

template <class Block>
struct SuperRow {
    template <int R, class MakeSink>
    static YIVL_INLINE void each(const std::byte* p, int64_t row_bytes, int64_t n, int64_t ahead, MakeSink make_sink) {
        for (int64_t i = 0; i < n / kSuperBlock; ++i) {
            YIVL_UNROLL
            for (int r = 0; r < R; ++r) {
                const std::byte* block = p + r * row_bytes + i * static_cast<int64_t>(sizeof(Block));
                for (int64_t line = 0; line < static_cast<int64_t>(sizeof(Block)); line += 64) {
                    prefetch(block + line + ahead);
                }
                unpack(*reinterpret_cast<const Block*>(block), make_sink(r, i * kSuperBlock));
            }
        }
    }
};

// n is a multiple of kLanes.
template <F (*kFrom)(const std::byte*)>
struct HalfRow {
    template <int R, class MakeSink>
    static YIVL_INLINE void each(const std::byte* p, int64_t row_bytes, int64_t n, int64_t ahead, MakeSink make_sink) {
        for (int64_t i = 0; i < n; i += kLanes) {
            YIVL_UNROLL
            for (int r = 0; r < R; ++r) {
                const std::byte* from = p + r * row_bytes + i * 2;
                prefetch(from + ahead);
                make_sink(r, i)(0, kFrom(from));
            }
        }
    }
};

// Whether `src` can be read as blocks: all have even sizes and nobody writes a tensor at an odd address, but a file may
// claim so.
inline bool aligned(const std::byte* src) { return reinterpret_cast<uintptr_t>(src) % alignof(half_bits) == 0; }

template <class Row>
void dequantize_with(const std::byte* src, float* dst, int64_t n) {
    Row::template each<1>(src, 0, n, 0, [dst](int, int64_t i) YIVL_TARGET_LAMBDA { return Store{dst + i}; });
}

void dequantize(WeightType type, const std::byte* src, float* dst, int64_t n) {
    if (!aligned(src)) return dequantize_row(type, src, dst, n);
    switch (type) {
        case WeightType::F16:
        case WeightType::BF16: {
            const int64_t whole = n / kLanes * kLanes;
            if (type == WeightType::F16) {
                dequantize_with<HalfRow<from_half>>(src, dst, whole);
            } else {
                dequantize_with<HalfRow<from_bfloat>>(src, dst, whole);
            }
            if (whole < n) dequantize_row(type, src + whole * 2, dst + whole, n - whole);
            return;
        }
        case WeightType::Q8_0: return dequantize_with<SimpleRow<BlockQ8_0>>(src, dst, n);
        case WeightType::Q4_0: return dequantize_with<SimpleRow<BlockQ4_0>>(src, dst, n);
        case WeightType::Q4_K: return dequantize_with<SuperRow<BlockQ4_K>>(src, dst, n);
        case WeightType::Q5_K: return dequantize_with<SuperRow<BlockQ5_K>>(src, dst, n);
        case WeightType::Q6_K: return dequantize_with<SuperRow<BlockQ6_K>>(src, dst, n);
        default: return dequantize_row(type, src, dst, n);
    }
}

// ---- one row of x: weights go from memory to the sum without a stop ----

// Rows that are summed side by side, to have enough independent sums.
constexpr int kSideBySide = 4;

// The same sums in the same order as dequantize and dot_tile.
template <class Row, int R>
YIVL_INLINE void multiply_side_by_side(float* y, const float* x, const std::byte* w, int64_t row_bytes, int64_t cols,
                                       int64_t slab_bytes) {
    for (int64_t col = 0; col < cols; col += kSlab, w += slab_bytes) {
        F acc[R];
        YIVL_UNROLL
        for (int r = 0; r < R; ++r) acc[r] = zero();
        // By the time the next rows come, what lies one group of rows ahead should be in the cache.
        Row::template each<R>(w, row_bytes, min64(kSlab, cols - col), R * row_bytes,
                              [x, col, &acc](int r, int64_t i)
                                  YIVL_TARGET_LAMBDA { return MultiplyAdd{x + col + i, acc[r]}; });
        float sums[4];
        sum4(acc[0], acc[R > 1 ? 1 : 0], acc[R > 2 ? 2 : 0], acc[R > 3 ? 3 : 0], sums);
        for (int r = 0; r < R; ++r) y[r] = col > 0 ? y[r] + sums[r] : sums[r];
    }
}

template <class Row>
void multiply_with(float* y, const float* x, const std::byte* w, int64_t row_bytes, int64_t n_rows, int64_t cols) {
    const int64_t slab_bytes = row_bytes * kSlab / cols;
    int64_t r = 0;
    for (; r + kSideBySide <= n_rows; r += kSideBySide) {
        multiply_side_by_side<Row, kSideBySide>(y + r, x, w + r * row_bytes, row_bytes, cols, slab_bytes);
    }
    for (; r < n_rows; ++r) {
        multiply_side_by_side<Row, 1>(y + r, x, w + r * row_bytes, row_bytes, cols, slab_bytes);
    }
}

bool multiply(WeightType type, float* y, const float* x, const std::byte* w, int64_t row_bytes, int64_t n_rows,
              int64_t cols) {
    if (!aligned(w) || cols % kLanes != 0) return false;
    const auto with = [&]<class Row>(Row) YIVL_TARGET_LAMBDA {
        multiply_with<Row>(y, x, w, row_bytes, n_rows, cols);
        return true;
    };
    switch (type) {
        case WeightType::F16: return with(HalfRow<from_half>());
        case WeightType::BF16: return with(HalfRow<from_bfloat>());
        default: return false;
    }
}

}  // namespace
