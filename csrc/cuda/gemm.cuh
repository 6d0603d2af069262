// What the products of many rows of x have in common: x in half precision meets weights that come as the file has them,
// in segments of a row, and are unpacked slab by slab. gemm.cu multiplies on tensor cores warp by warp, on every card;
// gemm_warpgroup.cu, where the card can, by four warps at once.
#pragma once

#include <cstddef>

#include "cuda/dequant.cuh"
#include "cuda/finish.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/tile.cuh"

namespace yivl::cuda {

inline constexpr int kSlab = 32;  // columns that are unpacked at a time
inline constexpr int kChunks = kSlab / kChunkElements;
inline constexpr int kMostColumns = 64;  // that are multiplied at a time

// ---- x ----

// Where pair i of a slab's columns lies for gemm_warpgroup.cu: a lane's eight columns 8t to 8t + 7 come to be columns
// 2t, 2t + 1, 2t + 8 and 2t + 9 of two operands of 16 columns, one after the other.
__host__ __device__ constexpr int pair_in_fragments(int i) { return i % 4 / 2 * 8 + i % 2 * 4 + i / 4; }

// ---- weights as the file has them ----

constexpr int blocks_of_segment(WeightType type) {
    switch (type) {
        case WeightType::F16:
        case WeightType::BF16: return 64;
        case WeightType::Q4_0:
        case WeightType::Q4_1:
        case WeightType::Q5_0:
        case WeightType::Q5_1:
        case WeightType::Q8_0:
        case WeightType::IQ4_NL: return 4;
        default: return 1;
    }
}

// Bytes of kRows rows of the weights, at most kWeights of each at a time. Where blocks are no multiple of 16 bytes, a
// row begins at an even address: up to 14 bytes of the first chunk come before it, and 16 more may be read behind it.
// The number of chunks has the remainder kRest when divided by kOf, so that what a warp reads lies in different banks.
template <WeightType kType, int kRows, int kOf, int kRest>
struct Segment {
    using Block = typename BlockOf<kType>::Block;
    static constexpr int kBlockBytes = static_cast<int>(sizeof(Block));
    static constexpr int kWeights = blocks_of_segment(kType) * BlockOf<kType>::kWeights;
    static constexpr int kBytes = blocks_of_segment(kType) * kBlockBytes;
    static constexpr int kLeast = ((kBlockBytes % 16 == 0 ? 0 : 14 + 16) + kBytes + 15) / 16;
    static constexpr int kWords = kLeast + (kRest + kOf - kLeast % kOf) % kOf;
    static constexpr int kSlabs = kWeights / kSlab;
    Words words[kRows * kWords];
};

// The rows of weights that a block computes. Those of gate and up come eight by eight in turn, so that a warp has both
// of an output. Past the last row it is read again.
struct Rows {
    const std::byte *weights, *up;  // the first row
    int row_bytes, last;            // the last row of the block
    bool gated;

    __device__ const std::byte* of(int i) const { return (is_up(i) ? up : weights) + int64_t{row(i)} * row_bytes; }
    // Of the address.
    __device__ uint32_t low_bits(int i) const {
        return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(is_up(i) ? up : weights)) +
               static_cast<uint32_t>(row(i) * row_bytes);
    }

private:
    __device__ bool is_up(int i) const { return gated && i / 8 % 2 != 0; }
    __device__ int row(int i) const {
        const int r = gated ? i / 16 * 8 + i % 8 : i;
        return r < last ? r : last;
    }
};

// Where row i's part of a segment begins within its first 16 bytes.
template <class S>
__device__ __forceinline__ int offset_in_chunk(const Rows& rows, int i, int segment) {
    if constexpr (S::kBlockBytes % sizeof(Words) == 0) return 0;
    return static_cast<int>((rows.low_bits(i) + static_cast<uint32_t>(segment * S::kBytes)) % sizeof(Words));
}

// Begins to copy segment number `segment` of each row: four threads a row.
template <int kThreads, int kRows, class S>
__device__ __forceinline__ void load_segment(S& to, const Rows& rows, int segment) {
    constexpr int kOfRow = 4, kRowsAtOnce = kThreads / kOfRow;
    static_assert(kRows % kRowsAtOnce == 0);
    const int begin = segment * S::kBytes, left = rows.row_bytes - begin, bytes = left < S::kBytes ? left : S::kBytes;
    const int first_chunk = thread_id() % kOfRow;
    for (int r = thread_id() / kOfRow; r < kRows; r += kRowsAtOnce) {
        const int offset = offset_in_chunk<S>(rows, r, segment);
        const std::byte* from = rows.of(r) + (begin - offset);
        YIVL_UNROLL
        for (int c = first_chunk; c < S::kWords; c += kOfRow) {
            const int at = c * static_cast<int>(sizeof(Words)), there = offset + bytes - at;
            if (there > 0) copy_async(&to.words[r * S::kWords + c], from + at, there < 16 ? there : 16);
        }
    }
}

