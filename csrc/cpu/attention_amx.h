// Attention on AMX tiles, to be included among their kernels: q k^T and softmax(..) v with operands rounded to
// bfloat16, the softmax, online over blocks of keys, in float32.

// Keys of one step of the softmax: their scores for 32 rows, 32 kB, are to stay near.
constexpr int64_t kKeyBlock = 256;
constexpr int64_t kKeyTiles = kKeyBlock / kTileTokens;
constexpr int64_t kKeySteps = kKeyBlock / kTileCols;

// A head in tiles.
struct HeadTiles {
    int64_t steps;  // of 32 columns
    int64_t cols;   // of 16 columns, even

    explicit HeadTiles(int64_t head_dim) : steps(divide_up(head_dim, kTileCols)), cols(steps * 2) {}

    // A block of keys is (kKeyTiles, steps) tiles, and its values, after them, (cols, kKeySteps).
    int64_t key_bytes() const { return kKeyTiles * steps * kTileBytes; }
    int64_t block_bytes() const { return key_bytes() + cols * kKeySteps * kTileBytes; }
};

int64_t packed_keys_bytes(int64_t n_keys, int64_t head_dim) {
    return divide_up(n_keys, kKeyBlock) * HeadTiles(head_dim).block_bytes();
}

// Two rows of 16 values, value by value.
YIVL_INLINE __m512i in_turn(__m512 a, __m512 b) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), to_bfloats(a, b));
}

// Of the last block only as many steps of 32 keys as there are, 0 where there is no key.
void pack_keys(std::byte* packed, const AttentionPiece& piece, int64_t block) {
    const HeadTiles head(piece.head_dim);
    const int64_t key = block * kKeyBlock;
    const int64_t n = min64(kKeyBlock, piece.n_keys - key), n_steps = divide_up(n, kTileCols);
    std::byte* const keys = packed + block * head.block_bytes();
    for (int64_t tile = 0; tile < n_steps * 2; ++tile) {
        const int64_t i = tile * kTileTokens;
        for (int64_t step = 0; step < head.steps; ++step) {
            const int64_t col = step * kTileCols;
            pack_tile(keys + (tile * head.steps + step) * kTileBytes, piece.k + (key + i) * piece.k_stride + col,
                      piece.k_stride, n - i, piece.head_dim - col, false);
        }
    }
    std::byte* const values = keys + head.key_bytes();
    for (int64_t i = 0; i < n_steps * kTileCols; i += 2) {
        const float* const v = piece.v + (key + i) * piece.v_stride;
        std::byte* const to = values + i / kTileCols * kTileBytes + i % kTileCols / 2 * 64;
        for (int64_t tile = 0; tile < head.cols; ++tile) {
            const int64_t col = tile * kTileTokens;
            const auto mask = static_cast<__mmask16>(first(piece.head_dim > col ? piece.head_dim - col : 0));
            const __m512 a = _mm512_maskz_loadu_ps(i < n ? mask : 0, v + col);
            const __m512 b = _mm512_maskz_loadu_ps(i + 1 < n ? mask : 0, v + piece.v_stride + col);
            put_row(to, tile * kKeySteps, in_turn(a, b));
        }
    }
}

// What 32 query rows need: two row tiles, each of them `..` tiles side by side.
constexpr int64_t kQueryRows = 2 * kTileRows;
struct QueryRows {
    std::byte* q;       // steps
    std::byte* scores;  // kKeyTiles, in floats; the weights of 32 keys take the place of the first 16 of these scores
    std::byte* out;     // cols, in floats
    float* totals;      // (kQueryRows, 16), to be added up
    float* largest;     // (kQueryRows)

    QueryRows(const HeadTiles& head, std::byte* memory)
        : q(memory),
          scores(q + 2 * head.steps * kTileBytes),
          out(scores + 2 * kKeyTiles * kTileBytes),
          totals(reinterpret_cast<float*>(out + 2 * head.cols * kTileBytes)),
          largest(totals + kQueryRows * 16) {}
};

int64_t attention_scratch_bytes(int64_t head_dim) {
    const HeadTiles head(head_dim);
    return 2 * (head.steps + kKeyTiles + head.cols) * kTileBytes +
           kQueryRows * 17 * static_cast<int64_t>(sizeof(float));
}

// Where row r of two row tiles of n tiles begins.
YIVL_INLINE std::byte* row_of(std::byte* tiles, int64_t n, int64_t r) {
    return tiles + r / kTileRows * n * kTileBytes + r % kTileRows * 64;
}

