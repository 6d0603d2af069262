// Part of kernels_integer.h: many tokens, for which weights are unpacked once.

namespace {

// A block of kLanes rows, unpacked.
struct WeightBlock {
    I pairs[kPairs];
    F scale, minimum;
    I missing;  // as that of x
};
// A slab of kLanes rows.
struct WeightSlab {
    WeightBlock blocks[kSlabBlocks];
};

template <class Rows>
struct StoreSink {
    WeightBlock* blocks;

    template <int b, int i>
    YIVL_INLINE void vector(I v) {
        if constexpr (!kSumsOfPairs && Rows::kOffset != 0) v = less(v, Rows::kOffset);
        store_integers(&blocks[b].pairs[i], v);
    }
    template <int b>
    YIVL_INLINE void finish(F scale, F minimum) {
        blocks[b].scale = scale;
        blocks[b].minimum = minimum;
        if constexpr (kSumsOfPairs) {
            I products = no_integers();
            repeat<kPairs / 2>([&]<int i>() YIVL_INLINE_LAMBDA {
                if constexpr (multiplied_as_sums(i)) {
                    products = multiply_pairs(products, blocks[b].pairs[i * 2], blocks[b].pairs[i * 2 + 1]);
                }
            });
            blocks[b].missing = negative(products);
        }
    }
};

// The n_rows rows from p, n_blocks of a slab.
template <class Rows>
void unpack_slab(WeightSlab& slab, const std::byte* p, int64_t row_bytes, int64_t n_rows, int64_t n_blocks) {
    RestOfSlab rest;
    rest.replace<Rows>(p, row_bytes, n_rows, n_blocks);
    StoreSink<Rows> sink{slab.blocks};
    Rows::unpack(p, row_bytes, sink);
}

// A tile: so many vectors of rows by kIntegerTokens tokens.
constexpr int kIntegerRows = 2;
constexpr int64_t kSideRows = kIntegerRows * kLanes;
constexpr int kTileSums = kIntegerRows * kIntegerTokens;

// Pairs of columns that are multiplied at once.
constexpr int kStep = kSumsOfPairs ? 2 : 1;

template <int step>
YIVL_INLINE I multiply_step(I sums, const I (&w)[kStep], const I (&x)[kStep]) {
    if constexpr (!kSumsOfPairs) {
        return multiply_pairs(sums, w[0], x[0]);
    } else if constexpr (multiplied_as_sums(step)) {
        return multiply_pairs(sums, plus(w[0], x[1]), plus(w[1], x[0]));
    } else {
        return multiply_pairs(multiply_pairs(sums, w[0], x[0]), w[1], x[1]);
    }
}

// What the next turn unpacks is fetched while this one multiplies, a little with each block of each tile: the loads of
// the tiles would wait behind a burst.
struct NextTurn {
    const std::byte* near;  // slab_bytes of each of near_rows rows, to the first-level cache
    int64_t slab_bytes, row_bytes, near_rows;
    const std::byte* far;  // lines one after the other, to the second-level cache
    int64_t far_lines;
    int64_t rows_at_once = 0, lines_at_once = 0;