// ---- unpacking ----

// Weights but F16 are unpacked times this, so that products of a block's small scales keep their bits in half
// precision: what is below 2^-22 loses some, and 255 is the largest.
inline constexpr float kUnpackedScale = 256.0f;
template <WeightType kType>
constexpr float kPackedScale = kType == WeightType::F16 ? 1.0f : 1.0f / kUnpackedScale;

__device__ __forceinline__ uint32_t twice(float value) { return pack_halves(value, value); }

// scale * (byte - centre) + offset of the unsigned bytes of two words, scale and offset rounded before.
__device__ __forceinline__ Words scaled_bytes(uint32_t first, uint32_t second, int centre, float scale,
                                              float offset = 0.0f) {
    // A byte under 0x64 is the half 1024 + byte.
    constexpr uint32_t kAbove = 0x64646464;
    const uint32_t minus = twice(static_cast<float>(-1024 - centre)), s = twice(scale), o = twice(offset);
    const auto scaled = [&](uint32_t halves) { return fma_halves(add_halves(halves, minus), s, o); };
    return {{scaled(permute_bytes(first, kAbove, 0x4140)), scaled(permute_bytes(first, kAbove, 0x4342)),
             scaled(permute_bytes(second, kAbove, 0x4140)), scaled(permute_bytes(second, kAbove, 0x4342))}};
}

__device__ __forceinline__ half_bits half_at(const std::byte* p) { return *reinterpret_cast<const half_bits*>(p); }

// Of half-precision weights in columns from `first` on, those past the last become 0: x has zeros there, but a NaN
// times zero is one.
__device__ __forceinline__ void keep_columns(Words& words, int64_t cols, int first) {
    const int left = static_cast<int>(cols) - first;
    if (left >= kChunkElements) return;
    for (int j = 0; j < kChunkElements; ++j) {
        if (j >= left) words.word[j / 2] &= j % 2 == 0 ? 0 : 0xffff;
    }
}

// Of group g of a Q4_K or Q5_K block, whose first 16 bytes are `head`: integers are taken around a centre. What
// rounding a scale costs is then a part of the weights, not of their distance from the minimum.
struct Scaling {
    float scale, offset;
};
__device__ __forceinline__ Scaling scaling_of(const Words& head, int g, int centre) {
    const Group group = group_of(head, g);
    const float scale = group.scale * kUnpackedScale;
    return {scale, scale * static_cast<float>(centre) - group.minimum * kUnpackedScale};
}

// ---- results ----

// Those of a token, of `n` rows as Rows has them, from shared memory to columns of y from `first` on; of the warp.
template <WeightType kType>
__device__ __forceinline__ void write_results(const float* results, int n, const Target& to, const HalfInput& x,
                                              int64_t token, int64_t first, bool gated) {
    const float factor = x.unscaled[token] * kPackedScale<kType>;
    float* row = to.y.data + token * to.y.stride;
    for (int j = lane_id(); j < (gated ? n / 2 : n); j += kWarp) {
        const int64_t col = first + j;
        if (col >= to.y.cols) break;
        if (gated) {
            const int gate = j / 8 * 16 + j % 8;
            row[col] = silu_of(results[gate] * factor) * (results[gate + 8] * factor);
            continue;
        }
        const float sum = results[j] * factor;
        put(to.finish, row[col], to.bias == nullptr ? sum : sum + to.bias[col]);
    }
}

// ---- starting ----

// Products of one x, of which the largest has `most_rows` rows of weights. Gated, there is one: of[0] is the gate, and
// where the result goes, of[1] up.
struct GemmLaunch {
    const char* name;
    Targets targets;
    int64_t n_products, most_rows;
    bool gated;
};
// Of blocks that compute `rows` outputs of `tokens` tokens, half of them where they are gated.
inline Grid gemm_grid(int64_t n_tokens, int64_t tokens, int64_t rows, const GemmLaunch& gemm) {
    const int64_t of_block = gemm.gated ? rows / 2 : rows;
    return {(n_tokens + tokens - 1) / tokens, (gemm.most_rows + of_block - 1) / of_block, gemm.n_products};
}
void start_warpgroup_gemm(Stream& stream, const HalfInput& x, const Weight& w, const GemmLaunch& gemm);

}  // namespace yivl::cuda
