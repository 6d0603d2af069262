// The kernels, written once over a vector type. Each kernels_<isa>.cpp includes this file inside its own namespace and
// target region, after these definitions:
//
//   F                              a vector of kLanes floats
//   zero() set1(s) load(p) load_n(p, n) store(p, v) store_n(p, v, n)     n in [1, kLanes): the other lanes are 0
//   add sub mul div max min abs, fma(a, b, c) = a * b + c, below(a, b, x, y) = a < b ? x : y per lane
//                                  max and min are no number where b is none
//   round(v) to the nearest integer, scale(v, n) = v 2^n for integers n, where both are normal numbers
//   transpose(r) of kLanes vectors
//   sum(v), largest(v) over the lanes
//   prefetch(p) prefetch_far(p)    the cache line at p, soon; to the second-level cache
//   kTileRows x kTileVectors       accumulators of a tile
//   kKeyBlock                      keys that attention takes at a time: they and their values should fit half of the
//                                  second-level cache
//
// No include guard and no includes: standard headers must not be compiled inside a target region.

namespace {

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

inline F load_some(const float* p, int64_t n) { return n >= kLanes ? load(p) : load_n(p, n); }
inline void store_some(float* p, F v, int64_t n) { n >= kLanes ? store(p, v) : store_n(p, v, n); }

// e^x within 1.5 ulp on [-86.6, 88.37]; x beyond is clamped to that. r = x - n ln 2 with ln 2 in two parts, of which
// the first has few enough bits for n * part to be exact; the polynomial is a minimax fit of (e^r - 1 - r) / r^2.
inline F exp(F x) {
    x = min(set1(88.37f), max(set1(-86.6f), x));
    const F n = round(mul(x, set1(1.44269504f)));
    F r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    F p = set1(1.9789266e-4f);
    p = fma(p, r, set1(1.3945752e-3f));
    p = fma(p, r, set1(8.3335042e-3f));
    p = fma(p, r, set1(4.1666280e-2f));
    p = fma(p, r, set1(1.6666666e-1f));
    p = fma(p, r, set1(0.5f));
    p = fma(mul(r, r), p, r);
    return scale(add(p, set1(1.0f)), n);
}

// 2^x within 1 ulp for x in [-125, 0]; x below is clamped to that. A minimax fit for the part beside the nearest
// integer.
inline F power_of_2(F x) {
    x = max(set1(-125.0f), x);
    const F n = round(x);
    const F r = sub(x, n);
    F p = set1(1.5345812e-4f);
    p = fma(p, r, set1(1.3399931e-3f));
    p = fma(p, r, set1(9.6184890e-3f));
    p = fma(p, r, set1(5.5503288e-2f));
    p = fma(p, r, set1(2.4022647e-1f));
    p = fma(p, r, set1(6.9314721e-1f));
    return scale(fma(p, r, set1(1.0f)), n);
}

// The normal distribution's P(X <= -a), for a in [0, 6]: 2^q with q a fit of its logarithm, which brings it within
// 2e-8, and within 3e-6 of itself up to 4. a beyond is clamped to 6, where it is 1e-9.
inline F tail(F a) {
    a = min(set1(6.0f), a);
    F q = set1(-2.1759735e-08f);
    q = fma(q, a, set1(6.8415626e-07f));
    q = fma(q, a, set1(-9.1779322e-06f));
    q = fma(q, a, set1(6.6593735e-05f));
    q = fma(q, a, set1(-2.4787871e-04f));
    q = fma(q, a, set1(-6.1065726e-05f));
    q = fma(q, a, set1(7.0154898e-03f));
    q = fma(q, a, set1(-5.2483723e-02f));
    q = fma(q, a, set1(-4.5920804e-01f));
    q = fma(q, a, set1(-1.1511056e+00f));
    q = fma(q, a, set1(-9.9999998e-01f));
    return power_of_2(q);
}

// ---- norms and element-wise operations ----

// The sum of term(i) over the vectors i of n values. Four sums side by side: quicker, and closer than one long one.
template <class Term>
inline float sum_of(int64_t n, Term term) {
    F acc[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
        YIVL_UNROLL
        for (int j = 0; j < 4; ++j) acc[j] = add(acc[j], term(i + j * kLanes));
    }
    for (; i < n; i += kLanes) acc[0] = add(acc[0], term(i));
    return sum(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
}

inline float sum_of_squares(const float* x, int64_t n) {
    return sum_of(n, [x, n](int64_t i) YIVL_TARGET_LAMBDA {
        const F v = load_some(x + i, n - i);
        return mul(v, v);
    });
}

void layer_norm(float* y, const float* x, const float* weight, const float* bias, float eps, int64_t n) {
    const float total = sum_of(n, [x, n](int64_t i) YIVL_TARGET_LAMBDA { return load_some(x + i, n - i); });
    const float mean = total / static_cast<float>(n);
    for (int64_t i = 0; i < n; i += kLanes) {
        store_some(y + i, sub(load_some(x + i, n - i), set1(mean)), n - i);
    }
    const float variance = sum_of_squares(y, n) / static_cast<float>(n);
    const F scale = set1(1.0f / __builtin_sqrtf(variance + eps));
    for (int64_t i = 0; i < n; i += kLanes) {
        const F normal = mul(load_some(y + i, n - i), scale);
        store_some(y + i, fma(normal, load_some(weight + i, n - i), load_some(bias + i, n - i)), n - i);
    }
}

void rms_norm(float* y, const float* x, const float* weight, float eps, int64_t n) {
    const F scale = set1(1.0f / __builtin_sqrtf(sum_of_squares(x, n) / static_cast<float>(n) + eps));
    for (int64_t i = 0; i < n; i += kLanes) {
        store_some(y + i, mul(mul(load_some(x + i, n - i), scale), load_some(weight + i, n - i)), n - i);
    }
}

// x P(X <= x)
void gelu(float* x, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const F v = load_some(x + i, n - i);
        const F p = tail(abs(v));
        store_some(x + i, mul(v, below(v, zero(), p, sub(set1(1.0f), p))), n - i);
    }
}

void swiglu(float* gate, const float* up, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const F g = load_some(gate + i, n - i);
        // exp() ends at e^88: beyond, so must the dividend.
        const F silu = div(max(set1(-200.0f), g), add(set1(1.0f), exp(sub(zero(), g))));
        store_some(gate + i, mul(silu, load_some(up + i, n - i)), n - i);
    }
}

