// What one instruction set offers: a table of kernels, each the work of one thread on one piece of an operation.
//
// An output value is computed in the same order whatever the shape of the piece it stands in; only a table with kernels
// of its own for few tokens has two ways, of which their number decides.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "quant_blocks.h"

namespace yivl {

// Attention of the query heads that share one KV head. Query row r of [0, T * group) is head r % group of token
// r / group.
struct AttentionPiece {
    const float* q;  // token 0, first head of the group; heads lie side by side
    int64_t q_stride;
    float* out;  // as q
    int64_t out_stride;
    const float* k;  // key 0, this KV head
    int64_t k_stride;
    const float* v;
    int64_t v_stride;
    int64_t head_dim;
    int64_t group;        // query heads of the KV head
    int64_t n_keys;       // S
    int64_t first_limit;  // keys that token 0 sees; each later token sees one more. Not causal: n_keys
    bool causal;
    int64_t row_begin, row_end;  // the query rows of this piece

    int64_t visible_keys(int64_t row) const {
        const int64_t seen = first_limit + row / group;
        return causal && seen < n_keys ? seen : n_keys;
    }
};

// Attention on a matrix unit that rounds its operands. Keys and values are brought into its form once for all pieces.
struct PackedAttention {
    int64_t key_block;  // keys that are packed together
    // Bytes of the packed keys and values of one KV head, a multiple of 64.
    int64_t (*packed_bytes)(int64_t n_keys, int64_t head_dim);
    // Packs block `block` of the piece's keys and their values, whatever its rows.
    void (*pack)(std::byte* packed, const AttentionPiece& piece, int64_t block);
    // Bytes of scratch, aligned to 64.
    int64_t (*scratch_bytes)(int64_t head_dim);
    // `stop` is polled every few rows; the output is not complete if it said true.
    void (*attention)(const AttentionPiece& piece, const std::byte* packed, std::byte* scratch,
                      bool (*stop)(const void*), const void* stop_arg);
};

// x of a product of packed operands.
struct PackedInput {
    const float* x;  // of the first token of the group that is packed
    int64_t x_stride;
    int64_t n_tokens;  // of all
    int64_t cols;
    int order;  // of the columns, as the type of the weights wants it
};

// A piece of such a product: some rows of the weights for all tokens.
struct PackedPiece {
    float* y;  // token 0, first of the piece's outputs
    int64_t y_stride;
    bool add;  // to y
    const std::byte* x;
    int64_t n_tokens;
    WeightType type;
    const std::byte* w;  // first row of the piece
    int64_t row_bytes;
    int64_t n_rows;
    int64_t cols;
    const float* bias;  // of the first row; null: none
    // Called for outputs [row, row + n) of a token when they are complete and a near cache holds them; or null.
    void (*finish)(const void* arg, int64_t token, int64_t row, int64_t n);
    const void* finish_arg;

    void finished(int64_t token, int64_t row, int64_t n) const {
        if (finish != nullptr) finish(finish_arg, token, row, n);
    }
};

// Products, whose operands are brought into another form first.
struct PackedKernels {
    static constexpr int kOrders = 3;

    // Tokens that are packed together.
    int64_t tokens;
    // Fewer are left to Kernels::few, and to attention in float32.
    int64_t least_tokens = 1;
    // In what order of columns x is packed for weights of this type, [0, kOrders); -1: not for this type.
    int (*order)(WeightType type);
    // Bytes of packed x, to be aligned to 64.
    int64_t (*packed_bytes)(int64_t n_tokens, int64_t cols);
    // Packs group `group` of the tokens.
    void (*pack)(std::byte* dst, const PackedInput& x, int64_t group);
    // Bytes of scratch, aligned to 64, for a piece of n_rows.
    int64_t (*scratch_bytes)(int64_t n_tokens, int64_t n_rows, int64_t cols);
    // `stop` is polled every few milliseconds; the output is not complete if it said true.
    void (*linear)(const PackedPiece& piece, std::byte* scratch, bool (*stop)(const void*), const void* stop_arg);
    // For benchmarks: `rounds` of multiply-adds on registers; returns how many operations that was.
    int64_t (*multiply_add)(int64_t rounds);
};

struct Kernels {
    const char* name;
    const char* variant;  // what it uses beyond what all CPUs have that can take it; "": nothing

    // dst[0..n) = the n weights that begin at `src`, bit for bit as dequantize_row.
    void (*dequantize)(WeightType type, const std::byte* src, float* dst, int64_t n);

    void (*layer_norm)(float* y, const float* x, const float* weight, const float* bias, float eps, int64_t n);
    void (*rms_norm)(float* y, const float* x, const float* weight, float eps, int64_t n);
    void (*gelu)(float* x, int64_t n);
    void (*swiglu)(float* gate, const float* up, int64_t n);
    void (*add)(float* y, const float* x, int64_t n);
    // Rotates the n / 2 adjacent pairs of x; cos_sin holds cos and sin of each pair side by side.
    void (*rotate)(float* x, const float* cos_sin, int64_t n);

    // Floats of scratch, aligned to 64 bytes, that attention needs for `rows` query rows.
    int64_t (*attention_scratch)(int64_t rows, int64_t head_dim);
    // `stop` is polled between blocks of keys; the output is not complete if it said true.
    void (*attention)(const AttentionPiece& piece, float* scratch, bool (*stop)(const void*), const void* stop_arg);

    // For benchmarks: a read of n floats. `sink` keeps the compiler from leaving it out.
    void (*read)(const float* x, int64_t n, float* sink);

    // Products with weights of all types.
    const PackedKernels* floats;
    // In place of those for the types that it takes; null: none.
    const PackedKernels* packed;
    // In place of `packed` for fewer tokens than its least; null: none.
    const PackedKernels* few;
    // For attention of at least as many tokens as `packed` takes, where it may be rounded; null: none.
    const PackedAttention* packed_attention;
};

}  // namespace yivl

// The table of the kernels that kernels_body.h made in a namespace, and those for packed operands.
#define YIVL_KERNELS(isa, beyond, space, packed_kernels) \
    {                                                    \
        .name = isa,                                     \
        .variant = beyond,                               \
        .dequantize = space::dequantize,                 \
        .layer_norm = space::layer_norm,                 \
        .rms_norm = space::rms_norm,                     \
        .gelu = space::gelu,                             \
        .swiglu = space::swiglu,                         \
        .add = space::add_rows,                          \
        .rotate = space::rotate,                         \
        .attention_scratch = space::attention_scratch,   \
        .attention = space::attention,                   \
        .read = space::read,                             \
        .floats = &space::kFloatKernels,                 \
        .packed = packed_kernels,                        \
        .few = nullptr,                                  \
        .packed_attention = nullptr,                     \
    }