// Scores are exponents of 2: the softmax needs no more than that.
void pack_queries(const QueryRows& m, const HeadTiles& head, const AttentionPiece& piece, int64_t first_row,
                  int64_t n_rows) {
    const __m512 scale = _mm512_set1_ps(1.44269504f / __builtin_sqrtf(static_cast<float>(piece.head_dim)));
    for (int64_t r = 0; r < kQueryRows; ++r) {
        const int64_t row = first_row + r;
        const float* const q = piece.q + row / piece.group * piece.q_stride + row % piece.group * piece.head_dim;
        for (int64_t step = 0; step < head.steps; ++step) {
            const int64_t col = step * kTileCols;
            const __mmask32 mask = r < n_rows ? first(piece.head_dim - col) : 0;
            const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), q + col);
            const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), q + col + 16);
            put_row(row_of(m.q, head.steps, r), step,
                    to_bfloats(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale)));
        }
    }
}

// Tiles 0 to 3 are two tiles of each row tile, row_step apart.
YIVL_INLINE void zero_pairs() {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
}
YIVL_INLINE void load_pairs(const std::byte* from, int64_t row_step) {
    load_tile<0>(from, 64);
    load_tile<1>(from + kTileBytes, 64);
    load_tile<2>(from + row_step, 64);
    load_tile<3>(from + row_step + kTileBytes, 64);
}
YIVL_INLINE void store_pairs(std::byte* to, int64_t row_step) {
    store_tile<0>(to, 64);
    store_tile<1>(to + kTileBytes, 64);
    store_tile<2>(to + row_step, 64);
    store_tile<3>(to + row_step + kTileBytes, 64);
}

// Tiles 0 to 3 += a (2, n) b (n, 2). Tiles of a lie a_next apart and its rows a_step, columns of b b_step.
YIVL_INLINE void multiply_pairs(const std::byte* a, int64_t a_next, int64_t a_step, const std::byte* b, int64_t b_step,
                                int64_t n) {
    for (int64_t i = 0; i < n; ++i, a += a_next, b += kTileBytes) {
        load_tile<4>(a, 64);
        load_tile<6>(b, 64);
        multiply_tiles<0, 4, 6>();
        load_tile<7>(b + b_step, 64);
        multiply_tiles<1, 4, 7>();
        load_tile<5>(a + a_step, 64);
        multiply_tiles<2, 5, 6>();
        multiply_tiles<3, 5, 7>();
    }
}

void score(const QueryRows& m, const HeadTiles& head, const std::byte* keys, int64_t n_steps) {
    const int64_t tile_step = head.steps * kTileBytes;
    for (int64_t tile = 0; tile < n_steps * 2; tile += 2) {
        zero_pairs();
        multiply_pairs(m.q, kTileBytes, tile_step, keys + tile * tile_step, tile_step, head.steps);
        store_pairs(m.scores + tile * kTileBytes, kKeyTiles * kTileBytes);
    }
}

// 2^x within 2^-18, which bfloat16 does not see: a minimax fit of 2^f for the part above the next smaller integer.
YIVL_INLINE __m512 power_of_2(__m512 x) {
    constexpr int kBelow = 1;  // rounds down
    const __m512 f = _mm512_reduce_ps(x, kBelow);
    __m512 p = _mm512_set1_ps(1.3534168e-2f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.2011460e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4144276e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9300383e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0000026f));
    return _mm512_scalef_ps(p, x);
}