void add_rows(float* y, const float* x, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
        store_some(y + i, add(load_some(y + i, n - i), load_some(x + i, n - i)), n - i);
    }
}

void rotate(float* x, const float* cos_sin, int64_t n) {
    for (int64_t i = 0; i < n; i += 2) {
        const float a = x[i], b = x[i + 1], c = cos_sin[i], s = cos_sin[i + 1];
        x[i] = a * c - b * s;
        x[i + 1] = a * s + b * c;
    }
}

// ---- attention: online softmax over blocks of kKeyBlock keys ----

// So many rows do not repay copying the values side by side.
constexpr int64_t kFewQueryRows = 16;
constexpr int64_t kPanel = kTileVectors * kLanes;  // keys, or values of a head, that one tile takes at a time

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t round_up(int64_t n, int64_t multiple) { return divide_up(n, multiple) * multiple; }

constexpr int64_t kLine = 64;  // bytes

struct FetchNothing {
    YIVL_INLINE void operator()(int64_t) const {}
};

// Steps of a tile between two looks ahead.
constexpr int64_t kTogether = 4;

// c[r][0..V lanes) (+)= sum over i of a[r * row_step + i * step] * b[i][..], in order of i. The steps are constants: R
// addresses would not fit the registers. The next tile's `a` is fetched meanwhile, from where it lies if it is as
// large, and what fetch(i) fetches, for every kTogether-th i.
template <int R, int V, int row_step, int step, class Fetch = FetchNothing>
YIVL_INLINE void outer_tile(float* c, int64_t c_stride, const float* a, int64_t next, const float* b, int64_t b_stride,
                            int64_t k, bool accumulate, Fetch fetch = {}) {
    F acc[R][V];
    YIVL_UNROLL
    for (int r = 0; r < R; ++r) {
        YIVL_UNROLL
        for (int v = 0; v < V; ++v) acc[r][v] = accumulate ? load(c + r * c_stride + v * kLanes) : zero();
    }
    const auto one = [&](int64_t i) YIVL_INLINE_LAMBDA {
        F bs[V];
        YIVL_UNROLL
        for (int v = 0; v < V; ++v) bs[v] = load(b + i * b_stride + v * kLanes);
        YIVL_UNROLL
        for (int r = 0; r < R; ++r) {
            const auto as = set1(a[r * row_step + i * step]);
            YIVL_UNROLL
            for (int v = 0; v < V; ++v) acc[r][v] = fma(as, bs[v], acc[r][v]);
        }
    };
    int64_t i = 0;
    for (; i + kTogether <= k; i += kTogether) {
        YIVL_UNROLL
        for (int64_t at = 0; at < kTogether * step; at += kLine / 4) {
            prefetch(reinterpret_cast<const std::byte*>(a + next + i * step + at));
        }
        fetch(i);
        YIVL_UNROLL
        for (int64_t j = 0; j < kTogether; ++j) one(i + j);
    }
    for (; i < k; ++i) one(i);
    YIVL_UNROLL
    for (int r = 0; r < R; ++r) {
        YIVL_UNROLL
        for (int v = 0; v < V; ++v) store(c + r * c_stride + v * kLanes, acc[r][v]);
    }
}

