// Products of many rows of x on tensor cores: half precision, summed in float32.
//
// x is rounded once, before. Weights are unpacked in shared memory: each once for kTokens rows of x. Rounding is to 11
// bits, relative to the largest value of a row of x and to each weight, so that a product of long rows is off by about
// 2^-12.
#include "cuda/gemm.cuh"
#include "cuda/reduce.cuh"

namespace yivl::cuda {

namespace {

// A block computes kRows outputs of kTokens tokens, each of its four warps a quarter.
constexpr int kTokens = 128;
constexpr int kRows = 128;
constexpr int kThreads = 128;
constexpr int kWarpTokens = 64;
constexpr int kWarpRows = 64;
// Of a multiprocessor: 255 registers for a thread. Shared memory has room for two on cards of 8.0 and 9.0, and on those
// with 100 KB where a segment takes 17 KB at most.
constexpr int kBlocksAtOnce = 2;

// Each thread moves chunks of one number, of every kRowsAtOnce-th row.
constexpr int kRowsAtOnce = kThreads / kChunks;
constexpr int kMoves = kRows / kRowsAtOnce;

// ---- x in half precision ----

constexpr int kHalvingThreads = 256;

// Whole steps of either kernel can be read.
int64_t half_stride(int64_t cols) { return (cols + kMostColumns - 1) / kMostColumns * kMostColumns; }

// Whole blocks' rows can be read; the last block's may hold anything.
size_t half_value_bytes(int64_t rows, int64_t cols) {
    const int64_t all_rows = (rows + kTokens - 1) / kTokens * kTokens;
    return static_cast<size_t>(all_rows * half_stride(cols)) * sizeof(Half);
}

__global__ void to_halves_kernel(ConstMat x, HalfInput to) {
    wait_for_earlier_kernels();
    const float* row = x.data + block_x() * x.stride;
    float largest = 0.0f;
    for (int64_t i = thread_id(); i < x.cols; i += kHalvingThreads) largest = fmaxf(largest, fabsf(row[i]));
    largest = reduce_block<Max>(largest);
    // 2^(E - 127) <= largest < 2^(E - 126), and 2^(F - 127) the factor. An infinity stays one, and so does a NaN.
    const int exponent = static_cast<int>(bits_of_float(largest) >> 23);
    const int factor = exponent == 255 ? 127 : 268 - exponent < 253 ? 268 - exponent : 253;
    const float scale = float_of_bits(static_cast<uint32_t>(factor) << 23);
    auto* pairs = reinterpret_cast<uint32_t*>(to.values + block_x() * to.stride);
    for (int64_t i = thread_id(); i < to.stride / 2; i += kHalvingThreads) {
        const float low = 2 * i < x.cols ? row[2 * i] : 0.0f;
        const float high = 2 * i + 1 < x.cols ? row[2 * i + 1] : 0.0f;
        constexpr int64_t kPairs = kSlab / 2;
        const int64_t at = to.in_fragments ? i / kPairs * kPairs + pair_in_fragments(static_cast<int>(i % kPairs)) : i;
        pairs[at] = pack_halves(low * scale, high * scale);
    }
    if (thread_id() == 0) to.unscaled[block_x()] = float_of_bits(static_cast<uint32_t>(254 - factor) << 23);
}

// ---- unpacking ----

// Words at an even address of shared memory. Whole chunks are read, up to 16 bytes more: of threads in rows one below
// the other, reads of 16 bytes meet in no bank.
template <int kWords>
__device__ __forceinline__ void load_shared_even(uint32_t (&words)[kWords], const std::byte* p) {
    constexpr int kRead = (kWords + 6) / 4 * 4;
    const auto offset = static_cast<int>(reinterpret_cast<uintptr_t>(p) % sizeof(Words));
    uint32_t w[kRead];
    YIVL_UNROLL
    for (int i = 0; i < kRead / 4; ++i) {
        const Words chunk = reinterpret_cast<const Words*>(p - offset)[i];
        for (int j = 0; j < 4; ++j) w[i * 4 + j] = chunk.word[j];
    }
    // On by two words, by one and by half of one, as the address says.
    YIVL_UNROLL
    for (int i = 0; i < kWords + 2; ++i) w[i] = offset & 8 ? w[i + 2] : w[i];
    YIVL_UNROLL
    for (int i = 0; i < kWords + 1; ++i) w[i] = offset & 4 ? w[i + 1] : w[i];
    YIVL_UNROLL
    for (int i = 0; i < kWords; ++i) {
        words[i] = static_cast<uint32_t>((uint64_t{w[i + 1]} << 32 | w[i]) >> (offset & 2) * 8);
    }
}
// 32 bytes at a multiple of 16.
__device__ __forceinline__ void load_shared_aligned(uint32_t (&words)[8], const std::byte* p) {
    YIVL_UNROLL
    for (int i = 0; i < 2; ++i) {
        const Words some = reinterpret_cast<const Words*>(p)[i];
        for (int j = 0; j < 4; ++j) words[i * 4 + j] = some.word[j];
    }
}

// Read by a thread for each row.
template <WeightType kType>
using RowSegment = Segment<kType, kRows, 2, 1>;

// The weights of a slab, the segment's number `slab`: put(chunk, words) for each of its chunks.
template <WeightType kType>
struct Unpack {
    template <class Put>
    __device__ static void slab(const std::byte* segment, int slab, Put&& put) {
        using Blocks = BlockOf<kType>;
        const int weight = slab * kSlab;
        const auto& block = reinterpret_cast<const typename Blocks::Block*>(segment)[weight / Blocks::kWeights];
        for (int c = 0; c < kChunks; ++c) {
            const int first = weight % Blocks::kWeights + c * kChunkElements;
            Words words;
            YIVL_UNROLL
            for (int j = 0; j < 4; ++j) {
                words.word[j] = pack_halves(value(block, first + 2 * j) * kUnpackedScale,
                                            value(block, first + 2 * j + 1) * kUnpackedScale);
            }
            put(c, words);
        }
    }
};
template <>
struct Unpack<WeightType::F16> {
    template <class Put>
    __device__ static void slab(const std::byte* segment, int slab, Put&& put) {
        uint32_t w[kSlab / 2];
        load_shared_even(w, segment + slab * sizeof(w));
        YIVL_UNROLL
        for (int c = 0; c < kChunks; ++c) put(c, Words{{w[4 * c], w[4 * c + 1], w[4 * c + 2], w[4 * c + 3]}});
    }
};
template <>
struct Unpack<WeightType::BF16> {
    template <class Put>
    __device__ static void slab(const std::byte* segment, int slab, Put&& put) {
        Unpack<WeightType::F16>::slab(segment, slab, [&](int c, Words words) {
            for (uint32_t& pair : words.word) {
                pair = pack_halves(float_of_bits(pair << 16) * kUnpackedScale,
                                   float_of_bits(pair & 0xffff0000) * kUnpackedScale);
            }
            put(c, words);
        });
    }
};
template <>
struct Unpack<WeightType::Q8_0> {
    template <class Put>
    __device__ static void slab(const std::byte* segment, int slab, Put&& put) {
        const std::byte* block = segment + slab * sizeof(BlockQ8_0);
        const float scale = from_half(half_at(block)) * kUnpackedScale;
        uint32_t q[8];
        load_shared_even(q, block + offsetof(BlockQ8_0, qs));
        for (uint32_t& word : q) word ^= 0x80808080;  // plus 128
        YIVL_UNROLL
        for (int c = 0; c < kChunks; ++c) put(c, scaled_bytes(q[2 * c], q[2 * c + 1], 128, scale));
    }
};
template <>
struct Unpack<WeightType::Q4_0> {
    template <class Put>
    __device__ static void slab(const std::byte* segment, int slab, Put&& put) {
        const std::byte* block = segment + slab * sizeof(BlockQ4_0);
        const float scale = from_half(half_at(block)) * kUnpackedScale;
        uint32_t q[4];
        load_shared_even(q, block + offsetof(BlockQ4_0, qs));
        YIVL_UNROLL
        for (int c = 0; c < kChunks; ++c) {
            const auto nibbles = [&](int i) { return q[c % 2 * 2 + i] >> c / 2 * 4 & 0x0f0f0f0f; };
            put(c, scaled_bytes(nibbles(0), nibbles(1), 8, scale));
        }
    }
};

// Q4_K and Q5_K blocks lie at multiples of 16, as rows do.
template <class Put>
__device__ __forceinline__ void put_group(const Words& head, int g, const uint32_t (&q)[8], int centre, Put&& put) {
    const Scaling s = scaling_of(head, g, centre);
    YIVL_UNROLL
    for (int c = 0; c < kChunks; ++c) put(c, scaled_bytes(q[2 * c], q[2 * c + 1], centre, s.scale, s.offset));
}

template <>
struct Unpack<WeightType::Q4_K> {
    template <class Put>
    __device__ static void slab(const std::byte* block, int g, Put&& put) {
        uint32_t q[8];
        load_shared_aligned(q, block + offsetof(BlockQ4_K, qs) + g / 2 * 32);
        for (uint32_t& word : q) word = word >> g % 2 * 4 & 0x0f0f0f0f;
        put_group(*reinterpret_cast<const Words*>(block), g, q, 8, put);
    }
};
template <>
struct Unpack<WeightType::Q5_K> {
    template <class Put>
    __device__ static void slab(const std::byte* block, int g, Put&& put) {
        uint32_t q[8], high[8];
        load_shared_aligned(q, block + offsetof(BlockQ5_K, qs) + g / 2 * 32);
        load_shared_aligned(high, block + offsetof(BlockQ5_K, qh));
        for (int i = 0; i < 8; ++i) q[i] = (q[i] >> g % 2 * 4 & 0x0f0f0f0f) | (high[i] >> g & 0x01010101) << 4;
        put_group(*reinterpret_cast<const Words*>(block), g, q, 16, put);
    }
};
template <>
struct Unpack<WeightType::Q6_K> {
    template <class Put>
    __device__ static void slab(const std::byte* block, int g, Put&& put) {
        uint32_t q[8], high[8];
        load_shared_even(q, block + offsetof(BlockQ6_K, ql) + g / 4 * 64 + g % 2 * 32);
        load_shared_even(high, block + offsetof(BlockQ6_K, qh) + g / 4 * 32);
        const float d = from_half(half_at(block + offsetof(BlockQ6_K, d))) * kUnpackedScale;
        const uint32_t scales = half_at(block + offsetof(BlockQ6_K, scales) + g * 2);  // a byte for 16 weights
        YIVL_UNROLL
        for (int c = 0; c < kChunks; ++c) {
            const auto six_bits = [&](int i) {
                return (q[i] >> g % 4 / 2 * 4 & 0x0f0f0f0f) | (high[i] >> g % 4 * 2 & 0x03030303) << 4;
            };
            const auto scale = static_cast<float>(static_cast<int8_t>(scales >> c / 2 * 8));
            put(c, scaled_bytes(six_bits(2 * c), six_bits(2 * c + 1), 32, d * scale));
        }
    }
};

// ---- the product ----

using HalfTile = Tile<kTokens, kChunks>;
static_assert(kTokens == kRows);

// Two of each: one is filled while the other is used.
struct Tiles {
    HalfTile x[2], w[2];
};
// What a quarter of a warp's results pass through, so that they go to memory row by row.
struct Results {
    static constexpr int kPitch = kWarpRows + 8;  // two rows' pairs lie in different banks
    float of_warp[kThreads / kWarp][16][kPitch];
};
static_assert(sizeof(Results) <= sizeof(Tiles));

__device__ __forceinline__ void load_x(HalfTile& tile, const HalfInput& x, int64_t first_token, int slab) {
    const int c = thread_id() % kChunks, first = thread_id() / kChunks;
    const Half* from = x.values + (first_token + first) * x.stride + slab * kSlab + c * kChunkElements;
    YIVL_UNROLL
    for (int i = 0; i < kMoves; ++i) {
        copy_async(&tile.chunk(i * kRowsAtOnce + first, c), from + i * kRowsAtOnce * x.stride);
    }
}

// Half-precision weights in rows at multiples of 16 bytes need no unpacking.
__device__ __forceinline__ void load_halves(HalfTile& tile, const Rows& rows, int slab) {
    const int c = thread_id() % kChunks;
    const int begin = (slab * kChunks + c) * static_cast<int>(sizeof(Words));
    YIVL_UNROLL
    for (int i = 0; i < kMoves; ++i) {
        const int r = i * kRowsAtOnce + thread_id() / kChunks;
        const bool inside = begin < rows.row_bytes;
        const std::byte* row = rows.of(r);
        copy_async(&tile.chunk(r, c), inside ? row + begin : row, inside ? 16 : 0);
    }
}

// Each thread a row.
template <WeightType kType>
__device__ __forceinline__ void unpack(HalfTile& tile, const RowSegment<kType>& from, const Rows& rows, int64_t cols,
                                       int slab) {
    using S = RowSegment<kType>;
    static_assert(kThreads == kRows);
    const int r = thread_id();
    const auto* row = reinterpret_cast<const std::byte*>(&from.words[r * S::kWords]);
    const std::byte* segment = row + offset_in_chunk<S>(rows, r, slab / S::kSlabs);
    Unpack<kType>::slab(segment, slab % S::kSlabs, [&](int c, Words words) {
        if constexpr (BlockOf<kType>::kWeights == 1) keep_columns(words, cols, slab * kSlab + c * kChunkElements);
        tile.chunk(r, c) = words;
    });
}

// sums += x w^T for a warp's part of a slab.
using Sums = float[kWarpTokens / 16][kWarpRows / 8][4];
__device__ __forceinline__ void multiply(Sums& sums, HalfTile& x, HalfTile& w) {
    const int first_token = warp_id() / 2 * kWarpTokens, first_row = warp_id() % 2 * kWarpRows;
    YIVL_UNROLL
    for (int k = 0; k < kChunks; k += 2) {
        uint32_t a[kWarpTokens / 16][4];
        YIVL_UNROLL
        for (int i = 0; i < kWarpTokens / 16; ++i) load_a(a[i], x, first_token + i * 16, k);
        YIVL_UNROLL
        for (int j = 0; j < kWarpRows / 16; ++j) {
            uint32_t b[4];
            load_b(b, w, first_row + j * 16, k);
            const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
            YIVL_UNROLL
            for (int i = 0; i < kWarpTokens / 16; ++i) {
                mma_half(sums[i][2 * j], a[i], first);
                mma_half(sums[i][2 * j + 1], a[i], second);
            }
        }
    }
}

// kStaged: through a segment in shared memory; else straight into the tile, for F16 in aligned rows. Gated: of[0] is
// the gate, and where the result goes, of[1] up.
template <WeightType kType, bool kStaged>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    gemm_kernel(Targets targets, HalfInput x, int row_bytes, bool gated) {
    using S = RowSegment<kType>;
    Tiles& tiles = *reinterpret_cast<Tiles*>(dynamic_shared());
    S& segment = *reinterpret_cast<S*>(dynamic_shared() + sizeof(Tiles));

    const Target& to = targets.of[block_z()];
    const int rows_of_block = gated ? kRows / 2 : kRows;
    const int64_t first_token = int64_t{block_x()} * kTokens, first_row = int64_t{block_y()} * rows_of_block;
    if (first_row >= to.y.cols) return wait_for_earlier_kernels();  // of several products one may have fewer rows
    const int64_t begin = first_row * row_bytes, left = to.y.cols - first_row;
    const Rows rows{to.w + begin, targets.of[1].w + begin, row_bytes,
                    static_cast<int>(left < rows_of_block ? left : rows_of_block) - 1, gated};
    const int n_slabs = static_cast<int>((x.cols + kSlab - 1) / kSlab);
    const bool has_tokens = first_token + warp_id() / 2 * kWarpTokens < x.rows;  // this warp, in the last block

    Sums sums{};
    if constexpr (kStaged) {
        load_segment<kThreads, kRows>(segment, rows, 0);
    } else {
        load_halves(tiles.w[0], rows, 0);
    }
    wait_for_earlier_kernels();
    load_x(tiles.x[0], x, first_token, 0);
    commit_copies();
    for (int slab = 0; slab < n_slabs; ++slab) {
        HalfTile &x_now = tiles.x[slab % 2], &w_now = tiles.w[slab % 2];
        const int next = slab + 1;
        if constexpr (kStaged) {
            if (slab % S::kSlabs == 0) {
                wait_copies<0>();
                sync_block();
            }
            unpack<kType>(w_now, segment, rows, x.cols, slab);
        }
        wait_copies<0>();
        sync_block();  // this slab is there, and everyone has done with the last one
        if (next < n_slabs) {
            load_x(tiles.x[next % 2], x, first_token, next);
            if constexpr (!kStaged) load_halves(tiles.w[next % 2], rows, next);
            if constexpr (kStaged) {
                if (next % S::kSlabs == 0) load_segment<kThreads, kRows>(segment, rows, next / S::kSlabs);
            }
            commit_copies();
        }
        if (has_tokens) multiply(sums, x_now, w_now);
    }

    sync_block();  // the tiles become room for results
    auto& results = reinterpret_cast<Results*>(dynamic_shared())->of_warp[warp_id()];
    const int g = lane_id() / 4, t = lane_id() % 4;
    YIVL_UNROLL
    for (int i = 0; i < kWarpTokens / 16; ++i) {
        sync_warp();  // the last ones are written
        YIVL_UNROLL
        for (int j = 0; j < kWarpRows / 8; ++j) {
            for (int r = 0; r < 4; ++r) results[g + r / 2 * 8][j * 8 + 2 * t + r % 2] = sums[i][j][r];
        }
        sync_warp();
        const int64_t first = first_token + warp_id() / 2 * kWarpTokens + i * 16;
        for (int token = 0; token < 16 && first + token < x.rows; ++token) {
            write_results<kType>(results[token], kWarpRows, to, x, first + token,
                                 first_row + warp_id() % 2 * (rows_of_block / 2), gated);
        }
    }
}

void start(Stream& stream, const HalfInput& x, const Weight& w, const GemmLaunch& gemm) {
    if (x.in_fragments) return start_warpgroup_gemm(stream, x, w, gemm);
    const auto with_staging = [&]<WeightType kType, bool kStaged>() {
        launch(stream, gemm.name, gemm_kernel<kType, kStaged>, gemm_grid(x.rows, kTokens, kRows, gemm), kThreads,
               sizeof(Tiles) + (kStaged ? sizeof(RowSegment<kType>) : 0), gemm.targets, x,
               static_cast<int>(w.row_bytes()), gemm.gated);
    };
    with_type(w.type, [&]<WeightType kType> {
        if constexpr (kType == WeightType::F16) {
            if (w.row_bytes() % 16 == 0) return with_staging.template operator()<kType, false>();
        }
        if constexpr (kType != WeightType::F32) with_staging.template operator()<kType, true>();
    });
}

}  // namespace

size_t half_bytes(int64_t rows, int64_t cols) {
    return half_value_bytes(rows, cols) + static_cast<size_t>(rows) * sizeof(float);
}

HalfInput halves_in(const Stream& stream, std::byte* memory, int64_t rows, int64_t cols) {
    return {reinterpret_cast<Half*>(memory),
            reinterpret_cast<float*>(memory + half_value_bytes(rows, cols)),
            rows,
            cols,
            half_stride(cols),
            stream.has_warpgroups()};
}

void to_halves(Stream& stream, ConstMat x, const HalfInput& to) {
    launch(stream, "to_halves", to_halves_kernel, {x.rows}, kHalvingThreads, 0, x, to);
}

void gemm(Stream& stream, const HalfInput& x, std::span<const FinishedProduct> products) {
    int64_t most_rows = 0;
    for (const FinishedProduct& p : products) most_rows = p.w.rows > most_rows ? p.w.rows : most_rows;
    stream.expect(work_of(x.rows, products));
    const auto n_products = static_cast<int64_t>(products.size());
    start(stream, x, products[0].w, {"gemm", targets_of(products), n_products, most_rows, false});
}

void gated_gemm(Stream& stream, Mat y, const HalfInput& x, const Weight& gate, const Weight& up) {
    const FinishedProduct products[] = {{y, gate}, {y, up}};
    stream.expect(work_of(x.rows, products));
    start(stream, x, gate, {"gated_gemm", targets_of(products), 1, gate.rows, true});
}

}  // namespace yivl::cuda
