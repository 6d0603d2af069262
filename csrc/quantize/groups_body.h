// Sixteen groups of weights side by side and the scales that fit them; a part of quantizers_body.h.

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

// Sums of w q, w q q and w q x for the q that an inverse scale and a minimum give.
struct AffineSums {
    F q, qq, qx;
};
template <int Top, int N>
YIVL_INLINE AffineSums affine_sums(const Groups<N>& g, int lane, F inv, F minimum) {
    AffineSums s{zero(), zero(), zero()};
    for (int i = 0; i < N; ++i) {
        const F x = load(&g.x[i][lane]);
        const F q = Uniform<0, Top>::nearest((x + minimum) * inv);
        const F wq = load(&g.w[i][lane]) * q;
        s.q = s.q + wq;
        s.qq = s.qq + wq * q;
        s.qx = s.qx + wq * x;
    }
    return s;
}

struct Affine {
    F scale, minimum;
};

// As fit_scale, for a scale and a minimum. Type::kStarts are the cuts to try.
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
        const auto [sq, sqq, sqx] = affine_sums<Type::kTop>(g, lane, inv, minimum);
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

}  // namespace
