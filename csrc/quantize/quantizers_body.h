// The quantisers, written once over a vector type. Each quantizers_<isa>.cpp includes this file inside its own
// namespace and target region, after these definitions:
//
//   F                        a vector of kLanes floats, with the operators + - * /
//   set1(s) load(p) store(p, v) abs(v)
//   above(a, b, x, y)        a > b ? x : y per lane
//   max(a, b), min(a, b)     b where a and b are equal
//
// A group is the weights that share a scale. Sixteen groups are handled side by side, one per lane: value i of group g
// is x[i][g]. Every decision is one lane's own.
//
// What is minimised is the weighted squared error, sum w (x - x')^2, w being the importance. A search tries scales in
// the form in which they will be stored, so that what it compares is the error that the file will have.
//
// No include guard and no includes: standard headers must not be compiled inside a target region.

namespace {

constexpr int kBatch = 16;  // groups side by side

template <int N>
struct alignas(64) Groups {
    float x[N][kBatch];  // brought to about 1 by a power of two, so that no sum of squares overflows
    float w[N][kBatch];
    float shrink[kBatch];  // that power
};

template <int N>
struct Indices {
    uint8_t q[kBatch][N];  // from 0; group after group, as the values were
};

inline F zero() { return set1(0.0f); }
inline F clamp(F v, F low, F high) { return min(max(v, low), high); }
// To the nearest integer, ties to even, for |v| < 2^22; 1.5 * 2^23 leaves no bits for a fraction.
inline F round(F v) { return (v + set1(12582912.0f)) - set1(12582912.0f); }
// 1 / v, or 0 for a v of 0.
inline F inverse(F v) { return above(abs(v), set1(1e-37f), set1(1.0f) / v, zero()); }

// ---- what an index stands for ----

// The integers from Low to High.
template <int Low, int High>
struct Uniform {
    static constexpr float kLow = Low, kHigh = High;
    static YIVL_INLINE F nearest(F t) { return clamp(round(t), set1(kLow), set1(kHigh)); }
    static YIVL_INLINE F index(F t) { return nearest(t) - set1(kLow); }
};

// The sixteen values of IQ4_NL and IQ4_XS.
struct NonLinear {
    static constexpr float kLow = -127, kHigh = 113;
    static constexpr float kValues[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    static YIVL_INLINE F nearest(F t) {
        F v = set1(kLow);
        YIVL_UNROLL
        for (int i = 0; i < 15; ++i) {
            v = v + above(t, set1((kValues[i] + kValues[i + 1]) / 2), set1(kValues[i + 1] - kValues[i]), zero());
        }
        return v;
    }
    static YIVL_INLINE F index(F t) {
        F v = zero();
        YIVL_UNROLL
        for (int i = 0; i < 15; ++i) {
            v = v + above(t, set1((kValues[i] + kValues[i + 1]) / 2), set1(1.0f), zero());
        }
        return v;
    }
};

// ---- bringing values in, and indices out ----

// A power of two that brings the largest of n values to [1, 2), as far as there is one.
inline float power_to_one(const float* values, int n) {
    uint32_t largest = 0;
    for (int i = 0; i < n; ++i) {
        const uint32_t magnitude = __builtin_bit_cast(uint32_t, values[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    int exponent = static_cast<int>(largest >> 23) - 127;
    exponent = exponent < -100 ? -100 : exponent > 126 ? 126 : exponent;
    return __builtin_bit_cast(float, static_cast<uint32_t>(127 - exponent) << 23);
}

// `block` consecutive values of the matrix, which share a power, become groups from `lane` on.
template <int N>
void fill(Groups<N>& groups, int lane, const QuantizeSource& source, int64_t index, int block) {
    const float* x = source.values + index * block;
    const float* w = source.importance + index * block % source.columns;
    const float shrink = power_to_one(x, block);
    for (int g = 0; g < block / N; ++g) {
        groups.shrink[lane + g] = shrink;
        for (int i = 0; i < N; ++i) {
            groups.x[i][lane + g] = x[g * N + i] * shrink;
            groups.w[i][lane + g] = w[g * N + i];
        }
    }
}

template <int N>
void transpose(Indices<N>& indices, const float (&rows)[N][kBatch]) {
    for (int g = 0; g < kBatch; ++g) {
        for (int i = 0; i < N; ++i) indices.q[g][i] = static_cast<uint8_t>(static_cast<int>(rows[i][g]));
    }
}

// A scale as it will be stored, and what it then is beside the shrunken values. What is not zero stays so.
struct StoredHalf {
    half_bits bits;
    float value;
};
inline StoredHalf stored_half(float value, float shrink) {
    half_bits bits = half_from_float(value / shrink);
    if (value != 0.0f && (bits & 0x7fff) == 0) bits |= 1;
    return {bits, half_to_float(bits) * shrink};
}

// ---- one scale per group: x' = scale * q ----

template <class Grid, int N>
YIVL_INLINE F scale_error(const Groups<N>& g, int lane, F scale) {
    const F inv = inverse(scale);
    F error = zero();
    for (int i = 0; i < N; ++i) {
        const F x = load(&g.x[i][lane]);
        const F r = scale * Grid::nearest(x * inv) - x;
        error = error + load(&g.w[i][lane]) * (r * r);
    }
    return error;
}

// Sums of w q x and w q q for the q that an inverse scale gives.
struct ScaleSums {
    F qx, qq;
};
template <class Grid, int N>
YIVL_INLINE ScaleSums scale_sums(const Groups<N>& g, int lane, F inv) {
    ScaleSums s{zero(), zero()};
    for (int i = 0; i < N; ++i) {
        const F x = load(&g.x[i][lane]);
        const F q = Grid::nearest(x * inv);
        const F wq = load(&g.w[i][lane]) * q;
        s.qx = s.qx + wq * x;
        s.qq = s.qq + wq * q;
    }
    return s;
}

// The scale, of either sign, with the least error among those that put the value of largest magnitude at each of
// Type::kStarts, each replaced by the best scale for the q that it gives; and that done twice more for the winner.
template <class Type, int N>
YIVL_INLINE F fit_scale(const Groups<N>& g, int lane) {
    F extreme = zero();
    for (int i = 0; i < N; ++i) {
        const F x = load(&g.x[i][lane]);
        extreme = above(abs(x), abs(extreme), x, extreme);
    }
    const F per_extreme = inverse(extreme);
    F gain = zero(), scale = zero();
    const auto consider = [&](F inv) YIVL_TARGET_LAMBDA {
        const ScaleSums s = scale_sums<typename Type::Grid, N>(g, lane, inv);
        const F fitted = s.qx * inverse(s.qq);
        const F gained = fitted * s.qx;
        scale = above(gained, gain, fitted, scale);
        gain = max(gained, gain);
    };
    for (const float start : Type::kStarts) consider(set1(start) * per_extreme);
    for (int i = 0; i < 2; ++i) consider(inverse(scale));
    return scale;
}

template <class Grid, int N>
void indices_of_scale(const Groups<N>& g, const float* scale, Indices<N>& indices) {
    alignas(64) float rows[N][kBatch];
    for (int lane = 0; lane < kBatch; lane += kLanes) {
        const F inv = inverse(load(scale + lane));
        for (int i = 0; i < N; ++i) store(&rows[i][lane], Grid::index(load(&g.x[i][lane]) * inv));
    }
    transpose(indices, rows);
}

// ---- a scale and a minimum per group: x' = scale * q - minimum, q in [0, Top] ----

template <int Top, int N>
YIVL_INLINE F affine_error(const Groups<N>& g, int lane, F scale, F minimum) {
    const F inv = inverse(scale);
    F error = zero();
    for (int i = 0; i < N; ++i) {
        const F x = load(&g.x[i][lane]) + minimum;
        const F r = scale * Uniform<0, Top>::nearest(x * inv) - x;
        error = error + load(&g.w[i][lane]) * (r * r);
    }
    return error;
}

struct Affine {
    F scale, minimum;
};

// As fit_scale, for a scale and a minimum. Type::kStarts says how much of the range is cut off at each end, in steps.
template <class Type, int N>
YIVL_INLINE Affine fit_affine(const Groups<N>& g, int lane) {
    constexpr float kTop = Type::kTop;
    F low = load(&g.x[0][lane]), high = low;
    F sw = zero(), sx = zero(), sxx = zero();
    for (int i = 0; i < N; ++i) {
        const F x = load(&g.x[i][lane]), w = load(&g.w[i][lane]);
        low = min(low, x);
        high = max(high, x);
        const F wx = w * x;
        sw = sw + w;
        sx = sx + wx;
        sxx = sxx + wx * x;
    }
    // A minimum of a K type is never negative.
    if (!Type::kSigned) low = min(low, zero());
    const F per_weight = inverse(sw);

    F error = set1(3e38f);
    Affine best{zero(), zero() - low};
    const auto consider = [&](F inv, F minimum) YIVL_TARGET_LAMBDA {
        F sq = zero(), sqq = zero(), sqx = zero();
        for (int i = 0; i < N; ++i) {
            const F x = load(&g.x[i][lane]);
            const F q = Uniform<0, Type::kTop>::nearest((x + minimum) * inv);
            const F wq = load(&g.w[i][lane]) * q;
            sq = sq + wq;
            sqq = sqq + wq * q;
            sqx = sqx + wq * x;
        }
        // Least squares for scale and offset; for the scale alone where the offset may not be above zero.
        F scale = max((sw * sqx - sq * sx) * inverse(sw * sqq - sq * sq), zero());
        F offset = (sx - scale * sq) * per_weight;
        if (!Type::kSigned) {
            scale = above(offset, zero(), max(sqx * inverse(sqq), zero()), scale);
            offset = min(offset, zero());
        }
        const F e = sxx - set1(2.0f) * (scale * sqx + offset * sx) + scale * (scale * sqq) +
                    offset * (set1(2.0f) * (scale * sq) + offset * sw);
        best.scale = above(error, e, scale, best.scale);
        best.minimum = above(error, e, zero() - offset, best.minimum);
        error = min(e, error);
    };
    for (const auto& [below_low, above_high] : Type::kStarts) {
        const F step = (high - low) * set1(1.0f / (kTop + below_low + above_high));
        consider(inverse(step), set1(below_low) * (zero() - step) - low);
    }
    for (int i = 0; i < 2; ++i) consider(inverse(best.scale), best.minimum);
    return best;
}

template <int Top, int N>
void indices_of_affine(const Groups<N>& g, const float* scale, const float* minimum, Indices<N>& indices) {
    alignas(64) float rows[N][kBatch];
    for (int lane = 0; lane < kBatch; lane += kLanes) {
        const F inv = inverse(load(scale + lane)), m = load(minimum + lane);
        for (int i = 0; i < N; ++i) store(&rows[i][lane], Uniform<0, Top>::index((load(&g.x[i][lane]) + m) * inv));
    }
    transpose(indices, rows);
}

// ---- blocks of 32 with a scale of their own ----

// The scale as stored: the fitted one and what least squares make of it after rounding, whichever is better.
template <class Type>
void quantize_scaled(const QuantizeSource& source, int64_t begin, int64_t end, std::byte* dst) {
    using Grid = typename Type::Grid;
    using Block = typename Type::Block;
    Groups<kBlock> g = {};
    Indices<kBlock> indices;
    alignas(64) float scale[kBatch];
    half_bits bits[kBatch];
    for (; begin < end; begin += kBatch) {
        const int n = end - begin < kBatch ? static_cast<int>(end - begin) : kBatch;
        for (int i = 0; i < n; ++i) fill(g, i, source, begin + i, kBlock);
        for (int lane = 0; lane < kBatch; lane += kLanes) store(scale + lane, fit_scale<Type>(g, lane));
        for (int i = 0; i < n; ++i) {
            const StoredHalf d = stored_half(scale[i], g.shrink[i]);
            scale[i] = d.value;
            bits[i] = d.bits;
        }
        indices_of_scale<Grid>(g, scale, indices);
        for (int i = 0; i < n; ++i, dst += sizeof(Block)) {
            Block block;
            block.d = bits[i];
            Type::pack(block, indices.q[i]);
            __builtin_memcpy(dst, &block, sizeof(block));
        }
    }
}

template <class Type>
void quantize_affine(const QuantizeSource& source, int64_t begin, int64_t end, std::byte* dst) {
    using Block = typename Type::Block;
    Groups<kBlock> g = {};
    Indices<kBlock> indices;
    alignas(64) float scale[kBatch], minimum[kBatch];
    half_bits d[kBatch], m[kBatch];
    for (; begin < end; begin += kBatch) {
        const int n = end - begin < kBatch ? static_cast<int>(end - begin) : kBatch;
        for (int i = 0; i < n; ++i) fill(g, i, source, begin + i, kBlock);
        for (int lane = 0; lane < kBatch; lane += kLanes) {
            const Affine fit = fit_affine<Type>(g, lane);
            store(scale + lane, fit.scale);
            store(minimum + lane, fit.minimum);
        }
        for (int i = 0; i < n; ++i) {
            const StoredHalf s = stored_half(scale[i], g.shrink[i]), low = stored_half(-minimum[i], g.shrink[i]);
            scale[i] = s.value;
            minimum[i] = -low.value;
            d[i] = s.bits;
            m[i] = low.bits;
        }
        indices_of_affine<Type::kTop>(g, scale, minimum, indices);
        for (int i = 0; i < n; ++i, dst += sizeof(Block)) {
            Block block;
            block.d = d[i];
            block.m = m[i];
            Type::pack(block, indices.q[i]);
            __builtin_memcpy(dst, &block, sizeof(block));
        }
    }
}

// ---- blocks of 256 whose groups have integer scales ----

// Number of super-blocks side by side, and their groups.
template <int N>
struct Supers {
    static constexpr int kGroups = kSuperBlock / N;
    static constexpr int kCount = kBatch / kGroups;
};

// The choice for a batch: group scale = d * level.
struct Levels {
    alignas(64) float d[kBatch], level[kBatch], error[kBatch];
    half_bits bits[kBatch];  // of d; per super-block, at its first group
};

// Tries the levels within `reach` of the present ones.
template <class Type, int N>
void search_levels(const Groups<N>& g, Levels& a, int reach) {
    using Grid = typename Type::Grid;
    for (int lane = 0; lane < kBatch; lane += kLanes) {
        const F d = load(a.d + lane), start = load(a.level + lane);
        F level = start, error = scale_error<Grid>(g, lane, d * level);
        for (int step = 1; step <= reach; ++step) {
            for (const float move : {static_cast<float>(step), static_cast<float>(-step)}) {
                const F l = clamp(start + set1(move), set1(Type::kLowLevel), set1(Type::kHighLevel));
                const F e = scale_error<Grid>(g, lane, d * l);
                level = above(error, e, l, level);
                error = min(e, error);
            }
        }
        store(a.level + lane, level);
        store(a.error + lane, error);
    }
}

// d by least squares for the levels and the q that there are.
template <class Type, int N>
void refit_levels(const Groups<N>& g, const Levels& a, Levels& b) {
    alignas(64) float xs[kBatch], qs[kBatch];
    for (int lane = 0; lane < kBatch; lane += kLanes) {
        const F level = load(a.level + lane);
        const ScaleSums s = scale_sums<typename Type::Grid>(g, lane, inverse(load(a.d + lane) * level));
        store(xs + lane, s.qx * level);
        store(qs + lane, s.qq * (level * level));
        store(b.level + lane, level);
    }
    constexpr int kGroups = Supers<N>::kGroups;
    for (int first = 0; first < kBatch; first += kGroups) {
        float x = 0, q = 0;
        for (int i = first; i < first + kGroups; ++i) {
            x += xs[i];
            q += qs[i];
        }
        const StoredHalf d = stored_half(q > 0 ? x / q : 0, g.shrink[first]);
        b.bits[first] = d.bits;
        for (int i = first; i < first + kGroups; ++i) b.d[i] = d.value;
    }
}

// Keeps of each super-block the better one, in a.
template <int N>
void keep_better(Levels& a, const Levels& b) {
    constexpr int kGroups = Supers<N>::kGroups;
    for (int first = 0; first < kBatch; first += kGroups) {
        float old_error = 0, new_error = 0;
        for (int i = first; i < first + kGroups; ++i) {
            old_error += a.error[i];
            new_error += b.error[i];
        }
        if (!(new_error < old_error)) continue;
        a.bits[first] = b.bits[first];
        for (int i = first; i < first + kGroups; ++i) {
            a.d[i] = b.d[i];
            a.level[i] = b.level[i];
            a.error[i] = b.error[i];
        }
    }
}

template <class Type>
void quantize_super_scaled(const QuantizeSource& source, int64_t begin, int64_t end, std::byte* dst) {
    using Block = typename Type::Block;
    constexpr int N = Type::kGroup, kGroups = Supers<N>::kGroups, kCount = Supers<N>::kCount;
    Groups<N> g = {};
    for (float& shrink : g.shrink) shrink = 1;
    Indices<N> indices;
    alignas(64) float scale[kBatch];
    Levels a, b;
    for (; begin < end; begin += kCount) {
        const int n = end - begin < kCount ? static_cast<int>(end - begin) : kCount;
        for (int i = 0; i < n; ++i) fill(g, i * kGroups, source, begin + i, kSuperBlock);
        for (int lane = 0; lane < kBatch; lane += kLanes) store(scale + lane, fit_scale<Type>(g, lane));
        for (int first = 0; first < kBatch; first += kGroups) {
            float extreme = 0;
            for (int i = first; i < first + kGroups; ++i) {
                if (__builtin_fabsf(scale[i]) > __builtin_fabsf(extreme)) extreme = scale[i];
            }
            const StoredHalf d = stored_half(extreme * (1.0f / Type::kLowLevel), g.shrink[first]);
            a.bits[first] = d.bits;
            for (int i = first; i < first + kGroups; ++i) a.d[i] = d.value;
        }
        for (int lane = 0; lane < kBatch; lane += kLanes) {
            const F level = round(load(scale + lane) * inverse(load(a.d + lane)));
            store(a.level + lane, clamp(level, set1(Type::kLowLevel), set1(Type::kHighLevel)));
        }
        search_levels<Type>(g, a, Type::kReach);
        for (int i = 0; i < Type::kRefits; ++i) {
            refit_levels<Type>(g, a, b);
            search_levels<Type>(g, b, 1);
            keep_better<N>(a, b);
        }
        for (int i = 0; i < kBatch; ++i) scale[i] = a.d[i] * a.level[i];
        indices_of_scale<typename Type::Grid>(g, scale, indices);
        for (int i = 0; i < n; ++i, dst += sizeof(Block)) {
            Block block;
            block.d = a.bits[i * kGroups];
            int levels[kGroups];
            for (int j = 0; j < kGroups; ++j) levels[j] = static_cast<int>(a.level[i * kGroups + j]);
            Type::pack(block, levels, indices.q[i * kGroups]);
            __builtin_memcpy(dst, &block, sizeof(block));
        }
    }
}

// The choice for a batch: group scale = d * level, group minimum = m * low_level.
struct AffineLevels {
    alignas(64) float d[kBatch], m[kBatch], level[kBatch], low_level[kBatch], error[kBatch];
    half_bits d_bits[kBatch], m_bits[kBatch];  // per super-block, at its first group
};

// Tries pairs of levels round the present ones: each scale within `reach` with its lower end, middle and upper end held
// in place; then minima; then scales once more.
template <class Type, int N>
void search_affine_levels(const Groups<N>& g, AffineLevels& a, int reach) {
    for (int lane = 0; lane < kBatch; lane += kLanes) {
        const F d = load(a.d + lane), m = load(a.m + lane);
        F level = load(a.level + lane), low = load(a.low_level + lane);
        F error = affine_error<Type::kTop>(g, lane, d * level, m * low);
        const auto consider = [&](F l, F k) YIVL_TARGET_LAMBDA {
            l = clamp(l, zero(), set1(Type::kTopLevel));
            k = clamp(round(k), zero(), set1(Type::kTopLevel));
            const F e = affine_error<Type::kTop>(g, lane, d * l, m * k);
            level = above(error, e, l, level);
            low = above(error, e, k, low);
            error = min(e, error);
        };
        const F level0 = level, low0 = low, half_width = d * set1(Type::kTop / 2.0f) * inverse(m);
        for (int step = 1; step <= reach; ++step) {
            for (const float move : {static_cast<float>(step), static_cast<float>(-step)}) {
                consider(level0 + set1(move), low0);
                consider(level0 + set1(move), low0 + set1(move) * half_width);
                consider(level0 + set1(move), low0 + set1(2 * move) * half_width);
            }
        }
        const F low1 = low, level1 = level;
        for (int step = 1; step <= Type::kLowReach; ++step) {
            for (const float move : {static_cast<float>(step), static_cast<float>(-step)}) {
                consider(level1, low1 + set1(move));
            }
        }
        const F level2 = level, low2 = low;
        for (const float move : {1.0f, -1.0f}) consider(level2 + set1(move), low2);
        store(a.level + lane, level);
        store(a.low_level + lane, low);
        store(a.error + lane, error);
    }
}

// d and m by least squares for the levels and the q that there are.
template <class Type, int N>
void refit_affine_levels(const Groups<N>& g, const AffineLevels& a, AffineLevels& b) {
    alignas(64) float aa[kBatch], ab[kBatch], bb[kBatch], ax[kBatch], bx[kBatch];
    for (int lane = 0; lane < kBatch; lane += kLanes) {
        const F level = load(a.level + lane), low = load(a.low_level + lane);
        const F inv = inverse(load(a.d + lane) * level), minimum = load(a.m + lane) * low;
        F sw = zero(), sx = zero(), sq = zero(), sqq = zero(), sqx = zero();
        for (int i = 0; i < N; ++i) {
            const F x = load(&g.x[i][lane]), w = load(&g.w[i][lane]);
            const F q = Uniform<0, Type::kTop>::nearest((x + minimum) * inv);
            const F wq = w * q;
            sw = sw + w;
            sx = sx + w * x;
            sq = sq + wq;
            sqq = sqq + wq * q;
            sqx = sqx + wq * x;
        }
        store(aa + lane, sqq * (level * level));
        store(ab + lane, sq * (level * low));
        store(bb + lane, sw * (low * low));
        store(ax + lane, sqx * level);
        store(bx + lane, sx * low);
        store(b.level + lane, level);
        store(b.low_level + lane, low);
    }
    constexpr int kGroups = Supers<N>::kGroups;
    for (int first = 0; first < kBatch; first += kGroups) {
        float saa = 0, sab = 0, sbb = 0, sax = 0, sbx = 0;
        for (int i = first; i < first + kGroups; ++i) {
            saa += aa[i];
            sab += ab[i];
            sbb += bb[i];
            sax += ax[i];
            sbx += bx[i];
        }
        // x' = d * (level q) - m * low
        float d = a.d[first], m = a.m[first];
        const float determinant = saa * sbb - sab * sab;
        if (determinant > 1e-6f * saa * sbb) {
            d = (sbb * sax - sab * sbx) / determinant;
            m = (sab * sax - saa * sbx) / determinant;
        } else if (saa > 0) {
            d = (sax + m * sab) / saa;
        }
        const StoredHalf stored_d = stored_half(d > 0 ? d : 0, g.shrink[first]);
        const StoredHalf stored_m = stored_half(m > 0 ? m : 0, g.shrink[first]);
        b.d_bits[first] = stored_d.bits;
        b.m_bits[first] = stored_m.bits;
        for (int i = first; i < first + kGroups; ++i) {
            b.d[i] = stored_d.value;
            b.m[i] = stored_m.value;
        }
    }
}

template <int N>
void keep_better(AffineLevels& a, const AffineLevels& b) {
    constexpr int kGroups = Supers<N>::kGroups;
    for (int first = 0; first < kBatch; first += kGroups) {
        float old_error = 0, new_error = 0;
        for (int i = first; i < first + kGroups; ++i) {
            old_error += a.error[i];
            new_error += b.error[i];
        }
        if (!(new_error < old_error)) continue;
        a.d_bits[first] = b.d_bits[first];
        a.m_bits[first] = b.m_bits[first];
        for (int i = first; i < first + kGroups; ++i) {
            a.d[i] = b.d[i];
            a.m[i] = b.m[i];
            a.level[i] = b.level[i];
            a.low_level[i] = b.low_level[i];
            a.error[i] = b.error[i];
        }
    }
}

template <class Type>
void quantize_super_affine(const QuantizeSource& source, int64_t begin, int64_t end, std::byte* dst) {
    using Block = typename Type::Block;
    constexpr int N = Type::kGroup, kGroups = Supers<N>::kGroups, kCount = Supers<N>::kCount;
    Groups<N> g = {};
    for (float& shrink : g.shrink) shrink = 1;
    Indices<N> indices;
    alignas(64) float scale[kBatch], minimum[kBatch];
    AffineLevels a, b;
    for (; begin < end; begin += kCount) {
        const int n = end - begin < kCount ? static_cast<int>(end - begin) : kCount;
        for (int i = 0; i < n; ++i) fill(g, i * kGroups, source, begin + i, kSuperBlock);
        for (int lane = 0; lane < kBatch; lane += kLanes) {
            const Affine fit = fit_affine<Type>(g, lane);
            store(scale + lane, fit.scale);
            store(minimum + lane, fit.minimum);
        }
        for (int first = 0; first < kBatch; first += kGroups) {
            float largest_scale = 0, largest_minimum = 0;
            for (int i = first; i < first + kGroups; ++i) {
                largest_scale = scale[i] > largest_scale ? scale[i] : largest_scale;
                largest_minimum = minimum[i] > largest_minimum ? minimum[i] : largest_minimum;
            }
            const StoredHalf d = stored_half(largest_scale * (1.0f / Type::kTopLevel), g.shrink[first]);
            const StoredHalf m = stored_half(largest_minimum * (1.0f / Type::kTopLevel), g.shrink[first]);
            a.d_bits[first] = d.bits;
            a.m_bits[first] = m.bits;
            for (int i = first; i < first + kGroups; ++i) {
                a.d[i] = d.value;
                a.m[i] = m.value;
            }
        }
        for (int lane = 0; lane < kBatch; lane += kLanes) {
            const F top = set1(Type::kTopLevel);
            const F level = round(load(scale + lane) * inverse(load(a.d + lane)));
            const F low = round(load(minimum + lane) * inverse(load(a.m + lane)));
            store(a.level + lane, clamp(level, zero(), top));
            store(a.low_level + lane, clamp(low, zero(), top));
        }
        search_affine_levels<Type>(g, a, Type::kReach);
        for (int i = 0; i < Type::kRefits; ++i) {
            refit_affine_levels<Type>(g, a, b);
            search_affine_levels<Type>(g, b, 1);
            keep_better<N>(a, b);
        }
        for (int i = 0; i < kBatch; ++i) {
            scale[i] = a.d[i] * a.level[i];
            minimum[i] = a.m[i] * a.low_level[i];
        }
        indices_of_affine<Type::kTop>(g, scale, minimum, indices);
        for (int i = 0; i < n; ++i, dst += sizeof(Block)) {
            Block block;
            block.d = a.d_bits[i * kGroups];
            block.dmin = a.m_bits[i * kGroups];
            uint8_t levels[kGroups], low_levels[kGroups];
            for (int j = 0; j < kGroups; ++j) {
                levels[j] = static_cast<uint8_t>(a.level[i * kGroups + j]);
                low_levels[j] = static_cast<uint8_t>(a.low_level[i * kGroups + j]);
            }
            Type::pack(block, levels, low_levels, indices.q[i * kGroups]);
            __builtin_memcpy(dst, &block, sizeof(block));
        }
    }
}

// ---- the bytes of each type; dequant.cpp has the layouts ----

// Low halves of 32 indices, two to a byte: i and i + 16.
inline void pack_nibbles(uint8_t* qs, const uint8_t* q) {
    for (int i = 0; i < 16; ++i) qs[i] = static_cast<uint8_t>((q[i] & 15) | q[i + 16] << 4);
}
inline void pack_fifth_bits(uint8_t* qh, const uint8_t* q) {
    for (int i = 0; i < 4; ++i) qh[i] = 0;
    for (int i = 0; i < 32; ++i) qh[i / 8] = static_cast<uint8_t>(qh[i / 8] | (q[i] >> 4 & 1) << i % 8);
}

struct Q4_0 {
    using Block = BlockQ4_0;
    using Grid = Uniform<-8, 7>;
    static constexpr float kStarts[] = {-8, -7.5, -8.5, -7, -8.25, -7.75, -9, 7, 7.5, 8, 6.5};
    static void pack(Block& b, const uint8_t* q) { pack_nibbles(b.qs, q); }
};

struct Q5_0 {
    using Block = BlockQ5_0;
    using Grid = Uniform<-16, 15>;
    static constexpr float kStarts[] = {-16, -15.75, -16.25, -15.5, -16.5, -15, -17, 15, 15.25, 15.5, 15.75, 14.5, 16};
    static void pack(Block& b, const uint8_t* q) {
        pack_nibbles(b.qs, q);
        pack_fifth_bits(b.qh, q);
    }
};

struct IQ4_NL {
    using Block = BlockIQ4_NL;
    using Grid = NonLinear;
    static constexpr float kStarts[] = {-127, -120, -113, -134, -141, -106, 113, 106, 100, 120, 127, 134};
    static void pack(Block& b, const uint8_t* q) { pack_nibbles(b.qs, q); }
};

struct Cut {
    float below_low, above_high;
};

struct Q4_1 {
    using Block = BlockQ4_1;
    static constexpr int kTop = 15;
    static constexpr bool kSigned = true;
    static constexpr Cut kStarts[] = {{0, 0},   {0.25, 0.25}, {0.5, 0.5}, {-0.25, -0.25}, {0.75, 0.75},
                                      {0.5, 0}, {0, 0.5},     {1, 0},     {0, 1},         {1, 1}};
    static void pack(Block& b, const uint8_t* q) { pack_nibbles(b.qs, q); }
};

struct Q5_1 {
    using Block = BlockQ5_1;
    static constexpr int kTop = 31;
    static constexpr bool kSigned = true;
    static constexpr Cut kStarts[] = {{0, 0},   {0.25, 0.25}, {0.5, 0.5}, {-0.25, -0.25}, {0.75, 0.75},
                                      {0.5, 0}, {0, 0.5},     {1, 0},     {0, 1},         {1, 1}};
    static void pack(Block& b, const uint8_t* q) {
        pack_nibbles(b.qs, q);
        pack_fifth_bits(b.qh, q);
    }
};

struct Q3_K {
    using Block = BlockQ3_K;
    using Grid = Uniform<-4, 3>;
    static constexpr int kGroup = 16, kReach = 3, kRefits = 2;
    static constexpr float kLowLevel = -32, kHighLevel = 31;
    static constexpr float kStarts[] = {-4, -3.75, -4.25, -3.5, -4.5, -3.25, -3, 3, 3.25, 3.5, 2.75, 2.5};
    static void pack(Block& b, const int* levels, const uint8_t* q) {
        for (int i = 0; i < 12; ++i) b.scales[i] = 0;
        for (int i = 0; i < 16; ++i) {
            const int level = levels[i] + 32;
            b.scales[i % 8] = static_cast<uint8_t>(b.scales[i % 8] | (level & 15) << i / 8 * 4);
            b.scales[8 + i % 4] = static_cast<uint8_t>(b.scales[8 + i % 4] | level >> 4 << i / 4 * 2);
        }
        for (int i = 0; i < 32; ++i) {
            int high = 0;
            for (int j = 0; j < 8; ++j) high |= q[j * 32 + i] >> 2 << j;
            b.hmask[i] = static_cast<uint8_t>(high);
        }
        for (int i = 0; i < 64; ++i) {
            const uint8_t* p = q + i / 32 * 128 + i % 32;
            b.qs[i] = static_cast<uint8_t>((p[0] & 3) | (p[32] & 3) << 2 | (p[64] & 3) << 4 | (p[96] & 3) << 6);
        }
    }
};

struct Q6_K {
    using Block = BlockQ6_K;
    using Grid = Uniform<-32, 31>;
    static constexpr int kGroup = 16, kReach = 4, kRefits = 1;
    static constexpr float kLowLevel = -128, kHighLevel = 127;
    static constexpr float kStarts[] = {-32, -31.5, 31, 31.5};
    static void pack(Block& b, const int* levels, const uint8_t* q) {
        for (int i = 0; i < 16; ++i) b.scales[i] = static_cast<int8_t>(levels[i]);
        for (int half = 0; half < 2; ++half) {
            const uint8_t* p = q + half * 128;
            for (int i = 0; i < 64; ++i)
                b.ql[half * 64 + i] = static_cast<uint8_t>((p[i] & 15) | (p[i + 64] & 15) << 4);
            for (int i = 0; i < 32; ++i) {
                b.qh[half * 32 + i] =
                    static_cast<uint8_t>(p[i] >> 4 | p[i + 32] >> 4 << 2 | p[i + 64] >> 4 << 4 | p[i + 96] >> 4 << 6);
            }
        }
    }
};

struct IQ4_XS {
    using Block = BlockIQ4_XS;
    using Grid = NonLinear;
    static constexpr int kGroup = 32, kReach = 3, kRefits = 2;
    static constexpr float kLowLevel = -32, kHighLevel = 31;
    static constexpr float kStarts[] = {-127, -120, -113, -134, 113, 106, 120, 127};
    static void pack(Block& b, const int* levels, const uint8_t* q) {
        int high = 0;
        for (int i = 0; i < 4; ++i) b.scales_l[i] = 0;
        for (int i = 0; i < 8; ++i) {
            const int level = levels[i] + 32;
            b.scales_l[i / 2] = static_cast<uint8_t>(b.scales_l[i / 2] | (level & 15) << i % 2 * 4);
            high |= level >> 4 << i * 2;
            pack_nibbles(b.qs + i * 16, q + i * 32);
        }
        b.scales_h = static_cast<uint16_t>(high);
    }
};

struct Q2_K {
    using Block = BlockQ2_K;
    static constexpr int kGroup = 16, kTop = 3, kReach = 3, kLowReach = 2, kRefits = 2;
    static constexpr bool kSigned = false;
    static constexpr float kTopLevel = 15;
    static constexpr Cut kStarts[] = {{0, 0}, {0.25, 0.25}, {0.5, 0.5}, {-0.25, -0.25}, {0.5, 0}, {0, 0.5}};
    static void pack(Block& b, const uint8_t* levels, const uint8_t* low_levels, const uint8_t* q) {
        for (int i = 0; i < 16; ++i) b.scales[i] = static_cast<uint8_t>(levels[i] | low_levels[i] << 4);
        for (int i = 0; i < 64; ++i) {
            const uint8_t* p = q + i / 32 * 128 + i % 32;
            b.qs[i] = static_cast<uint8_t>(p[0] | p[32] << 2 | p[64] << 4 | p[96] << 6);
        }
    }
};

// Eight scales and eight minima of six bits.
inline void pack_levels(uint8_t* scales, const uint8_t* levels, const uint8_t* low_levels) {
    for (int i = 0; i < 4; ++i) {
        scales[i] = static_cast<uint8_t>(levels[i] | levels[i + 4] >> 4 << 6);
        scales[i + 4] = static_cast<uint8_t>(low_levels[i] | low_levels[i + 4] >> 4 << 6);
        scales[i + 8] = static_cast<uint8_t>((levels[i + 4] & 15) | (low_levels[i + 4] & 15) << 4);
    }
}
// Low halves of 256 indices, two to a byte: i and i + 32 of each 64.
inline void pack_super_nibbles(uint8_t* qs, const uint8_t* q) {
    for (int p = 0; p < 4; ++p) {
        for (int i = 0; i < 32; ++i) {
            qs[p * 32 + i] = static_cast<uint8_t>((q[p * 64 + i] & 15) | q[p * 64 + i + 32] << 4);
        }
    }
}

struct Q4_K {
    using Block = BlockQ4_K;
    static constexpr int kGroup = 32, kTop = 15, kReach = 3, kLowReach = 2, kRefits = 1;
    static constexpr bool kSigned = false;
    static constexpr float kTopLevel = 63;
    static constexpr Cut kStarts[] = {{0, 0}, {0.4, 0.4}, {0.5, 0}, {0, 0.5}};
    static void pack(Block& b, const uint8_t* levels, const uint8_t* low_levels, const uint8_t* q) {
        pack_levels(b.scales, levels, low_levels);
        pack_super_nibbles(b.qs, q);
    }
};

struct Q5_K {
    using Block = BlockQ5_K;
    static constexpr int kGroup = 32, kTop = 31, kReach = 3, kLowReach = 2, kRefits = 1;
    static constexpr bool kSigned = false;
    static constexpr float kTopLevel = 63;
    static constexpr Cut kStarts[] = {{0, 0}, {0.4, 0.4}, {0.5, 0}, {0, 0.5}};
    static void pack(Block& b, const uint8_t* levels, const uint8_t* low_levels, const uint8_t* q) {
        pack_levels(b.scales, levels, low_levels);
        pack_super_nibbles(b.qs, q);
        for (int i = 0; i < 32; ++i) {
            int high = 0;
            for (int j = 0; j < 8; ++j) high |= q[j * 32 + i] >> 4 << j;
            b.qh[i] = static_cast<uint8_t>(high);
        }
    }
};

// ---- without a search: the bytes that every other program makes of these types ----

// Bits of the largest magnitude of a block.
inline float largest_magnitude(const float* x) {
    uint32_t largest = 0;
    for (int i = 0; i < kBlock; ++i) {
        const uint32_t magnitude = __builtin_bit_cast(uint32_t, x[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    return __builtin_bit_cast(float, largest);
}

// Where a half would be infinite, the largest half; 1 / d, or 0 where that is infinite.
inline float limited(float d) { return d >= 65520.0f ? kHalfMax : d <= -65520.0f ? -kHalfMax : d; }
inline float finite_inverse(float d) { return __builtin_fabsf(d) > 1e-38f ? 1.0f / d : 0.0f; }

void quantize_q8_0(const QuantizeSource& source, int64_t begin, int64_t end, std::byte* dst) {
    for (; begin < end; ++begin, dst += sizeof(BlockQ8_0)) {
        const float* x = source.values + begin * kBlock;
        const float d = limited(largest_magnitude(x) / 127.0f), inv = finite_inverse(d);
        BlockQ8_0 block;
        block.d = half_from_float(d);
        for (int i = 0; i < kBlock; ++i) {
            // Halves are rounded away from zero.
            const float t = x[i] * inv;
            const float a = __builtin_fabsf(t) < 127.0f ? __builtin_fabsf(t) : 127.0f;
            const int whole = static_cast<int>(a);
            const int q = whole + (a - static_cast<float>(whole) >= 0.5f ? 1 : 0);
            block.qs[i] = static_cast<int8_t>(t < 0 ? -q : q);
        }
        __builtin_memcpy(dst, &block, sizeof(block));
    }
}

void quantize_plain_q4_0(const QuantizeSource& source, int64_t begin, int64_t end, std::byte* dst) {
    for (; begin < end; ++begin, dst += sizeof(BlockQ4_0)) {
        const float* x = source.values + begin * kBlock;
        const float largest = largest_magnitude(x);
        int i = 0;
        while (__builtin_fabsf(x[i]) != largest) ++i;
        const float d = limited(x[i] / -8.0f), inv = finite_inverse(d);
        BlockQ4_0 block;
        block.d = half_from_float(d);
        uint8_t q[kBlock];
        for (int j = 0; j < kBlock; ++j) {
            const float t = x[j] * inv + 8.5f;
            q[j] = static_cast<uint8_t>(static_cast<int>(t < 0.0f ? 0.0f : t > 15.0f ? 15.0f : t));
        }
        pack_nibbles(block.qs, q);
        __builtin_memcpy(dst, &block, sizeof(block));
    }
}

void copy_f32(const QuantizeSource& source, int64_t begin, int64_t end, std::byte* dst) {
    __builtin_memcpy(dst, source.values + begin, static_cast<size_t>(end - begin) * sizeof(float));
}

void round_to_f16(const QuantizeSource& source, int64_t begin, int64_t end, std::byte* dst) {
    for (int64_t i = begin; i < end; ++i) {
        const half_bits h = half_from_float(source.values[i]);
        __builtin_memcpy(dst + (i - begin) * 2, &h, 2);
    }
}

void round_to_bf16(const QuantizeSource& source, int64_t begin, int64_t end, std::byte* dst) {
    for (int64_t i = begin; i < end; ++i) {
        const uint32_t bits = __builtin_bit_cast(uint32_t, source.values[i]);
        uint32_t magnitude = bits & 0x7fffffff;
        magnitude = magnitude < 0x7f7f0000 ? magnitude : 0x7f7f0000;  // the largest, as above
        const uint32_t rounded = (magnitude + 0x7fff + (magnitude >> 16 & 1)) >> 16;
        const uint16_t b = static_cast<uint16_t>(rounded | (bits >> 16 & 0x8000));
        __builtin_memcpy(dst + (i - begin) * 2, &b, 2);
    }
}

void quantize(WeightType type, const QuantizeSource& source, int64_t begin, int64_t end, std::byte* dst) {
    switch (type) {
        case WeightType::F32: return copy_f32(source, begin, end, dst);
        case WeightType::F16: return round_to_f16(source, begin, end, dst);
        case WeightType::BF16: return round_to_bf16(source, begin, end, dst);
        case WeightType::Q8_0: return quantize_q8_0(source, begin, end, dst);
        case WeightType::Q4_0:
            return source.weighted ? quantize_scaled<Q4_0>(source, begin, end, dst)
                                   : quantize_plain_q4_0(source, begin, end, dst);
        case WeightType::Q5_0: return quantize_scaled<Q5_0>(source, begin, end, dst);
        case WeightType::IQ4_NL: return quantize_scaled<IQ4_NL>(source, begin, end, dst);
        case WeightType::Q4_1: return quantize_affine<Q4_1>(source, begin, end, dst);
        case WeightType::Q5_1: return quantize_affine<Q5_1>(source, begin, end, dst);
        case WeightType::Q2_K: return quantize_super_affine<Q2_K>(source, begin, end, dst);
        case WeightType::Q3_K: return quantize_super_scaled<Q3_K>(source, begin, end, dst);
        case WeightType::Q4_K: return quantize_super_affine<Q4_K>(source, begin, end, dst);
        case WeightType::Q5_K: return quantize_super_affine<Q5_K>(source, begin, end, dst);
        case WeightType::Q6_K: return quantize_super_scaled<Q6_K>(source, begin, end, dst);
        case WeightType::IQ4_XS: return quantize_super_scaled<IQ4_XS>(source, begin, end, dst);
    }
}

}  // namespace