struct AttentionRows {
    const AttentionPiece& piece;
    int64_t rows;
    int64_t tile;   // rows of a tile, all as even as can be: one of few waits for its own sums
    int64_t width;  // head_dim rounded up to whole vectors
    float* q;       // scaled, (head_dim, R) for every R rows that each_tile takes
    float* out;     // (rows, width)
    float* largest;
    float* totals;  // (rows, kLanes), to be added up
    float* k;       // a panel (head_dim, kPanel)
    float* v;       // panels of (kKeyBlock, kPanel)
    bool in_place;  // values are read where they are
    float* scores;  // (rows, kKeyBlock)
};

// Of keys [key, key + n), how many the rows up to `row` of a see.
inline int64_t visible_of(const AttentionRows& a, int64_t row, int64_t key, int64_t n) {
    return min64(n, a.piece.visible_keys(a.piece.row_begin + row) - key);
}

// fn<R>(row) for all rows, `size` of them at a time, at most kTileRows, and the rest together.
template <int R = kTileRows, class Fn>
YIVL_INLINE void each_tile(int64_t row, int64_t rows, int64_t size, Fn&& fn) {
    if (R <= size) {
        for (; row + R <= rows; row += R) fn.template operator()<R>(row);
    }
    if constexpr (R > 1) {
        if (row < rows) each_tile<R - 1>(row, rows, size, fn);
    }
}

// Few rows use each key and value once, and memory sets the pace, if only it is always asked for what comes next: lines
// in their order, to the second-level cache, with each step of the work as many bytes as it should take. What is asked
// for in a burst has no place to wait in, and is dropped.
struct LinesAhead {
    const std::byte* at = nullptr;
    int64_t n_bytes = 0;
    int64_t step = 0;  // bytes with each step, a power of two

    // From step `first` on.
    YIVL_INLINE LinesAhead from(int64_t first) const {
        return first * step < n_bytes ? LinesAhead{at + first * step, n_bytes - first * step, step} : LinesAhead();
    }
    YIVL_INLINE void operator()(int64_t i) const {
        const int64_t begin = i * step;
        if ((begin & (kLine - 1)) != 0) return;
        for (int64_t line = 0; line < kTogether * step; line += kLine) prefetch_far(at + begin + line);
    }
};

// n values over so many steps.
inline LinesAhead lines_ahead(const float* values, int64_t n, int64_t steps) {
    const int64_t n_bytes = n * static_cast<int64_t>(sizeof(float));
    int64_t step = 1;
    while (step * steps < n_bytes) step *= 2;
    return {reinterpret_cast<const std::byte*>(values), n_bytes, step};
}

