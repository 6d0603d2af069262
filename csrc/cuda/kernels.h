// The kernels, each behind a function that starts it on a stream. Matrices, vectors and weights are in device memory;
// what each computes is said in ops.h. Shapes are the caller's to check.
#pragma once

#include "cuda/runtime.h"
#include "tensor.h"

namespace yivl::cuda {

// elementwise.cu
void gelu(Stream& stream, Mat x);
void add(Stream& stream, Mat y, ConstMat x);

// norm.cu
void layer_norm(Stream& stream, Mat y, ConstMat x, Vec weight, Vec bias, float eps);
void rms_norm(Stream& stream, Mat y, ConstMat x, Vec weight, float eps);

// rope.cu
// cos_sin (T, hd): cosine and sine of every pair of a head, side by side, at positions `first` + row.
void rotations(Stream& stream, Mat cos_sin, int64_t first, float theta);
// Rotates the heads of x (T, n * hd) by cos_sin (T, hd).
void rotate(Stream& stream, Mat x, ConstMat cos_sin);

// matmul.cu
void linear(Stream& stream, ConstMat x, const Product& product);
void gated_linear(Stream& stream, Mat y, ConstMat x, const Weight& gate, const Weight& up);

// attention.cu
inline constexpr int64_t kMaxHeadDim = 256;
void attention(Stream& stream, Mat out, ConstMat q, ConstMat k, ConstMat v, const AttentionShape& shape);

// embed.cu
// `ids` in device memory, one for each row of y.
void embed(Stream& stream, Mat y, const Weight& table, const int32_t* ids);

// argmax.cu
// *index in device memory = where the largest of the values is, the first of several; -1 if one is NaN or infinite.
void argmax(Stream& stream, int32_t* index, Vec values);

}  // namespace yivl::cuda
