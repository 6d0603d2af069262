// Products with weights of every type but F32, which stay as the file has them: made for few rows of x, where the
// weights' way from memory is what takes time.
//
// A warp has kRows rows. A row is cut into pieces, of which each lane takes every 32nd, always in the same order: how
// many rows of x there are changes no result.
#include "cuda/finish.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/matvec_pieces.cuh"
#include "cuda/position.cuh"
#include "cuda/reduce.cuh"
#include "cuda/round.cuh"

namespace yivl::cuda {

namespace {

constexpr int kRows = 2;  // of the weights, of a warp: they share what is read of x
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kMostTokens = 4;  // of a warp
// Of a multiprocessor, at least: 128 registers for a thread, more where a piece or the sums of several tokens need
// them. Five for Q4_K and one token: 6B's 640 blocks of Q, K and V are then all under way at once on the 132
// multiprocessors of an H100.
constexpr int blocks_at_once(WeightType type, int tokens) {
    if (type == WeightType::Q4_K && tokens == 1) return 5;
    const bool large_piece = type == WeightType::Q3_K || type == WeightType::Q6_K ||
                             (type == WeightType::Q2_K && tokens > 1) || (type == WeightType::Q5_K && tokens > 2);
    return 4 - large_piece - (tokens > 1);
}
constexpr int kGatedWarps = 8;
// Three for Q4_K and one token: 6B's 344 blocks are then all under way at once on the 132 multiprocessors of an H100.
constexpr int gated_blocks_at_once(WeightType type, int tokens) {
    return type == WeightType::Q4_K && tokens == 1 ? 3 : blocks_at_once(type, tokens) / 2;
}

// ---- rounding x ----

__global__ void round_kernel(ConstMat x, RoundedInput to) {
    wait_for_earlier_kernels();
    const int64_t block = int64_t{block_x()} * kWarps + warp_id(), n_blocks = x.cols / kBlock;
    if (block >= x.rows * n_blocks) return;
    const int64_t row = block / n_blocks, col = block % n_blocks * kBlock + lane_id();
    round_block(to, row, col, x.data[row * x.stride + col]);
}

// ---- kernels ----

// The beginning of a row of weights, to be on its way before x is there. All warps at once ask for some 10 MB: what
// memory gives in the two or three microseconds of the wait, and far less than the second-level cache holds.
constexpr int kLinesAhead = 16;
__device__ __forceinline__ void prefetch_row(const std::byte* row, int64_t row_bytes) {
    const int at = lane_id() * kLine;
    if (lane_id() < kLinesAhead && at < row_bytes) prefetch_line(row + at);
}

// sums[r][t] = w[r] . x[first_token + t], in every lane. Tokens past the last repeat it, or have sums of 0. begun() is
// called when earlier kernels have ended: what it loads comes while this multiplies.
template <class P, class Input, int kTokens, class Begun>
__device__ __forceinline__ void multiply_rows(float (&sums)[kRows][kTokens], const std::byte* const (&w)[kRows],
                                              const Input& x, int64_t first_token, int64_t n_tokens, Begun&& begun) {
    for (auto& row : sums) {
        for (float& sum : row) sum = 0.0f;
    }
    const uint32_t n_pieces = (columns(x) + P::kColumns - 1) / P::kColumns, n_rounds = (n_pieces + kWarp - 1) / kWarp;
    const auto lane = static_cast<uint32_t>(lane_id());
    // The lanes of a warp stay together, without branches of their own: who has no piece in the last round takes one
    // again, and adds nothing.
    const uint32_t first = lane < n_pieces ? lane : 0;
    static_assert(kWarp % P::kPieces == 0);
    const uint32_t part = first % P::kPieces;
    const std::byte* from[kRows];
    for (int r = 0; r < kRows; ++r) from[r] = w[r] + first / P::kPieces * sizeof(typename P::Block);
    uint32_t column_to_load = P::first_column(first);
    const auto inside = [&](uint32_t round) { return round * kWarp + lane < n_pieces; };
    using Weights = typename P::Weights[kRows];
    const auto load = [&](Weights& to, uint32_t round) {
        if (round > 0 && inside(round)) {
            for (auto& row : from) row += kWarp / P::kPieces * sizeof(typename P::Block);
            column_to_load += kWarp * P::kColumns;
        }
        for (int r = 0; r < kRows; ++r) {
            to[r] = P::load(*reinterpret_cast<const typename P::Block*>(from[r]), part, column_to_load, x);
        }
    };
    Weights even{}, odd{};
    load(even, 0);
    wait_for_earlier_kernels();
    begun();
    uint32_t row_of_x[kTokens];
    YIVL_UNROLL
    for (int t = 0; t < kTokens; ++t) {
        const int64_t token = first_token + t < n_tokens ? first_token + t : n_tokens - 1;
        row_of_x[t] = static_cast<uint32_t>(token) * stride(x);
    }
    const auto multiply = [&](uint32_t round, const Weights& now, uint32_t column) {
        YIVL_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            if (t == 2 && first_token + t >= n_tokens) break;
            const typename P::Input input = P::input(x, row_of_x[t] + column, part, column);
            for (int r = 0; r < kRows; ++r) {
                const float sum = P::add(now[r], input, part, sums[r][t]);
                sums[r][t] = inside(round) ? sum : sums[r][t];
            }
        }
    };
    // The next round's weights are on their way while this one's are multiplied.
    const auto turn = [&](uint32_t round, const Weights& now, Weights& next) {
        const uint32_t column = column_to_load;
        if (round + 1 < n_rounds) load(next, round + 1);
        multiply(round, now, column);
    };
    if constexpr (kTokens == 1) {
        for (uint32_t round = 0; round < n_rounds; round += 2) {
            turn(round, even, odd);
            if (round + 1 < n_rounds) turn(round + 1, odd, even);
        }
    } else {  // a copy takes fewer registers
        for (uint32_t round = 0; round < n_rounds; ++round) {
            turn(round, even, odd);
            for (int r = 0; r < kRows; ++r) even[r] = odd[r];
        }
    }
    for (auto& row : sums) {
        for (float& sum : row) sum = reduce_warp<Sum>(sum);
    }
}

__host__ __device__ constexpr int64_t groups(int64_t n_rows) { return (n_rows + kRows - 1) / kRows; }

template <WeightType kType, class Input, int kTokens>
__global__ void __launch_bounds__(kThreads, blocks_at_once(kType, kTokens))
    matvec_kernel(Targets targets, Input x, int64_t row_bytes) {
    int64_t group = int64_t{block_x()} * kWarps + uniform_warp_id();
    Target to = targets.of[0];
    for (size_t i = 1; i < kMostProducts; ++i) {
        const int64_t n = groups(to.y.cols);
        if (group < n) continue;
        group -= n;
        to = targets.of[i];
    }
    if (group >= groups(to.y.cols)) return wait_for_earlier_kernels();
    const int64_t first_row = group * kRows, first_token = int64_t{block_y()} * kTokens;
    const std::byte* w[kRows];
    for (int r = 0; r < kRows; ++r) {
        w[r] = to.w + (first_row + r < to.y.cols ? first_row + r : first_row) * row_bytes;
        prefetch_row(w[r], row_bytes);
    }
    static_assert(kRows == 2);  // a pair that is rotated together
    const bool has_second = first_row + 1 < to.y.cols;
    // What the sums meet, loaded as soon as it can be: at the end each of these would be a wait for memory of its own.
    const int64_t position = number(to.row), turned = number(to.turns.first);
    float bias[kRows]{}, old[kTokens][kRows]{};
    Turn turns[kTokens]{};
    if (to.bias != nullptr) {
        for (int r = 0; r < kRows; ++r) bias[r] = to.bias[first_row + (has_second ? r : 0)];
    }
    const auto load_more = [&] {
        YIVL_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            const int64_t token = first_token + t;
            if (token >= to.y.rows) break;
            if (to.turns.cos_sin != nullptr) turns[t] = turn_of(to.turns, turned + token, first_row);
            if (!meets_old(to.finish)) continue;
            const float* y = to.y.data + (position + token) * to.y.stride + first_row;
            for (int r = 0; r < kRows; ++r) old[t][r] = y[has_second ? r : 0];
        }
    };
    float sums[kRows][kTokens];
    multiply_rows<Piece<kType>>(sums, w, x, first_token, to.y.rows, load_more);
    if (lane_id() != 0) return;
    YIVL_UNROLL
    for (int t = 0; t < kTokens; ++t) {
        const int64_t token = first_token + t;
        if (token >= to.y.rows) break;
        float first = sums[0][t] + bias[0], second = sums[1][t] + bias[1];
        if (to.turns.cos_sin != nullptr) turn(first, second, turns[t]);
        float* y = to.y.data + (position + token) * to.y.stride + first_row;
        y[0] = finished(to.finish, old[t][0], first);
        if (has_second) y[1] = finished(to.finish, old[t][1], second);
    }
}

