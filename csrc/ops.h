// The seam between the forward path and a backend: the operations that a stage may ask for, and nothing else.
//
// Letters: N patches, T tokens, D width, H heads, K KV heads, hd head dim, F MLP width, V vocabulary.
// In products alone: T rows of x, I columns of x (inputs), O rows of W (outputs).
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>

#include "control.h"
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

// What becomes of a product v: y = v, y = y + v or y = gelu(v).
enum class Then { store, add, gelu };

// y (T, O) = x W^T + b, for the x (T, I) of the call; an empty bias is none.
struct Product {
    Mat y;
    Weight w;
    Vec bias = {};
    Then then = Then::store;
};

struct AttentionShape {
    int64_t n_heads;     // H
    int64_t n_kv_heads;  // K, divides H
    int64_t head_dim;    // hd
    bool causal;         // row i of q sits at position k.rows - q.rows + i and sees no later one
};

// Operations on float32 activations. One object serves one caller at a time and throws Cancelled when its Control says
// so. Each output value is computed in an order that depends neither on the number of threads nor on how many rows
// stand beside it, so that replies do not change with either.
class Ops {
public:
    virtual ~Ops() = default;

    // Products of one x, which none of them may overwrite.
    virtual void linear(ConstMat x, std::span<const Product> products) = 0;
    void linear(ConstMat x, std::initializer_list<Product> products) {
        linear(x, std::span(products.begin(), products.size()));
    }
    // y (T, F) = silu(x Wg^T) * (x Wu^T), silu(v) = v / (1 + exp(-v))
    virtual void gated_linear(Mat y, ConstMat x, const Weight& gate, const Weight& up) = 0;
    // y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, per row; y may be x.
    virtual void layer_norm(Mat y, ConstMat x, Vec weight, Vec bias, float eps) = 0;
    // y = x / sqrt(mean(x^2) + eps) * weight, per row; y may be x.
    virtual void rms_norm(Mat y, ConstMat x, Vec weight, float eps) = 0;
    // x = x/2 * (1 + erf(x / sqrt(2)))
    virtual void gelu(Mat x) = 0;
    // y += x
    virtual void add(Mat y, ConstMat x) = 0;
    // Rotates adjacent pairs (2j, 2j+1) of every head of x (T, H*hd) by position * theta^(-2j/hd); row i is at position
    // `first` + i.
    virtual void rope(Mat x, int64_t head_dim, int64_t first, float theta) = 0;
    // out (T, H*hd) = softmax(q k^T / sqrt(hd)) v with q (T, H*hd), k and v (S, K*hd); query head h reads KV head
    // h / (H/K).
    virtual void attention(Mat out, ConstMat q, ConstMat k, ConstMat v, const AttentionShape& shape) = 0;
    // y (T, D) = rows `ids` of the table (V, D).
    virtual void embed(Mat y, const Weight& table, std::span<const int32_t> ids) = 0;
};

// What a device offers: where weights live and how to compute there. Shared by all sessions of a model.
class Backend {
public:
    virtual ~Backend() = default;
    // The name of the instruction set or device in use, e.g. "avx512".
    virtual const char* name() const = 0;
    virtual int n_threads() const = 0;
    virtual std::unique_ptr<Ops> ops(Control& control) = 0;
};

// n_threads 0 means one per physical core. Throws std::invalid_argument when YIVL_ISA names an instruction set that is
// unknown or that this CPU lacks.
std::unique_ptr<Backend> make_cpu_backend(int n_threads);

}  // namespace yivl