// Scores of all rows for the packed panel, which are keys [j, j + kPanel) of a block.
void score(const AttentionRows& a, int64_t key, int64_t n, int64_t j, const LinesAhead& ahead) {
    const int64_t head_dim = a.piece.head_dim;
    int64_t tiles = 0;
    each_tile(0, a.rows, a.tile, [&]<int R>(int64_t row) YIVL_TARGET_LAMBDA {
        if (visible_of(a, row + R - 1, key, n) <= j) return;
        const auto tile = [&](auto fetch) YIVL_INLINE_LAMBDA {
            outer_tile<R, kTileVectors, 1, R>(a.scores + row * kKeyBlock + j, kKeyBlock, a.q + row * head_dim,
                                              R * head_dim, a.k, kPanel, head_dim, false, fetch);
        };
        if (a.in_place) {
            tile(ahead.from(head_dim * tiles++));
        } else {
            tile(FetchNothing());
        }
    });
}

// scores = 2^(score - the largest so far) of visible keys, 0 of others; totals and out are brought to the new largest
// first. Step by step for all R rows: one waits for its own results much longer than it works.
template <int R>
void softmax_rows(const AttentionRows& a, int64_t row, int64_t key, int64_t n) {
    int64_t visible[R];
    float now[R];
    for (int r = 0; r < R; ++r) {
        const float* const s = a.scores + (row + r) * kKeyBlock;
        visible[r] = visible_of(a, row + r, key, n);
        F most = set1(a.largest[row + r]);
        int64_t j = 0;
        for (; j + kLanes <= visible[r]; j += kLanes) most = max(most, load(s + j));
        now[r] = largest(most);
        for (; j < visible[r]; ++j) now[r] = s[j] > now[r] ? s[j] : now[r];
    }
    for (int r = 0; r < R; ++r) {
        if (now[r] <= a.largest[row + r]) continue;
        const F factor = power_of_2(set1(a.largest[row + r] - now[r]));
        float* const totals = a.totals + (row + r) * kLanes;
        float* const out = a.out + (row + r) * a.width;
        store(totals, mul(load(totals), factor));
        for (int64_t d = 0; d < a.width; d += kLanes) store(out + d, mul(load(out + d), factor));
        a.largest[row + r] = now[r];
    }
    for (int r = 0; r < R; ++r) {
        float* const s = a.scores + (row + r) * kKeyBlock;
        float* const totals = a.totals + (row + r) * kLanes;
        const F most = set1(now[r]);
        F total = load(totals);
        int64_t j = 0;
        for (; j + kLanes <= visible[r]; j += kLanes) {
            const F p = power_of_2(sub(load(s + j), most));
            store(s + j, p);
            total = add(total, p);
        }
        if (j < visible[r]) {
            float p[kLanes];
            store(p, power_of_2(sub(load_n(s + j, visible[r] - j), most)));
            for (int64_t i = 0; j + i < visible[r]; ++i) s[j + i] = p[i];
            total = add(total, load_n(s + j, visible[r] - j));
        }
        store(totals, total);
        for (j = visible[r] > 0 ? visible[r] : 0; j < n; ++j) s[j] = 0.0f;
    }
}

// Rows between the values that are read and those that are fetched.
constexpr int kValuesAhead = 16;

// out += scores . values for R rows and up to N vectors of columns. Values that are read where they are come to the
// first-level cache a little ahead.
template <int R, int N, bool in_place>
void value_tile(int64_t vectors, float* out, const float* p, const float* v, int64_t v_stride, int64_t width,
                int64_t n_keys, const LinesAhead& ahead) {
    if (vectors >= N) {
        const auto fetch = [&](int64_t i) YIVL_INLINE_LAMBDA {
            if constexpr (in_place) {
                YIVL_UNROLL
                for (int64_t j = 0; j < kTogether; ++j) {
                    YIVL_UNROLL
                    for (int64_t d = 0; d < N * kLanes; d += kLine / 4) {
                        prefetch(reinterpret_cast<const std::byte*>(v + (i + j + kValuesAhead) * v_stride + d));
                    }
                }
                ahead(i);
            }
        };
        outer_tile<R, N, kKeyBlock, 1>(out, width, p, R * kKeyBlock, v, v_stride, n_keys, true, fetch);
    } else if constexpr (N > 1) {
        value_tile<R, N - 1, in_place>(vectors, out, p, v, v_stride, width, n_keys, ahead);
    }
}

