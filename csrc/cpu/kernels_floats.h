// Products in float32 with weights of any type. Lanes are rows of the weights: kPanel rows are widened and transposed
// for many tokens at a time, whose values are broadcast one by one. Each output is one sum in order of the columns, so
// that it does not depend on how many tokens stand beside it.
//
// Included as kernels_body.h is, after it, and needs besides the names listed there:
//
//   from_half(p), from_bfloat(p)   kLanes numbers at p, as floats; p need not be aligned

namespace {

// As dequantize_row, bit for bit.
void dequantize(WeightType type, const std::byte* src, float* dst, int64_t n) {
    const auto with = [&]<F from(const std::byte*)>() YIVL_TARGET_LAMBDA {
        const int64_t whole = n / kLanes * kLanes;
        for (int64_t i = 0; i < whole; i += kLanes) store(dst + i, from(src + i * 2));
        dequantize_row(type, src + whole * 2, dst + whole, n - whole);
    };
    switch (type) {
        case WeightType::F16: return with.template operator()<from_half>();
        case WeightType::BF16: return with.template operator()<from_bfloat>();
        default: return dequantize_row(type, src, dst, n);
    }
}

// Columns that are widened at a time: whole blocks of every type.
constexpr int64_t kWideCols = kSuperBlock;
// Columns of a panel that stays in the first-level cache with the x of a tile.
constexpr int64_t kPanelCols = kWideCols / 2;
// Tokens that a widened panel is used for: their x should fit half of the second-level cache.
constexpr int64_t kFloatTokens = 40 * kTileRows;

int order_of_floats(WeightType) { return 0; }

int64_t packed_float_bytes(int64_t n_tokens, int64_t cols) {
    return n_tokens * cols * static_cast<int64_t>(sizeof(float));
}

// x lies in slabs of kWideCols columns, in these the tiles of each_tile, (columns, R) each.
void pack_floats(std::byte* dst, const PackedInput& p, int64_t group) {
    const int64_t begin = group * kTileRows, end = min64(begin + kTileRows, p.n_tokens);
    each_tile(begin, end, kTileRows, [&]<int R>(int64_t first) YIVL_TARGET_LAMBDA {
        const float* const x = p.x + (first - begin) * p.x_stride;
        for (int64_t col = 0; col < p.cols; col += kWideCols) {
            const int64_t n = min64(kWideCols, p.cols - col);
            float* const to = reinterpret_cast<float*>(dst) + col * p.n_tokens + first * n;
            for (int64_t i = 0; i < n; ++i) {
                YIVL_UNROLL
                for (int r = 0; r < R; ++r) to[i * R + r] = x[r * p.x_stride + col + i];
            }
        }
    });
}

struct FloatScratch {
    alignas(64) float panel[kWideCols * kPanel];    // (columns, rows)
    alignas(64) float wide[kPanel * kWideCols];     // (rows, columns)
    alignas(64) float sums[kFloatTokens * kPanel];  // (tokens, rows)
};

// Columns [col, col + n) of n_rows rows from w become the panel; rows that are missing are 0.
void widen(FloatScratch& s, const PackedPiece& p, const std::byte* w, int64_t n_rows, int64_t col, int64_t n) {
    const int64_t from = p.row_bytes * col / p.cols, bytes = p.row_bytes * n / p.cols;
    for (int64_t r = 0; r < kPanel; ++r) {
        float* const wide = s.wide + r * kWideCols;
        if (r < n_rows) {
            const std::byte* const row = w + r * p.row_bytes + from;
            dequantize(p.type, row, wide, n);
            // What the next call takes. At the end of a row that lies kPanel rows on.
            const std::byte* const next = row + bytes + (col + n < p.cols ? 0 : (kPanel - 1) * p.row_bytes);
            for (int64_t line = 0; line < bytes; line += 64) prefetch(next + line);
        } else {
            for (int64_t i = 0; i < n; ++i) wide[i] = 0.0f;
        }
    }
    for (int64_t i = 0; i < n; i += kLanes) {
        for (int v = 0; v < kTileVectors; ++v) {
            F lanes[kLanes];
            YIVL_UNROLL
            for (int l = 0; l < kLanes; ++l) lanes[l] = load_some(s.wide + (v * kLanes + l) * kWideCols + i, n - i);
            transpose(lanes);
            YIVL_UNROLL
            for (int l = 0; l < kLanes; ++l) store(s.panel + (i + l) * kPanel + v * kLanes, lanes[l]);
        }
    }
}

// y = or += sums + bias
inline void put_floats(const PackedPiece& p, const float* sums, int64_t token, int64_t row, int64_t n_rows) {
    for (int64_t i = 0; i < n_rows; i += kLanes) {
        const int64_t n = min64(kLanes, n_rows - i);
        float* const y = p.y + token * p.y_stride + row + i;
        F sum = load(sums + i);
        if (p.bias != nullptr) sum = add(sum, load_some(p.bias + row + i, n));
        if (p.add) sum = add(load_some(y, n), sum);
        store_some(y, sum, n);
    }
    p.finished(token, row, n_rows);
}

// One token with weights of 16 bits, rows [row, row + kPanel): from memory to the sums without a stop. The next rows
// are fetched meanwhile in the order of the file, which is how memory is quick.
template <F from(const std::byte*)>
void multiply_one_panel(const PackedPiece& p, int64_t row) {
    const float* const x = reinterpret_cast<const float*>(p.x);
    const std::byte* const w = p.w + row * p.row_bytes;
    F sums[kTileVectors];
    for (F& sum : sums) sum = zero();
    const std::byte* next = w + kPanel * p.row_bytes;
    for (int64_t col = 0; col < p.cols; col += kLanes) {
        YIVL_UNROLL
        for (int v = 0; v < kTileVectors; ++v) {
            F lanes[kLanes];
            YIVL_UNROLL
            for (int l = 0; l < kLanes; l += 4) {
                const std::byte* four = w + (v * kLanes + l) * p.row_bytes + col * 2;
                YIVL_IN_REGISTER(four);
                YIVL_STAYS_HERE();
                constexpr int64_t kBytes = 4 * kLanes * 2;  // of these four rows
                for (int64_t line = 0; line < kBytes; line += 64) prefetch_far(next + line);
                next += kBytes;
                YIVL_UNROLL
                for (int i = 0; i < 4; ++i) lanes[l + i] = from(four + i * p.row_bytes);
            }
            transpose(lanes);
            YIVL_UNROLL
            for (int l = 0; l < kLanes; ++l) sums[v] = fma(set1(x[col + l]), lanes[l], sums[v]);
        }
    }
    float values[kPanel];
    for (int v = 0; v < kTileVectors; ++v) store(values + v * kLanes, sums[v]);
    put_floats(p, values, 0, row, kPanel);
}

// Rows of the piece that this computed: none, or all whole panels.
int64_t multiply_one_token(const PackedPiece& p) {
    const bool halves = p.type == WeightType::F16 || p.type == WeightType::BF16;
    if (!halves || p.n_tokens != 1 || p.cols % kLanes != 0) return 0;
    int64_t row = 0;
    for (; row + kPanel <= p.n_rows; row += kPanel) {
        if (p.type == WeightType::F16) {
            multiply_one_panel<from_half>(p, row);
        } else {
            multiply_one_panel<from_bfloat>(p, row);
        }
    }
    return row;
}

int64_t float_scratch_bytes(int64_t, int64_t, int64_t) { return static_cast<int64_t>(sizeof(FloatScratch)); }

void multiply_floats(const PackedPiece& p, std::byte* scratch, bool (*stop)(const void*), const void* stop_arg) {
    FloatScratch& s = *reinterpret_cast<FloatScratch*>(scratch);
    const float* const x = reinterpret_cast<const float*>(p.x);
    // Equal shares: what few tokens use is widened as dearly as for many.
    const int64_t shares = (p.n_tokens + kFloatTokens - 1) / kFloatTokens;
    const int64_t share = round_up((p.n_tokens + shares - 1) / shares, kTileRows);
    for (int64_t token = 0; token < p.n_tokens; token += share) {
        const int64_t n_tokens = min64(share, p.n_tokens - token);
        for (int64_t row = multiply_one_token(p); row < p.n_rows; row += kPanel) {
            const int64_t n_rows = min64(kPanel, p.n_rows - row);
            for (int64_t col = 0; col < p.cols; col += kWideCols) {
                if (stop(stop_arg)) return;
                const int64_t n = min64(kWideCols, p.cols - col);
                widen(s, p, p.w + row * p.row_bytes, n_rows, col, n);
                for (int64_t i = 0; i < n; i += kPanelCols) {
                    each_tile(0, n_tokens, kTileRows, [&]<int R>(int64_t first) YIVL_TARGET_LAMBDA {
                        outer_tile<R, kTileVectors, 1, R>(
                            s.sums + first * kPanel, kPanel, x + col * p.n_tokens + (token + first) * n + i * R, R * n,
                            s.panel + i * kPanel, kPanel, min64(kPanelCols, n - i), col + i > 0);
                    });
                }
            }
            for (int64_t t = 0; t < n_tokens; ++t) put_floats(p, s.sums + t * kPanel, token + t, row, n_rows);
        }
    }
}

int64_t multiply_add_floats(int64_t rounds) {
    constexpr int kSums = 12;
    F acc[kSums];
    YIVL_UNROLL
    for (int i = 0; i < kSums; ++i) acc[i] = set1(static_cast<float>(i));
    const F a = set1(0.5f), b = set1(1.0f);
    for (int64_t r = 0; r < rounds; ++r) {
        YIVL_UNROLL
        for (int i = 0; i < kSums; ++i) acc[i] = fma(acc[i], a, b);
    }
    for (int i = 1; i < kSums; ++i) acc[0] = add(acc[0], acc[i]);
    asm volatile("" : : "m"(acc[0]));  // or the compiler would leave it all out
    return rounds * kSums * kLanes * 2;
}

const PackedKernels kFloatKernels = {
    .tokens = kTileRows,
    .order = order_of_floats,
    .packed_bytes = packed_float_bytes,
    .pack = pack_floats,
    .scratch_bytes = float_scratch_bytes,
    .linear = multiply_floats,
    .multiply_add = multiply_add_floats,
};

}  // namespace