// Scores of the first `seen` keys become weights, those of the others 0; total and out are brought to the new largest
// score first, unless `begins`.
void softmax_row(const QueryRows& m, const HeadTiles& head, int64_t r, int64_t seen, int64_t n_steps, bool begins) {
    std::byte* const row = row_of(m.scores, kKeyTiles, r);
    const auto scores = [row](int64_t tile) YIVL_TARGET_LAMBDA { return _mm512_load_ps(row + tile * kTileBytes); };
    const auto seen_of = [seen](int64_t tile) YIVL_TARGET_LAMBDA {
        const int64_t left = seen - tile * kTileTokens;
        return static_cast<__mmask16>(first(left > 0 ? left : 0));
    };
    const int64_t whole = seen > 0 ? seen / kTileCols : 0;

    const float before = m.largest[r];
    __m512 most = _mm512_set1_ps(before), others = most;
    for (int64_t step = 0; step < whole; ++step) {
        most = _mm512_max_ps(most, scores(step * 2));
        others = _mm512_max_ps(others, scores(step * 2 + 1));
    }
    if (whole < n_steps) {
        most = _mm512_mask_max_ps(most, seen_of(whole * 2), most, scores(whole * 2));
        others = _mm512_mask_max_ps(others, seen_of(whole * 2 + 1), others, scores(whole * 2 + 1));
    }
    const float now = _mm512_reduce_max_ps(_mm512_max_ps(most, others));
    most = _mm512_set1_ps(now);

    __m512 total = begins ? _mm512_setzero_ps() : _mm512_load_ps(m.totals + r * 16);
    if (!begins && now > before) {
        const __m512 factor = power_of_2(_mm512_set1_ps(before - now));
        total = _mm512_mul_ps(total, factor);
        std::byte* const out = row_of(m.out, head.cols, r);
        for (int64_t tile = 0; tile < head.cols; ++tile) {
            _mm512_store_ps(out + tile * kTileBytes, _mm512_mul_ps(_mm512_load_ps(out + tile * kTileBytes), factor));
        }
    }
    for (int64_t step = 0; step < whole; ++step) {
        const __m512 a = power_of_2(_mm512_sub_ps(scores(step * 2), most));
        const __m512 b = power_of_2(_mm512_sub_ps(scores(step * 2 + 1), most));
        total = _mm512_add_ps(total, _mm512_add_ps(a, b));
        put_row(row, step * 2, to_bfloats(a, b));
    }
    for (int64_t step = whole; step < n_steps; ++step) {
        const __mmask16 first_half = seen_of(step * 2), second_half = seen_of(step * 2 + 1);
        const __m512 a = _mm512_maskz_mov_ps(first_half, power_of_2(_mm512_sub_ps(scores(step * 2), most)));
        const __m512 b = _mm512_maskz_mov_ps(second_half, power_of_2(_mm512_sub_ps(scores(step * 2 + 1), most)));
        total = _mm512_add_ps(total, _mm512_add_ps(a, b));
        put_row(row, step * 2, to_bfloats(a, b));
    }
    m.largest[r] = now;
    _mm512_store_ps(m.totals + r * 16, total);
}

// out = or += weights . values
void add_values(const QueryRows& m, const HeadTiles& head, const std::byte* values, int64_t n_steps, bool begins) {
    constexpr int64_t kColumn = kKeySteps * kTileBytes;
    for (int64_t tile = 0; tile < head.cols; tile += 2) {
        std::byte* const out = m.out + tile * kTileBytes;
        begins ? zero_pairs() : load_pairs(out, head.cols * kTileBytes);
        multiply_pairs(m.scores, 2 * kTileBytes, kKeyTiles * kTileBytes, values + tile * kColumn, kColumn, n_steps);
        store_pairs(out, head.cols * kTileBytes);
    }
}

void put_outputs(const QueryRows& m, const HeadTiles& head, const AttentionPiece& piece, int64_t first_row,
                 int64_t n_rows) {
    for (int64_t r = 0; r < n_rows; ++r) {
        const int64_t row = first_row + r;
        float* const to = piece.out + row / piece.group * piece.out_stride + row % piece.group * piece.head_dim;
        const std::byte* const out = row_of(m.out, head.cols, r);
        const __m512 factor = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_load_ps(m.totals + r * 16)));
        for (int64_t col = 0; col < piece.head_dim; col += 16) {
            _mm512_mask_storeu_ps(to + col, static_cast<__mmask16>(first(piece.head_dim - col)),
                                  _mm512_mul_ps(_mm512_load_ps(out + col / 16 * kTileBytes), factor));
        }
    }
}

void attention(const AttentionPiece& piece, const std::byte* packed, std::byte* scratch, bool (*stop)(const void*),
               const void* stop_arg) {
    const HeadTiles head(piece.head_dim);
    const QueryRows m(head, scratch);
    for (int64_t row = piece.row_begin; row < piece.row_end && !stop(stop_arg); row += kQueryRows) {
        begin_tiles();
        const int64_t n_rows = min64(kQueryRows, piece.row_end - row);
        const int64_t n_keys = piece.visible_keys(row + n_rows - 1);
        pack_queries(m, head, piece, row, n_rows);
        for (int64_t r = 0; r < kQueryRows; ++r) m.largest[r] = -3.0e38f;
        for (int64_t key = 0; key < n_keys; key += kKeyBlock) {
            const std::byte* const keys = packed + key / kKeyBlock * head.block_bytes();
            const int64_t n_steps = divide_up(min64(kKeyBlock, n_keys - key), kTileCols);
            score(m, head, keys, n_steps);
            for (int64_t r = 0; r < kQueryRows; ++r) {
                const int64_t visible = piece.visible_keys(row + min64(r, n_rows - 1)) - key;
                softmax_row(m, head, r, min64(visible, kKeyBlock), n_steps, key == 0);
            }
            add_values(m, head, keys + head.key_bytes(), n_steps, key == 0);
        }
        put_outputs(m, head, piece, row, n_rows);
        release_tiles();
    }
}