void add_values(const AttentionRows& a, int64_t key, int64_t n, const LinesAhead& ahead) {
    int64_t tiles = 0;
    for (int64_t d = 0; d < a.width; d += kPanel) {
        const int64_t stride = a.in_place ? a.piece.v_stride : kPanel;
        const float* const v = a.in_place ? a.piece.v + key * stride + d : a.v + d * kKeyBlock;
        each_tile(0, a.rows, a.tile, [&]<int R>(int64_t row) YIVL_TARGET_LAMBDA {
            const int64_t visible = visible_of(a, row + R - 1, key, n);
            if (visible <= 0) return;
            const auto tile = a.in_place ? value_tile<R, kTileVectors, true> : value_tile<R, kTileVectors, false>;
            tile((a.width - d) / kLanes, a.out + row * a.width + d, a.scores + row * kKeyBlock, v, stride, a.width,
                 visible, ahead.from(n * tiles++));
        });
    }
}

void pack_queries(const AttentionRows& a, float scale) {
    const AttentionPiece& piece = a.piece;
    each_tile(0, a.rows, a.tile, [&]<int R>(int64_t first) YIVL_TARGET_LAMBDA {
        for (int r = 0; r < R; ++r) {
            const int64_t row = piece.row_begin + first + r;
            const float* const from = piece.q + row / piece.group * piece.q_stride + row % piece.group * piece.head_dim;
            for (int64_t d = 0; d < piece.head_dim; ++d) a.q[first * piece.head_dim + d * R + r] = from[d] * scale;
        }
    });
}

// kLanes keys, of which n are there, into lanes of a panel; zeros for the others.
template <bool whole, class Fetch>
YIVL_INLINE void pack_lanes(float* to, const float* from, int64_t stride, int64_t n, int64_t head_dim, Fetch&& fetch) {
    for (int64_t d = 0; d < head_dim; d += kLanes) {
        if (d % (kLine / 4) == 0) {
            YIVL_UNROLL
            for (int i = 0; i < kLanes; ++i) {
                prefetch(reinterpret_cast<const std::byte*>(from + (i + kLanes) * stride + d));
            }
        }
        fetch(d / kLanes);
        F lanes[kLanes];
        YIVL_UNROLL
        for (int i = 0; i < kLanes; ++i) {
            if constexpr (whole) {
                lanes[i] = load(from + i * stride + d);
            } else {
                lanes[i] = i < n ? load_some(from + i * stride + d, head_dim - d) : zero();
            }
        }
        transpose(lanes);
        YIVL_UNROLL
        for (int i = 0; i < kLanes; ++i) {
            if (whole || d + i < head_dim) store(to + (d + i) * kPanel, lanes[i]);
        }
    }
}

// Keys [panel, panel + kPanel) of a block of n.
void pack_keys(const AttentionRows& a, int64_t key, int64_t n, int64_t panel, const LinesAhead& ahead) {
    const int64_t head_dim = a.piece.head_dim, looks = divide_up(head_dim, kLanes);
    for (int v = 0; v < kTileVectors; ++v) {
        const int64_t j = panel + v * kLanes;
        const auto fetch = [&](int64_t i) YIVL_INLINE_LAMBDA { ahead(kTogether * (v * looks + i)); };
        const auto pack = [&]<bool whole>() YIVL_INLINE_LAMBDA {
            pack_lanes<whole>(a.k + v * kLanes, a.piece.k + (key + j) * a.piece.k_stride, a.piece.k_stride, n - j,
                              head_dim, fetch);
        };
        if (j + kLanes <= n && head_dim % kLanes == 0) {
            pack.template operator()<true>();
        } else {
            pack.template operator()<false>();
        }
    }
}

void pack_values(const AttentionRows& a, int64_t key, int64_t n) {
    const int64_t head_dim = a.piece.head_dim;
    for (int64_t j = 0; j < n; ++j) {
        const float* from = a.piece.v + (key + j) * a.piece.v_stride;
        for (int64_t d = 0; d < head_dim; d += kLine / 4) {
            prefetch(reinterpret_cast<const std::byte*>(from + kValuesAhead * a.piece.v_stride + d));
        }
        for (int64_t d = 0; d < a.width; d += kLanes) {
            store(a.v + d / kPanel * kPanel * kKeyBlock + j * kPanel + d % kPanel, load_some(from + d, head_dim - d));
        }
    }
}

