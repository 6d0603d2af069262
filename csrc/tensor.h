// Matrices that somebody else owns, as operations take them: plain addresses and shapes, of the host's memory or of a
// device's.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <type_traits>

#include "quant_blocks.h"

namespace yivl {

// A row-major matrix that somebody else owns; `stride` elements from one row to the next.
template <class T>
struct View {
    T* data = nullptr;
    int64_t rows = 0;
    int64_t cols = 0;
    int64_t stride = 0;

    View() = default;
    View(T* data, int64_t rows, int64_t cols) : View(data, rows, cols, cols) {}
    View(T* data, int64_t rows, int64_t cols, int64_t stride) : data(data), rows(rows), cols(cols), stride(stride) {}
    template <class U>
        requires std::is_convertible_v<U (*)[], T (*)[]>
    View(const View<U>& other) : View(other.data, other.rows, other.cols, other.stride) {}

    std::span<T> row(int64_t i) const {
        assert(i >= 0 && i < rows);
        return {data + i * stride, static_cast<size_t>(cols)};
    }
    View row_range(int64_t begin, int64_t count) const {
        assert(begin >= 0 && begin + count <= rows);
        return {data + begin * stride, count, cols, stride};
    }
    View col_range(int64_t begin, int64_t count) const {
        assert(begin >= 0 && begin + count <= cols);
        return {data + begin, rows, count, stride};
    }
};
using Mat = View<float>;
using ConstMat = View<const float>;

// Columns of several heads that somebody else owns: token t of head h begins at h * head_stride + t * stride.
template <class T>
struct HeadsView {
    T* data;
    int64_t rows, n_heads, head_dim;
    int64_t stride, head_stride;

    // Heads side by side in the rows of a matrix.
    HeadsView(const View<T>& x, int64_t n_heads)
        : data(x.data),
          rows(x.rows),
          n_heads(n_heads),
          head_dim(x.cols / n_heads),
          stride(x.stride),
          head_stride(head_dim) {
        assert(x.cols % n_heads == 0);
    }
    HeadsView(const View<T>& x) : HeadsView(x, 1) {}
    // Tokens of a head side by side: a matrix (n_heads rows, head_dim).
    static HeadsView by_head(const View<T>& x, int64_t n_heads) {
        HeadsView heads(x, 1);
        heads.rows = x.rows / n_heads;
        heads.n_heads = n_heads;
        heads.head_stride = heads.rows * x.stride;
        return heads;
    }
    template <class U>
        requires std::is_convertible_v<U (*)[], T (*)[]>
    HeadsView(const HeadsView<U>& x)
        : data(x.data),
          rows(x.rows),
          n_heads(x.n_heads),
          head_dim(x.head_dim),
          stride(x.stride),
          head_stride(x.head_stride) {}

    int64_t cols() const { return n_heads * head_dim; }
    HeadsView row_range(int64_t begin, int64_t count) const {
        assert(begin >= 0 && begin + count <= rows);
        HeadsView some = *this;
        some.data += begin * stride;
        some.rows = count;
        return some;
    }
    // Some columns, of one head if heads do not lie side by side.
    View<T> col_range(int64_t begin, int64_t count) const {
        assert(begin >= 0 && begin + count <= cols() && (side_by_side() || begin % head_dim + count <= head_dim));
        return {data + begin / head_dim * head_stride + begin % head_dim, rows, count, stride};
    }
    View<T> head(int64_t h) const {
        assert(h >= 0 && h < n_heads);
        return {data + h * head_stride, rows, head_dim, stride};
    }
    bool side_by_side() const { return n_heads == 1 || head_stride == head_dim; }
    // Of all heads, if they lie side by side.
    View<T> matrix() const {
        assert(side_by_side());
        return {data, rows, cols(), stride};
    }
};
using Heads = HeadsView<float>;
using ConstHeads = HeadsView<const float>;

// A weight matrix (O, I) as the file holds it: rows of quantised blocks, one after the other.
struct Weight {
    WeightType type = WeightType::F32;
    int64_t rows = 0;  // O, outputs
    int64_t cols = 0;  // I, inputs
    const std::byte* data = nullptr;

    int64_t row_bytes() const {
        const TypeInfo& info = type_info(type);
        return cols / info.block * info.bytes;
    }
};

using Vec = std::span<const float>;

// LayerNorm of each row, (x - mean(x)) / sqrt(var(x) + eps) * weight + bias; without a bias RMSNorm,
// x / sqrt(mean(x^2) + eps) * weight.
struct Norm {
    Vec weight;
    Vec bias = {};
    float eps;
};

// What products multiply: x, or its norm, which `room`, of the same shape, may hold from then on.
struct Input {
    ConstMat x;
    std::optional<Norm> norm = {};
    Mat room = {};

    Input(ConstMat x) : x(x) {}
    Input(Mat x) : x(x) {}
    Input(ConstMat x, const Norm& norm, Mat room) : x(x), norm(norm), room(room) {
        assert(room.rows == x.rows && room.cols == x.cols);
    }

    Input row_range(int64_t begin, int64_t count) const {
        if (!norm) return x.row_range(begin, count);
        return {x.row_range(begin, count), *norm, room.row_range(begin, count)};
    }
};

// What becomes of a product v: y = v, y = y + v or y = gelu(v).
enum class Then { store, add, gelu };

// Adjacent pairs (2j, 2j+1) of every head are turned by position * theta^(-2j/hd); row i of x is at position `first` +
// i.
struct Rotation {
    int64_t head_dim = 0;  // 0: nothing is turned
    int64_t first = 0;
    float theta = 0.0f;
};

// Rows [row, row + T) of y = x W^T + b, rotated, for the x (T, I) of the call; an empty bias is none.
struct Product {
    Heads y;
    Weight w;
    Vec bias = {};
    Then then = Then::store;
    int64_t row = 0;
    Rotation rotation = {};
};

struct AttentionShape {
    int64_t n_heads;     // H
    int64_t n_kv_heads;  // K, divides H
    int64_t head_dim;    // hd
    bool causal;         // row i of q sits at position k.rows - q.rows + i and sees no later one
    bool rounded;        // may round its operands as products with weights do; false: float32
};

}  // namespace yivl
