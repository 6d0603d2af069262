// The products of attention on AMX tiles, to be included among their kernels: q k^T and softmax(..) v with operands
// rounded to bfloat16. What lies between, the softmax, is computed by the AVX-512 kernels in float32.

// Tiles in the memory of a piece: q (rows, head_dim), then of a block of keys k, values and weights of 32 rows.
struct AttentionMemory {
    int64_t row_tiles, steps, col_tiles;  // even; of head_dim: tiles of 32, even ones of 16
    int64_t key_tiles, key_steps;         // tiles of 16 and of 32 keys
    std::byte *q, *k, *v, *p;

    AttentionMemory(int64_t rows, int64_t head_dim, int64_t block, std::byte* memory)
        : row_tiles(divide_up(rows, 2 * kTileRows) * 2),
          steps(divide_up(head_dim, kTileCols)),
          col_tiles(steps * 2),
          key_tiles(block / kTileTokens),
          key_steps(block / kTileCols),
          q(memory),
          k(q + row_tiles * steps * kTileBytes),
          v(k + key_tiles * steps * kTileBytes),
          p(v + key_steps * col_tiles * kTileBytes) {}
    AttentionMemory(const AttentionPiece& piece, int64_t block, std::byte* memory)
        : AttentionMemory(piece.row_end - piece.row_begin, piece.head_dim, block, memory) {}

    int64_t bytes() const { return p + 2 * key_steps * kTileBytes - q; }
};

int64_t attention_memory_bytes(int64_t rows, int64_t head_dim, int64_t block) {
    return AttentionMemory(rows, head_dim, block, nullptr).bytes();
}

void pack_queries(const AttentionPiece& piece, float scale, int64_t block, std::byte* memory) {
    const AttentionMemory m(piece, block, memory);
    const __m512 factor = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < m.row_tiles * kTileRows; ++i) {
        const int64_t row = piece.row_begin + i;
        const float* const q = piece.q + row / piece.group * piece.q_stride + row % piece.group * piece.head_dim;
        std::byte* const to = m.q + i / kTileRows * m.steps * kTileBytes + i % kTileRows * 64;
        for (int64_t step = 0; step < m.steps; ++step) {
            const int64_t col = step * kTileCols;
            const __mmask32 mask = row < piece.row_end ? first(piece.head_dim - col) : 0;
            const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), q + col);
            const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), q + col + 16);
            put_row(to, step, to_bfloats(_mm512_mul_ps(low, factor), _mm512_mul_ps(high, factor)));
        }
    }
}

// Of n keys from `key` on, how many the two row tiles from `tile` on see.
int64_t seen_keys(const AttentionPiece& piece, int64_t tile, int64_t key, int64_t n) {
    const int64_t row = min64(piece.row_begin + (tile + 2) * kTileRows, piece.row_end) - 1;
    return min64(n, piece.visible_keys(row) - key);
}

// Tiles 0 to 3 += a (2, n) b (n, 2), tiles of one row of a and of one column of b side by side.
void multiply_pairs(const std::byte* a, int64_t a_step, const std::byte* b, int64_t b_step, int64_t n) {
    for (int64_t i = 0; i < n; ++i, a += kTileBytes, b += kTileBytes) {
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

void store_pairs(float* to, int64_t stride) {
    const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
    store_tile<0>(to, bytes);
    store_tile<1>(to + kTileTokens, bytes);
    store_tile<2>(to + kTileRows * stride, bytes);
    store_tile<3>(to + kTileRows * stride + kTileTokens, bytes);
}

void scores(const AttentionPiece& piece, int64_t key, int64_t n, float* scores, int64_t block, std::byte* memory) {
    const AttentionMemory m(piece, block, memory);
    const int64_t tile_step = m.steps * kTileBytes;
    for (int64_t j = 0; j < divide_up(n, 2 * kTileTokens) * 2; ++j) {
        const int64_t first_key = j * kTileTokens;
        for (int64_t step = 0; step < m.steps; ++step) {
            const int64_t col = step * kTileCols;
            pack_tile(m.k + j * tile_step + step * kTileBytes, piece.k + (key + first_key) * piece.k_stride + col,
                      piece.k_stride, n - first_key, piece.head_dim - col, false);
        }
    }
    begin_tiles();
    for (int64_t t = 0; t < m.row_tiles; t += 2) {
        for (int64_t j = 0; j * kTileTokens < seen_keys(piece, t, key, n); j += 2) {
            zero_tile<0>();
            zero_tile<1>();
            zero_tile<2>();
            zero_tile<3>();
            multiply_pairs(m.q + t * tile_step, tile_step, m.k + j * tile_step, tile_step, m.steps);
            store_pairs(scores + t * kTileRows * block + j * kTileTokens, block);
        }
    }
    release_tiles();
}

void pack_values(const AttentionMemory& m, const AttentionPiece& piece, int64_t key, int64_t n) {
    // Two rows of 16 values, value by value.
    alignas(64) static constexpr uint16_t kInTurn[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i in_turn = _mm512_load_si512(kInTurn);
    for (int64_t i = 0; i < divide_up(n, kTileCols) * kTileCols; i += 2) {
        const float* const v = piece.v + (key + i) * piece.v_stride;
        std::byte* const to = m.v + i / kTileCols * kTileBytes + i % kTileCols / 2 * 64;
        for (int64_t tile = 0; tile < m.col_tiles; ++tile) {
            const int64_t col = tile * kTileTokens;
            const auto mask = static_cast<__mmask16>(first(piece.head_dim > col ? piece.head_dim - col : 0));
            const __m512 a = _mm512_maskz_loadu_ps(i < n ? mask : 0, v + col);
            const __m512 b = _mm512_maskz_loadu_ps(i + 1 < n ? mask : 0, v + piece.v_stride + col);
            put_row(to, tile * m.key_steps, _mm512_permutexvar_epi16(in_turn, to_bfloats(a, b)));
        }
    }
}

void add_values(const AttentionPiece& piece, int64_t key, int64_t n, const float* weights, float* out, int64_t width,
                int64_t block, std::byte* memory) {
    const AttentionMemory m(piece, block, memory);
    const int64_t tile_step = m.key_steps * kTileBytes;
    pack_values(m, piece, key, n);
    begin_tiles();
    for (int64_t t = 0; t < m.row_tiles; t += 2) {
        const int64_t seen = seen_keys(piece, t, key, n);
        if (seen <= 0) continue;
        for (int64_t i = 0; i < 2 * kTileRows; ++i) {
            const float* const from = weights + (t * kTileRows + i) * block;
            std::byte* const to = m.p + i / kTileRows * tile_step + i % kTileRows * 64;
            for (int64_t col = 0; col < seen; col += kTileCols) {
                put_row(to, col / kTileCols, bfloats_of(from + col, seen - col));
            }
        }
        for (int64_t tile = 0; tile < m.col_tiles; tile += 2) {
            float* const to = out + t * kTileRows * width + tile * kTileTokens;
            const int64_t bytes = width * static_cast<int64_t>(sizeof(float));
            load_tile<0>(to, bytes);
            load_tile<1>(to + kTileTokens, bytes);
            load_tile<2>(to + kTileRows * width, bytes);
            load_tile<3>(to + kTileRows * width + kTileTokens, bytes);
            multiply_pairs(m.p, tile_step, m.v + tile * tile_step, tile_step, divide_up(seen, kTileCols));
            store_pairs(to, width);
        }
    }
    release_tiles();
}
