// Blocks of 256 weights whose groups have integer scales; a part of quantizers_body.h.

namespace {

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

    void take(const Levels& other, int first, int n) {
        bits[first] = other.bits[first];
        for (int i = first; i < first + n; ++i) {
            d[i] = other.d[i];
            level[i] = other.level[i];
            error[i] = other.error[i];
        }
    }
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

// Keeps of each super-block the better choice, in a.
template <int N, class Choice>
void keep_better(Choice& a, const Choice& b) {
    constexpr int kGroups = Supers<N>::kGroups;
    for (int first = 0; first < kBatch; first += kGroups) {
        float old_error = 0, new_error = 0;
        for (int i = first; i < first + kGroups; ++i) {
            old_error += a.error[i];
            new_error += b.error[i];
        }
        if (new_error < old_error) a.take(b, first, kGroups);
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

    void take(const AffineLevels& other, int first, int n) {
        d_bits[first] = other.d_bits[first];
        m_bits[first] = other.m_bits[first];
        for (int i = first; i < first + n; ++i) {
            d[i] = other.d[i];
            m[i] = other.m[i];
            level[i] = other.level[i];
            low_level[i] = other.low_level[i];
            error[i] = other.error[i];
        }
    }
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
        const auto [sq, sqq, sqx] = affine_sums<Type::kTop>(g, lane, inv, minimum);
        F sw = zero(), sx = zero();
        for (int i = 0; i < N; ++i) {
            const F w = load(&g.w[i][lane]);
            sw = sw + w;
            sx = sx + w * load(&g.x[i][lane]);
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

}  // namespace