// kBlock rows of gate, and the same of up, for every block: their products can be rounded at once.
template <WeightType kType, class Input, int kTokens>
__global__ void __launch_bounds__(kGatedWarps* kWarp, gated_blocks_at_once(kType, kTokens))
    gated_matvec_kernel(Mat y, const std::byte* gate, const std::byte* up, Input x, int64_t row_bytes,
                        RoundedInput rounded_y) {
    struct Products {
        float of[kTokens][kBlock];
    };
    Products& products = shared<Products>();
    const int64_t first_row = int64_t{block_x()} * kBlock, first_token = int64_t{block_y()} * kTokens;
    const int warp = uniform_warp_id();
    if (const int64_t row = first_row + warp; row < y.cols) {
        prefetch_row(gate + row * row_bytes, row_bytes);
        prefetch_row(up + row * row_bytes, row_bytes);
    }
    for (int i = warp; i < kBlock; i += kGatedWarps) {
        const int64_t row = first_row + i;
        if (row >= y.cols) break;
        static_assert(kRows == 2);
        const std::byte* const w[kRows] = {gate + row * row_bytes, up + row * row_bytes};
        float sums[kRows][kTokens];
        multiply_rows<Piece<kType>>(sums, w, x, first_token, y.rows, [] {});
        if (lane_id() != 0) continue;
        YIVL_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            if (first_token + t >= y.rows) break;
            const float product = silu_of(sums[0][t]) * sums[1][t];
            y.data[(first_token + t) * y.stride + row] = product;
            products.of[t][i] = product;
        }
    }
    wait_for_earlier_kernels();  // warps without rows, too
    if (rounded_y.high == nullptr) return;
    sync_block();
    const int t = warp;
    if (t < kTokens && first_token + t < y.rows) {
        round_block(rounded_y, first_token + t, first_row + lane_id(), products.of[t][lane_id()]);
    }
}