// Less than any score.
constexpr float kNoScore = -3.0e38f;

int64_t attention_scratch(int64_t rows, int64_t head_dim) {
    return round_up(rows * head_dim, kLanes) + rows * round_up(head_dim, kLanes) + round_up(rows, kLanes) +
           rows * kLanes + kPanel * head_dim + kKeyBlock * round_up(head_dim, kPanel) + rows * kKeyBlock;
}

void attention(const AttentionPiece& piece, float* scratch, bool (*stop)(const void*), const void* stop_arg) {
    const int64_t rows = piece.row_end - piece.row_begin;
    const int64_t head_dim = piece.head_dim;
    const int64_t width = round_up(head_dim, kLanes), n_tiles = divide_up(rows, kTileRows);
    const auto take = [&scratch](int64_t n) YIVL_TARGET_LAMBDA {
        float* p = scratch;
        scratch += n;
        return p;
    };
    const AttentionRows a{.piece = piece,
                          .rows = rows,
                          .tile = divide_up(rows, n_tiles),
                          .width = width,
                          .q = take(round_up(rows * head_dim, kLanes)),
                          .out = take(rows * width),
                          .largest = take(round_up(rows, kLanes)),
                          .totals = take(rows * kLanes),
                          .k = take(kPanel * head_dim),
                          .v = take(kKeyBlock * round_up(head_dim, kPanel)),
                          .in_place = rows <= kFewQueryRows && width == head_dim,
                          .scores = take(rows * kKeyBlock)};

    // Scores are exponents of 2.
    pack_queries(a, 1.44269504f / __builtin_sqrtf(static_cast<float>(head_dim)));
    for (int64_t i = 0; i < rows * width; ++i) a.out[i] = 0.0f;
    for (int64_t i = 0; i < rows; ++i) {
        a.largest[i] = kNoScore;
        store(a.totals + i * kLanes, zero());
    }

    const int64_t n_keys = piece.visible_keys(piece.row_end - 1);
    const bool fetches = a.in_place && piece.k_stride == head_dim && piece.v_stride == head_dim;
    for (int64_t key = 0; key < n_keys; key += kKeyBlock) {
        if (stop(stop_arg)) return;
        const int64_t n = min64(kKeyBlock, n_keys - key);
        // Values come while their keys are scored, half of them while these are packed.
        const auto values_ahead = [&](int64_t from, int64_t steps) YIVL_TARGET_LAMBDA {
            const int64_t some = min64(kPanel / 2, n - from);
            return fetches && some > 0 ? lines_ahead(piece.v + (key + from) * head_dim, some * head_dim, steps)
                                       : LinesAhead();
        };
        // A panel at a time: it stays in the first-level cache until all rows have used it.
        for (int64_t j = 0; j < n; j += kPanel) {
            pack_keys(a, key, n, j, values_ahead(j, kTogether * kTileVectors * divide_up(head_dim, kLanes)));
            score(a, key, n, j, values_ahead(j + kPanel / 2, n_tiles * head_dim));
        }
        if (!a.in_place) pack_values(a, key, n);
        each_tile(0, rows, a.tile, [&]<int R>(int64_t row) YIVL_TARGET_LAMBDA { softmax_rows<R>(a, row, key, n); });
        // And the next keys while these are added.
        const int64_t next = min64(kKeyBlock, n_keys - key - n), steps = n_tiles * n * divide_up(width, kPanel);
        add_values(
            a, key, n,
            fetches && next > 0 ? lines_ahead(piece.k + (key + n) * head_dim, next * head_dim, steps) : LinesAhead());
    }

    for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = piece.row_begin + i;
        float* to = piece.out + row / piece.group * piece.out_stride + row % piece.group * head_dim;
        // Where all scores are minus infinity there is no mean.
        const float total = a.largest[i] == kNoScore ? __builtin_nanf("") : sum(load(a.totals + i * kLanes));
        for (int64_t d = 0; d < head_dim; ++d) to[d] = a.out[i * width + d] / total;
    }
}

// ---- ceiling ----

void read(const float* x, int64_t n, float* sink) {
    *sink = sum_of(n, [x, n](int64_t i) YIVL_TARGET_LAMBDA { return load_some(x + i, n - i); });
}

}  // namespace
