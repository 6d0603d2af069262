// Products of many rows of x, as gemm.cu has them, on cards whose tensor cores are fed by four warps at once (compute
// capability 9.0). mma.sync reaches some 62% of what they can do, and reads weights from shared memory twice: as the
// file has them and unpacked. Here a lane unpacks what it multiplies into its own registers, while the tensor cores are
// at the last step; only x comes from shared memory.
//
// A lane has eight neighbouring columns of two rows of weights. Where an operand wants others of it, x has its columns
// in that order instead (pair_in_fragments).
#include <algorithm>

#include "cuda/gemm.cuh"

namespace yivl::cuda {

namespace {

// A block computes kRows outputs of kTokens tokens, a warpgroup 64 of them. With 192 rows a block reads as much of x
// and weights as the second-level cache can give; 184 tokens fit the 1,025 rows of a picture and a prompt with one into
// six blocks, and leave registers for the weights.
constexpr int kTokens = kAsyncColumns;
constexpr int kRows = 192;
constexpr int kThreads = kRows * 2;
// Columns at a time: 128 bytes of a row of x. kStages steps of x are there or on their way.
constexpr int kStep = kMostColumns;
constexpr int kStages = 3;
constexpr int kStepChunks = kStep / kChunkElements;

using StepOfX = Tile<kTokens, kStepChunks>;

template <WeightType kType>
struct GroupMemory {
    // Read by four lanes for each row, eight bytes each, or 16 of half-precision weights.
    static constexpr bool kSixteen = BlockOf<kType>::kWeights == 1;
    using S = Segment<kType, kRows, kSixteen ? 8 : 4, kSixteen ? 4 : 2>;
    static constexpr int kSteps = S::kWeights / kStep;  // of a segment
    // One is unpacked, the others are there or on their way: each for a step before its first.
    static constexpr int kSegments = kSteps == 1 ? 3 : 2;
    StepOfX x[kStages];
    S segments[kSegments];
};

// What results pass through, so that they go to memory row by row.
struct GroupResults {
    static constexpr int kPitch = kRows + 4;  // the lanes of a warp write to different banks
    float of_token[kTokens][kPitch];
};

#ifdef YIVL_WARPGROUPS

// ---- unpacking ----

// Eight bytes at an even address.
__device__ __forceinline__ void load_eight(uint32_t (&words)[2], const std::byte* p) {
    const auto odd = static_cast<int>(reinterpret_cast<uintptr_t>(p) % 4);
    const auto* at = reinterpret_cast<const uint32_t*>(p - odd);
    const uint32_t a = at[0], b = at[1], c = at[2];
    words[0] = static_cast<uint32_t>((uint64_t{b} << 32 | a) >> odd * 8);
    words[1] = static_cast<uint32_t>((uint64_t{c} << 32 | b) >> odd * 8);
}
// Eight bytes at a multiple of eight.
__device__ __forceinline__ void load_eight_aligned(uint32_t (&words)[2], const std::byte* p) {
    struct alignas(8) Pair {
        uint32_t word[2];
    };
    const Pair pair = *reinterpret_cast<const Pair*>(p);
    words[0] = pair.word[0];
    words[1] = pair.word[1];
}

// Chunk c of a slab, the segment's number `slab`.
template <WeightType kType>
struct Unpack {
    __device__ static Words chunk(const std::byte* segment, int slab, int c) {
        using Blocks = BlockOf<kType>;
        const int weight = slab * kSlab + c * kChunkElements;
        const auto& block = reinterpret_cast<const typename Blocks::Block*>(segment)[weight / Blocks::kWeights];
        Words words;
        YIVL_UNROLL
        for (int j = 0; j < 4; ++j) {
            const int i = weight % Blocks::kWeights + 2 * j;
            words.word[j] = pack_halves(value(block, i) * kUnpackedScale, value(block, i + 1) * kUnpackedScale);
        }
        return words;
    }
};
template <>
struct Unpack<WeightType::F16> {
    __device__ static Words chunk(const std::byte* segment, int slab, int c) {
        const std::byte* p = segment + (slab * kSlab + c * kChunkElements) * sizeof(Half);
        if (reinterpret_cast<uintptr_t>(p) % sizeof(Words) == 0) return *reinterpret_cast<const Words*>(p);
        uint32_t first[2], second[2];
        load_eight(first, p);
        load_eight(second, p + 8);
        return {{first[0], first[1], second[0], second[1]}};
    }
};
template <>
struct Unpack<WeightType::BF16> {
    __device__ static Words chunk(const std::byte* segment, int slab, int c) {
        Words words = Unpack<WeightType::F16>::chunk(segment, slab, c);
        for (uint32_t& pair : words.word) {
            pair = pack_halves(float_of_bits(pair << 16) * kUnpackedScale,
                               float_of_bits(pair & 0xffff0000) * kUnpackedScale);
        }
        return words;
    }
};
template <>
struct Unpack<WeightType::Q8_0> {
    __device__ static Words chunk(const std::byte* segment, int slab, int c) {
        const std::byte* block = segment + slab * sizeof(BlockQ8_0);
        uint32_t q[2];
        load_eight(q, block + offsetof(BlockQ8_0, qs) + c * 8);
        return scaled_bytes(q[0] ^ 0x80808080, q[1] ^ 0x80808080, 128, from_half(half_at(block)) * kUnpackedScale);
    }
};
template <>
struct Unpack<WeightType::Q4_0> {
    __device__ static Words chunk(const std::byte* segment, int slab, int c) {
        const std::byte* block = segment + slab * sizeof(BlockQ4_0);
        uint32_t q[2];
        load_eight(q, block + offsetof(BlockQ4_0, qs) + c % 2 * 8);
        for (uint32_t& word : q) word = word >> c / 2 * 4 & 0x0f0f0f0f;
        return scaled_bytes(q[0], q[1], 8, from_half(half_at(block)) * kUnpackedScale);
    }
};
template <>
struct Unpack<WeightType::Q4_K> {
    __device__ static Words chunk(const std::byte* block, int g, int c) {
        uint32_t q[2];
        load_eight_aligned(q, block + offsetof(BlockQ4_K, qs) + g / 2 * 32 + c * 8);
        for (uint32_t& word : q) word = word >> g % 2 * 4 & 0x0f0f0f0f;
        const Scaling s = scaling_of(*reinterpret_cast<const Words*>(block), g, 8);
        return scaled_bytes(q[0], q[1], 8, s.scale, s.offset);
    }
};
template <>
struct Unpack<WeightType::Q5_K> {
    __device__ static Words chunk(const std::byte* block, int g, int c) {
        uint32_t q[2], high[2];
        load_eight_aligned(q, block + offsetof(BlockQ5_K, qs) + g / 2 * 32 + c * 8);
        load_eight_aligned(high, block + offsetof(BlockQ5_K, qh) + c * 8);
        for (int i = 0; i < 2; ++i) q[i] = (q[i] >> g % 2 * 4 & 0x0f0f0f0f) | (high[i] >> g & 0x01010101) << 4;
        const Scaling s = scaling_of(*reinterpret_cast<const Words*>(block), g, 16);
        return scaled_bytes(q[0], q[1], 16, s.scale, s.offset);
    }
};
template <>
struct Unpack<WeightType::Q6_K> {
    __device__ static Words chunk(const std::byte* block, int g, int c) {
        uint32_t q[2], high[2];
        load_eight(q, block + offsetof(BlockQ6_K, ql) + g / 4 * 64 + g % 2 * 32 + c * 8);
        load_eight(high, block + offsetof(BlockQ6_K, qh) + g / 4 * 32 + c * 8);
        for (int i = 0; i < 2; ++i) {
            q[i] = (q[i] >> g % 4 / 2 * 4 & 0x0f0f0f0f) | (high[i] >> g % 4 * 2 & 0x03030303) << 4;
        }
        const uint32_t scales = half_at(block + offsetof(BlockQ6_K, scales) + g * 2);  // a byte for 16 weights
        const auto scale = static_cast<float>(static_cast<int8_t>(scales >> c / 2 * 8));
        return scaled_bytes(q[0], q[1], 32,
                            from_half(half_at(block + offsetof(BlockQ6_K, d))) * kUnpackedScale * scale);
    }
};

// ---- the product ----

// What a thread copies of each step of x: chunks of one number, of every kRowsAtOnce-th row. Past the last token it
// comes again.
class CopiesOfX {
public:
    __device__ CopiesOfX(const HalfInput& x, int first_token) : values_(x.values) {
        const int c = thread_id() % kStepChunks, last = static_cast<int>(x.rows) - 1;
        YIVL_UNROLL
        for (int i = 0; i < kMoves; ++i) {
            const int token = first_token + first_row() + i * kRowsAtOnce;
            offsets_[i] = static_cast<uint32_t>((token < last ? token : last) * x.stride + c * kChunkElements);
        }
    }