// fn.template operator()<type, tokens>(input): what a launch of that type takes as x, and tokens of a warp.
template <class Fn>
void with_input(WeightType type, ConstMat x, const RoundedInput& rounded, Fn&& fn) {
    const auto with_tokens = [&]<WeightType kType>(const auto& input) {
        if (x.rows == 1) return fn.template operator()<kType, 1>(input);
        if (x.rows == 2) return fn.template operator()<kType, 2>(input);
        return fn.template operator()<kType, kMostTokens>(input);
    };
    const auto aligned = [](const void* data, int64_t row_bytes) {
        return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_bytes % 16 == 0;
    };
    const PlainInput plain{x, aligned(x.data, x.stride * 4), x.cols % 8 == 0};
    with_type(type, [&]<WeightType kType> {
        if constexpr (kType == WeightType::F16 || kType == WeightType::BF16) {
            with_tokens.template operator()<kType>(plain);
        } else if constexpr (kType != WeightType::F32) {
            with_tokens.template operator()<kType>(rounded);
        }
    });
}

int64_t blocks(int64_t n, int64_t of) { return (n + of - 1) / of; }

}  // namespace

bool takes_rounded(WeightType type) {
    return type != WeightType::F32 && type != WeightType::F16 && type != WeightType::BF16;
}

size_t rounded_bytes(int64_t rows, int64_t cols) {
    return static_cast<size_t>(rows * cols * 2 + rows * (cols / kBlock) * int64_t{sizeof(RoundedBlock)});
}

RoundedInput rounded_in(std::byte* memory, int64_t rows, int64_t cols) {
    const int64_t n = rows * cols;
    return {reinterpret_cast<int8_t*>(memory), reinterpret_cast<int8_t*>(memory + n),
            reinterpret_cast<RoundedBlock*>(memory + 2 * n), cols};
}

void round_input(Stream& stream, ConstMat x, const RoundedInput& rounded) {
    const int64_t n_blocks = x.rows * (x.cols / kBlock);
    launch(stream, "round", round_kernel, {blocks(n_blocks, kWarps)}, kThreads, 0, x, rounded);
}

void matvec(Stream& stream, ConstMat x, const RoundedInput& rounded, std::span<const FinishedProduct> products) {
    const Targets targets = targets_of(products);
    int64_t n_groups = 0;
    for (const FinishedProduct& p : products) n_groups += groups(p.w.rows);
    const int64_t row_bytes = products[0].w.row_bytes();
    stream.expect(work_of(x.rows, products));
    with_input(products[0].w.type, x, rounded, [&]<WeightType kType, int kTokens, class Input>(const Input& input) {
        launch(stream, "matvec", matvec_kernel<kType, Input, kTokens>,
               {blocks(n_groups, kWarps), blocks(x.rows, kTokens)}, kThreads, 0, targets, input, row_bytes);
    });
}

void gated_matvec(Stream& stream, Mat y, ConstMat x, const RoundedInput& rounded, const Weight& gate, const Weight& up,
                  const RoundedInput& rounded_y) {
    assert(gate.type == up.type && (rounded_y.high == nullptr || y.cols % kBlock == 0));
    const FinishedProduct products[] = {{y, gate}, {y, up}};
    stream.expect(work_of(x.rows, products));
    with_input(gate.type, x, rounded, [&]<WeightType kType, int kTokens, class Input>(const Input& input) {
        launch(stream, "gated_matvec", gated_matvec_kernel<kType, Input, kTokens>,
               {blocks(gate.rows, kBlock), blocks(x.rows, kTokens)}, kGatedWarps * kWarp, 0, y, gate.data, up.data,
               input, gate.row_bytes(), rounded_y);
    });
}

}  // namespace yivl::cuda
