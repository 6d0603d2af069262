// The kernels, each behind a function that starts it on a stream. Matrices, vectors and weights are in device memory;
// what each computes is said in ops.h. Shapes are the caller's to check.
#pragma once

#include "cuda/runtime.h"
#include "draw.h"
#include "tensor.h"

namespace yivl::cuda {

// elementwise.cu
void gelu(Stream& stream, Mat x);
void add(Stream& stream, Mat y, ConstMat x);
// The compute capability, times ten, that the kernels which the device in use runs were compiled for; not on the
// emulator.
int code_capability();

// x rounded to 15-bit integers, 256 * high + low, with a scale for every 32 columns.
struct alignas(16) RoundedBlock {
    float scale;
    float sum_of_x;     // scale * sum
    int32_t sum;        // of the integers
    int32_t first_sum;  // of the first 16
};
struct RoundedInput {
    int8_t* high = nullptr;          // (T, I); null: x is not rounded
    int8_t* low = nullptr;           // (T, I)
    RoundedBlock* blocks = nullptr;  // (T, I / 32)
    int64_t cols = 0;                // I
};

// norm.cu
void layer_norm(Stream& stream, Mat y, ConstMat x, Vec weight, Vec bias, float eps);
// And y rounded, if `rounded` has room for it.
void rms_norm(Stream& stream, Mat y, ConstMat x, Vec weight, float eps, const RoundedInput& rounded);

// A number of rows that is known on the card alone, and that no kernel writes: 0 where null.
using RowNumber = const int32_t*;

// How the heads of a row of x are rotated.
struct Turns {
    const float* cos_sin = nullptr;  // (P, hd): row `first` + i for row i of x; null: they are not
    int64_t head_dim = 0;
    RowNumber first = nullptr;
};

// rope.cu
// cos_sin (T, hd): cosine and sine of every pair of a head, side by side, at positions `first` + row.
void rotations(Stream& stream, Mat cos_sin, int64_t first, float theta);
// Rotates the heads of x (T, n * hd), which begins `row` rows further on.
void rotate(Stream& stream, Mat x, const Turns& turns, RowNumber row);

// What becomes of a product v: y = v, y + v, gelu(v), silu(v) or y * v.
enum class Finish { store, add, gelu, silu, times };
// As Product of tensor.h, with y (T, O) where the result belongs, or `row` rows before.
struct FinishedProduct {
    Mat y;
    Weight w;
    Vec bias = {};
    Finish finish = Finish::store;
    RowNumber row = nullptr;
    Turns turns = {};
};

// x and the weights are read once, the results written.
inline Work work_of(int64_t n_tokens, std::span<const FinishedProduct> products) {
    Work work{.bytes = n_tokens * products[0].w.cols * int64_t{sizeof(float)}};
    for (const FinishedProduct& p : products) {
        work.bytes += p.w.rows * p.w.row_bytes() + n_tokens * p.w.rows * int64_t{sizeof(float)};
        work.flop += 2 * n_tokens * p.w.rows * p.w.cols;
    }
    return work;
}

// Of one x, in one launch.
inline constexpr size_t kMostProducts = 3;

// matmul.cu
// With F32 weights; rotates nothing.
void linear(Stream& stream, ConstMat x, const FinishedProduct& product);

// matvec.cu: weights of all types but F32
// Whether the type's kernels need x rounded.
bool takes_rounded(WeightType type);
size_t rounded_bytes(int64_t rows, int64_t cols);
// In `memory`, rounded_bytes(T, I) of it, aligned to 16.
RoundedInput rounded_in(std::byte* memory, int64_t rows, int64_t cols);
void round_input(Stream& stream, ConstMat x, const RoundedInput& rounded);
// Products of one x with weights of one type, kMostProducts or fewer. `rounded` is that x, where the type needs it.
void matvec(Stream& stream, ConstMat x, const RoundedInput& rounded, std::span<const FinishedProduct> products);
// y = silu(x gate^T) * (x up^T), the two of one type. And y rounded, if `rounded_y` has room for it.
void gated_matvec(Stream& stream, Mat y, ConstMat x, const RoundedInput& rounded, const Weight& gate, const Weight& up,
                  const RoundedInput& rounded_y);

// gemm.cu: weights of all types but F32, which half precision would round
struct Half;  // of device.h, which kernels alone can include
// x in half precision: each row times a power of two that brings its largest value to 2^14 or more, below 2^15.
struct HalfInput {
    Half* values;     // (T rounded up to blocks, stride): columns past I are 0
    float* unscaled;  // (T): what takes a row back to x
    int64_t rows, cols, stride;
    bool in_fragments;  // whether columns lie as gemm_warpgroup.cu takes them
};
size_t half_bytes(int64_t rows, int64_t cols);
// In `memory`, half_bytes(T, I) of it, aligned to 16.
HalfInput halves_in(const Stream& stream, std::byte* memory, int64_t rows, int64_t cols);
void to_halves(Stream& stream, ConstMat x, const HalfInput& to);
// Products of one x with weights of one type, kMostProducts or fewer.
void gemm(Stream& stream, const HalfInput& x, std::span<const FinishedProduct> products);
// y = silu(x gate^T) * (x up^T), the two of one type.
void gated_gemm(Stream& stream, Mat y, const HalfInput& x, const Weight& gate, const Weight& up);

// attention.cu
// If `position` is not null, q is one row, which sees that many of k's rows and one more; then k has as many as there
// can be.
inline constexpr int64_t kMaxHeadDim = 256;
void attention(Stream& stream, Mat out, ConstMat q, ConstMat k, ConstMat v, const AttentionShape& shape,
               RowNumber position);

// split_attention.cu
// The same for heads of at most kMaxSplitHeadDim columns, made for few rows of q: the keys are shared out among blocks.
// And out rounded, if `rounded` has room for it.
inline constexpr int64_t kMaxSplitHeadDim = 128;
bool has_split_attention(ConstMat q, ConstMat k, ConstMat v, const AttentionShape& shape);
// What blocks hand to the last one: `counts` are 0 before and after, `partials` anything.
struct SplitMemory {
    int32_t* counts;
    float* partials;
};
int64_t split_counts(int64_t n_rows, const AttentionShape& shape);
int64_t split_partials(int64_t n_rows, const AttentionShape& shape);
void split_attention(Stream& stream, Mat out, ConstMat q, ConstMat k, ConstMat v, const AttentionShape& shape,
                     RowNumber position, const SplitMemory& memory, const RoundedInput& rounded);

// flash.cu
// The same for heads of at most kMaxFlashHeadDim columns, made for many rows of q, with S keys and values that
// keys_in_halves has put into `memory`, keys_in_halves_bytes(S, shape) of it, aligned to 16.
inline constexpr int64_t kMaxFlashHeadDim = 128;
size_t keys_in_halves_bytes(int64_t n_keys, const AttentionShape& shape);
void keys_in_halves(Stream& stream, ConstMat k, ConstMat v, const AttentionShape& shape, std::byte* memory);
void flash_attention(Stream& stream, Mat out, ConstMat q, int64_t n_keys, const AttentionShape& shape,
                     std::byte* memory);

// embed.cu
// `ids` in device memory, one for each row of y.
void embed(Stream& stream, Mat y, const Weight& table, const int32_t* ids);

// ceilings.cu
// Multiply-adds in registers on all multiprocessors; how many operations. Nothing is written to `sink`.
int64_t exert_halves(Stream& stream, float* sink, int n_multiprocessors, int64_t rounds);
int64_t exert_floats(Stream& stream, float* sink, int n_multiprocessors, int64_t rounds);

// draw.cu
// *id, in device memory = what Sampler::choose takes of the logits (V); -1 for logits that it refuses. `previous_ids`
// in device memory, empty where there is no penalty; `memory`: draw_bytes(V) of it, aligned to 16.
size_t draw_bytes(int64_t n_logits);
void draw(Stream& stream, int32_t* id, Vec logits, std::span<const int32_t> previous_ids, const Draw& draw,
          std::byte* memory);

}  // namespace yivl::cuda