    // In so many steps.
    YIVL_INLINE void spread(int64_t n_steps) {
        rows_at_once = (near_rows + n_steps - 1) / n_steps;
        lines_at_once = (far_lines + n_steps - 1) / n_steps;
    }
    YIVL_INLINE void fetch_some() {
        for (int64_t n = min64(rows_at_once, near_rows); n > 0; --n, --near_rows, near += row_bytes) {
            for (int64_t line = 0; line < slab_bytes; line += 64) prefetch(near + line);
        }
        for (int64_t n = min64(lines_at_once, far_lines); n > 0; --n, --far_lines, far += 64) prefetch_far(far);
    }
};

// `sums` (rows, tokens) += a tile of T tokens over a slab, or = if `first`. What the next tile takes is fetched
// meanwhile.
template <int T, class Sums>
void multiply_tile(Sums, NextTurn& next_turn, F* sums, const WeightSlab* w, const InputSlab* x, int64_t n_blocks,
                   bool first) {
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
    if constexpr (Sums::kOneScale) {
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
                if constexpr (kSumsOfPairs) {
                    acc[r][t] = add_integers(w[r].blocks[b].missing, integers(x[t].missing[b]));
                }
            }
        }
        next_turn.fetch_some();
        YIVL_UNROLL
        for (int t = 0; t < T; ++t) prefetch(reinterpret_cast<const std::byte*>(x[T + t].integers[b]));
        if (b < T) prefetch(reinterpret_cast<const std::byte*>(x[T + b].scale));
        prefetch(reinterpret_cast<const std::byte*>(sums + kTileSums) + b * 2 * 64);
        prefetch(reinterpret_cast<const std::byte*>(sums + kTileSums) + (b * 2 + 1) * 64);
        repeat<kPairs / kStep>([&]<int step>() YIVL_INLINE_LAMBDA {
            I ws[R][kStep], xs[kStep];
            YIVL_UNROLL
            for (int r = 0; r < R; ++r) {
                YIVL_UNROLL
                for (int j = 0; j < kStep; ++j) ws[r][j] = load_integers(&w[r].blocks[b].pairs[step * kStep + j]);
            }
            YIVL_UNROLL
            for (int t = 0; t < T; ++t) {
                YIVL_UNROLL
                for (int j = 0; j < kStep; ++j) xs[j] = pair(x[t].integers[b] + (step * kStep + j) * 2);
                YIVL_UNROLL
                for (int r = 0; r < R; ++r) acc[r][t] = multiply_step<step>(acc[r][t], ws[r], xs);
            }
        });
        YIVL_UNROLL
        for (int t = 0; t < T; ++t) {
            const F scale = set1(x[t].scale[b]);
            YIVL_UNROLL
            for (int r = 0; r < R; ++r) {
                if constexpr (Sums::kOneScale) {
                    slab[r][t] = fma(to_floats(acc[r][t]), scale, slab[r][t]);
                } else {
                    total[r][t] = fma(to_floats(acc[r][t]), mul(w[r].blocks[b].scale, scale), total[r][t]);
                }
            }
        }
    }
    if constexpr (Sums::kOneScale) {
        begin();
        if constexpr (Sums::kMinimum) {
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

// Tokens whose slabs of x and sums stay in the second-level cache, while the weights are unpacked for each of them.
constexpr int64_t kTokensAtOnce = 48 * kIntegerTokens;

// How tokens are cut into tiles: as many full ones as there are, then narrow ones, of which two take the place of a
// full one that would be followed by next to nothing.
struct Tiles {
    static constexpr int kNarrow = kIntegerTokens * 2 / 3;

    int64_t n_full, n_narrow = 0;

    YIVL_INLINE Tiles(int64_t n_tokens, bool few) : n_full((n_tokens + kIntegerTokens - 1) / kIntegerTokens) {
        const int64_t rest = n_tokens - (n_full - 1) * kIntegerTokens;  // in the last
        if (!few || rest > kNarrow) return;
        n_narrow = n_full > 1 && rest <= 2 * kNarrow - kIntegerTokens ? 2 : 1;
        n_full -= n_narrow;
    }
    YIVL_INLINE int64_t count() const { return n_full + n_narrow; }
    YIVL_INLINE int64_t first_token(int64_t tile) const {
        return tile * kIntegerTokens - (tile > n_full ? tile - n_full : 0) * (kIntegerTokens - kNarrow);
    }
};

// Tokens [token, token + n_tokens) of the piece. The last tile may be wider and higher than what is left: what it
// computes from memory that happens to lie there is not read. With `few` tokens the next rows of the file are fetched.
template <class Rows, bool few>
void multiply_some(const PackedPiece& p, int64_t token, int64_t n_tokens, std::byte* scratch, bool (*stop)(const void*),
                   const void* stop_arg) {
    WeightSlab* const w = reinterpret_cast<WeightSlab*>(scratch);
    F* const sums = reinterpret_cast<F*>(scratch + kIntegerRows * sizeof(WeightSlab));
    const int64_t n_slabs = (p.cols + kSlabCols - 1) / kSlabCols;
    const Tiles tiles(n_tokens, few);
    for (int64_t s = 0; s < n_slabs; ++s) {
        if (stop(stop_arg)) return;
        const int64_t n_blocks = min64(kSlabCols, p.cols - s * kSlabCols) / kBlock;
        // A slab's tokens lie side by side.
        const InputSlab* const x = reinterpret_cast<const InputSlab*>(p.x) + s * p.n_tokens + token;
        for (int64_t row = 0; row < p.n_rows; row += kSideRows) {
            const std::byte* const from = p.w + row * p.row_bytes + s * Rows::kBytes;
            for (int r = 0; r < kIntegerRows; ++r) {
                const int64_t n_rows = min64(kLanes, p.n_rows - row - r * kLanes);
                if (n_rows > 0) unpack_slab<Rows>(w[r], from + r * kLanes * p.row_bytes, p.row_bytes, n_rows, n_blocks);
            }
            const bool more = row + kSideRows < p.n_rows;
            NextTurn next_turn{
                .near = more ? from + kSideRows * p.row_bytes : p.w + (s + 1) * Rows::kBytes,
                .slab_bytes = Rows::kBytes,
                .row_bytes = p.row_bytes,
                .near_rows = min64(kSideRows, p.n_rows - (more ? row + kSideRows : 0)),
                .far = p.w + kSideRows * (p.row_bytes + s * Rows::kBytes),
                .far_lines = few ? (kSideRows * Rows::kBytes + 63) / 64 : 0,
            };
            next_turn.spread(tiles.count() * n_blocks);
            F* const mine = sums + row / kSideRows * tiles.count() * kTileSums;
            const auto multiply = [&]<int T>(int64_t tile) YIVL_TARGET_LAMBDA {
                multiply_tile<T>(typename Rows::Sums(), next_turn, mine + tile * kTileSums, w,
                                 x + tiles.first_token(tile), n_blocks, s == 0);
            };
            for (int64_t tile = 0; tile < tiles.n_full; ++tile) multiply.template operator()<kIntegerTokens>(tile);
            if constexpr (few) {
                for (int64_t tile = tiles.n_full; tile < tiles.count(); ++tile) {
                    multiply.template operator()<Tiles::kNarrow>(tile);
                }
            }
        }
    }
    // All rows of a tile's tokens together: each token's row of y lies in pages of its own.
    for (int64_t tile = 0; tile < tiles.count(); ++tile) {
        const int64_t first = tiles.first_token(tile), end = min64(tiles.first_token(tile + 1), n_tokens);
        for (int64_t row = 0; row < p.n_rows; row += kLanes) {
            const F* const mine =
                sums + (row / kSideRows * tiles.count() + tile) * kTileSums + row % kSideRows / kLanes * kIntegerTokens;
            for (int64_t t = first; t < end; ++t) {
                put_outputs(p, token + t, row, mine[t - first], min64(kLanes, p.n_rows - row));
            }
        }
        for (int64_t t = first; t < end; ++t) p.finished(token + t, 0, p.n_rows);
    }
}

// Values of x that stay in the second-level cache.
constexpr int64_t kFewValues = 3 << 16;

// So few tokens that weights are taken in the order of the file, and fetched in it.
template <class Rows>
void multiply_few(const PackedPiece& p, std::byte* scratch, bool (*stop)(const void*), const void* stop_arg) {
    PackedPiece side = p;
    side.finish = nullptr;
    for (int64_t row = 0; row < p.n_rows; row += kSideRows) {
        side.y = p.y + row;
        side.w = p.w + row * p.row_bytes;
        side.n_rows = min64(kSideRows, p.n_rows - row);
        if (p.bias != nullptr) side.bias = p.bias + row;
        multiply_some<Rows, true>(side, 0, p.n_tokens, scratch, stop, stop_arg);
    }
    for (int64_t t = 0; t < p.n_tokens; ++t) p.finished(t, 0, p.n_rows);
}

template <class Rows>
void multiply_many(const PackedPiece& p, std::byte* scratch, bool (*stop)(const void*), const void* stop_arg) {
    const bool few = p.n_tokens <= kTokensAtOnce && p.n_tokens * p.cols <= kFewValues;
    if (few) return multiply_few<Rows>(p, scratch, stop, stop_arg);
    for (int64_t token = 0; token < p.n_tokens; token += kTokensAtOnce) {
        multiply_some<Rows, false>(p, token, min64(kTokensAtOnce, p.n_tokens - token), scratch, stop, stop_arg);
    }
}

}  // namespace
