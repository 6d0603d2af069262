#include "decoder.h"

namespace yivl {

namespace {

// x = x + W_o attention(rope(W_q h), rope(W_k h), W_v h), h = RMSNorm(x), keys and values going straight into the
// cache; of the T rows x is the last ones
void self_attention(const DecoderLayerWeights& w, const DecoderConfig& c, DecoderState& s, int64_t layer, int64_t T,
                    int64_t first, Mat x, Ops& ops) {
    const Input h{s.x.rows(T), {.weight = w.attn_norm, .eps = c.norm_eps}, s.h.rows(T)};
    const Mat q = s.q.rows(x.rows);
    const Heads k = s.keys(layer);
    const Heads v = s.values(layer);
    const auto rope = [&](int64_t position) {
        return Rotation{.head_dim = c.head_dim, .first = position, .theta = c.rope_theta};
    };

    const Product query{.y = q, .w = w.q, .rotation = rope(first + T - x.rows)};
    const Product key{.y = k, .w = w.k, .row = first, .rotation = rope(first)};
    const Product value{.y = v, .w = w.v, .row = first};
    if (x.rows == T) {
        ops.linear(h, {query, key, value});
    } else {
        ops.linear(h, {key, value});
        if (x.rows == 0) return;
        ops.linear(h.row_range(T - x.rows, x.rows), {query});
    }
    ops.attention(s.attn.rows(x.rows), q, k.row_range(0, first + T), v.row_range(0, first + T),
                  {.n_heads = c.n_heads,
                   .n_kv_heads = c.n_kv_heads,
                   .head_dim = c.head_dim,
                   .causal = true,
                   .rounded = w.attn_output.type != WeightType::F32});
    ops.linear(s.attn.rows(x.rows), {{.y = x, .w = w.attn_output, .then = Then::add}});
}

}  // namespace

void decoder_forward(const DecoderWeights& w, const DecoderConfig& c, DecoderState& s, int64_t T, int64_t first,
                     int64_t n_wanted, Ops& ops, const std::function<void(int64_t)>& on_layer) {
    for (int64_t i = s.layers.begin; i < s.layers.end; ++i) {
        const DecoderLayerWeights& layer = w.layers[i];
        const int64_t n = i + 1 == c.n_layers ? n_wanted : T;
        const Mat x = s.x.view().row_range(T - n, n);
        self_attention(layer, c, s, i, T, first, x, ops);
        if (n > 0) {
            // x = x + W_down (silu(W_gate h) * W_up h), h = RMSNorm(x)
            const Input h{x, {.weight = layer.ffn_norm, .eps = c.norm_eps}, s.h.rows(n)};
            const Mat gate = s.gate.rows(n);
            ops.gated_linear(gate, h, layer.gate, layer.up);
            ops.linear(gate, {{.y = x, .w = layer.down, .then = Then::add}});
        }
        if (on_layer) on_layer(i + 1);
    }
}

void decoder_logits(const DecoderWeights& w, const DecoderConfig& c, DecoderState& s, int64_t row, Mat logits,
                    Ops& ops) {
    const Mat x = s.x.view().row_range(row, logits.rows);
    ops.linear({x, {.weight = w.norm, .eps = c.norm_eps}, s.h.rows(logits.rows)}, {{logits, w.output}});
}

}  // namespace yivl