    __device__ void begin(StepOfX& tile, int step) const {
        static_assert(kRowsAtOnce % kStepChunks == 0);  // a tile's chunks of these rows are in the same place
        Words* const to = &tile.chunk(first_row(), thread_id() % kStepChunks);
        YIVL_UNROLL
        for (int i = 0; i < kMoves; ++i) {
            if (i < kMoves - 1 || first_row() + i * kRowsAtOnce < kTokens) {
                copy_async(to + i * kRowsAtOnce * StepOfX::kPitch, values_ + offsets_[i] + step * kStep);
            }
        }
    }

private:
    static constexpr int kRowsAtOnce = kThreads / kStepChunks;
    static constexpr int kMoves = (kTokens + kRowsAtOnce - 1) / kRowsAtOnce;

    __device__ static int first_row() { return thread_id() / kStepChunks; }

    const Half* values_;
    uint32_t offsets_[kMoves];
};

// A lane's operands of a slab: two, of 16 columns each.
struct Operands {
    uint32_t a[2][4];
};

// Lane 4g + t has columns 8t to 8t + 7 of rows g and g + 8 of the warp's.
template <WeightType kType>
__device__ __forceinline__ void unpack(Operands& operands, const GroupMemory<kType>& memory, const Rows& rows,
                                       int64_t cols, int slab) {
    using Memory = GroupMemory<kType>;
    using S = typename Memory::S;
    const int segment = slab / S::kSlabs, g = lane_id() / 4, t = lane_id() % 4;
    const S& from = memory.segments[segment % Memory::kSegments];
    YIVL_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int r = warp_id() * 16 + half * 8 + g;
        Words words{};  // past the last column
        if (slab * kSlab < cols) {
            const std::byte* row =
                reinterpret_cast<const std::byte*>(&from.words[r * S::kWords]) + offset_in_chunk<S>(rows, r, segment);
            words = Unpack<kType>::chunk(row, slab % S::kSlabs, t);
            if constexpr (BlockOf<kType>::kWeights == 1) keep_columns(words, cols, slab * kSlab + t * kChunkElements);
        }
        for (int j = 0; j < 4; ++j) operands.a[j / 2][j % 2 * 2 + half] = words.word[j];
    }
}

// `chunk`: x's of the slab's first columns.
__device__ __forceinline__ void multiply(AsyncSums& sums, Operands& operands, StepOfX& x, int chunk) {
    begin_products(sums, operands.a);
    YIVL_UNROLL
    for (int i = 0; i < 2; ++i) multiply_async(sums, operands.a[i], &x.chunk(0, chunk + 2 * i));
    commit_products();
}

// Lane 4g + t has of each 8 tokens 2t and 2t + 1, of the warp's rows g and g + 8.
__device__ __forceinline__ void put_results(GroupResults& to, const AsyncSums& sums) {
    const int row = warp_id() * 16 + lane_id() / 4, token = lane_id() % 4 * 2;
    YIVL_UNROLL
    for (int j = 0; j < kTokens / 8; ++j) {
        YIVL_UNROLL
        for (int r = 0; r < 4; ++r) to.of_token[j * 8 + token + r % 2][row + r / 2 * 8] = sums[j][r];
    }
}

#endif

template <WeightType kType>
__global__ void __launch_bounds__(kThreads, 1)
    warpgroup_gemm_kernel([[maybe_unused]] Targets targets, [[maybe_unused]] HalfInput x,
                          [[maybe_unused]] int row_bytes, [[maybe_unused]] bool gated) {
#ifdef YIVL_WARPGROUPS
    using Memory = GroupMemory<kType>;
    Memory& memory = *reinterpret_cast<Memory*>(dynamic_shared());
    const Target& to = targets.of[block_z()];
    const int rows_of_block = gated ? kRows / 2 : kRows;
    const int first_token = block_x() * kTokens, first_row = block_y() * rows_of_block;
    if (first_row >= to.y.cols) return wait_for_earlier_kernels();  // of several products one may have fewer rows
    const int64_t begin = int64_t{first_row} * row_bytes, left = to.y.cols - first_row;
    const Rows rows{to.w + begin, targets.of[1].w + begin, row_bytes,
                    static_cast<int>(left < rows_of_block ? left : rows_of_block) - 1, gated};
    const int n_steps = static_cast<int>((x.cols + kStep - 1) / kStep);
    // The segment that step `step` is the first of, if it is.
    const auto load_weights = [&](int step) {
        if (step >= n_steps || step % Memory::kSteps != 0) return;
        const int segment = step / Memory::kSteps;
        load_segment<kThreads, kRows>(memory.segments[segment % Memory::kSegments], rows, segment);
    };
    const CopiesOfX copies(x, first_token);
    const auto load_step = [&](int step) {
        if (step < n_steps) copies.begin(memory.x[step % kStages], step);
    };

    load_weights(0);
    load_weights(1);
    wait_for_earlier_kernels();
    load_step(0);
    commit_copies();
    load_step(1);
    commit_copies();
    wait_copies<1>();
    sync_block();

    // Each is unpacked while the tensor cores are at the other.
    static_assert(kStep == 2 * kSlab);
    Operands first, second;
    AsyncSums sums{};
    unpack<kType>(first, memory, rows, x.cols, 0);
    for (int step = 0; step < n_steps; ++step) {
        wait_copies<1>();
        publish_shared();
        sync_block();  // this step of x is there, and everyone has done with the last one and with its weights
        StepOfX& of_x = memory.x[step % kStages];
        multiply(sums, first, of_x, 0);
        load_weights(step + 2);
        commit_copies();
        load_step(step + 2);
        commit_copies();
        unpack<kType>(second, memory, rows, x.cols, 2 * step + 1);
        multiply(sums, second, of_x, kChunks);
        wait_products<1>();
        if (step + 1 < n_steps) unpack<kType>(first, memory, rows, x.cols, 2 * step + 2);
        // With a group at work from step to step, ptxas lets every product wait for the one before it.
        wait_products<0>();
    }
    finish_products(sums);
    sync_block();  // the tiles become room for results
    GroupResults& results = *reinterpret_cast<GroupResults*>(dynamic_shared());
    put_results(results, sums);
    sync_block();
    for (int i = warp_id(); i < kTokens && first_token + i < x.rows; i += kThreads / kWarp) {
        write_results<kType>(results.of_token[i], kRows, to, x, first_token + i, first_row, gated);
    }
#else
    stop_without_warpgroups();
#endif
}

}  // namespace

void start_warpgroup_gemm(Stream& stream, const HalfInput& x, const Weight& w, const GemmLaunch& gemm) {
    with_type(w.type, [&]<WeightType kType> {
        if constexpr (kType != WeightType::F32) {
            launch(stream, gemm.name, warpgroup_gemm_kernel<kType>, gemm_grid(x.rows, kTokens, kRows, gemm), kThreads,
                   std::max(sizeof(GroupMemory<kType>), sizeof(GroupResults)), gemm.targets, x,
                   static_cast<int>(w.row_bytes()), gemm.gated);
        }
    });
}

}  // namespace yivl::cuda
