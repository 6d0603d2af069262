#include "decoder.h"

namespace yivl {

namespace {

// x = x + W_o attention(rope(W_q h), rope(W_k h), W_v h), keys and values going straight into the cache
void self_attention(const DecoderLayerWeights& w, const DecoderConfig& c, DecoderState& s, int64_t layer, int64_t T,
                    int64_t first, Ops& ops) {
    const Mat h = s.h.rows(T);
    const Mat q = s.q.rows(T);
    const Mat k = s.keys(layer);
    const Mat v = s.values(layer);
    const Rotation rope{.head_dim = c.head_dim, .first = first, .theta = c.rope_theta};

    ops.linear(h, {{.y = q, .w = w.q, .rotation = rope},
                   {.y = k, .w = w.k, .row = first, .rotation = rope},
                   {.y = v, .w = w.v, .row = first}});
    ops.attention(s.attn.rows(T), q, k.row_range(0, first + T), v.row_range(0, first + T),
                  {.n_heads = c.n_heads,
                   .n_kv_heads = c.n_kv_heads,
                   .head_dim = c.head_dim,
                   .causal = true,
                   .rounded = w.attn_output.type != WeightType::F32});
    ops.linear(s.attn.rows(T), {{.y = s.x.rows(T), .w = w.attn_output, .then = Then::add}});
}

}  // namespace

void decoder_forward(const DecoderWeights& w, const DecoderConfig& c, DecoderState& s, int64_t T, int64_t first,
                     Ops& ops, const std::function<void(int64_t)>& on_layer) {
    const Mat x = s.x.rows(T);
    const Mat h = s.h.rows(T);
    const Mat gate = s.gate.rows(T);

    for (int64_t i = s.layers.begin; i < s.layers.end; ++i) {
        const DecoderLayerWeights& layer = w.layers[i];
        // x = x + attention(RMSNorm(x))
        ops.rms_norm(h, x, layer.attn_norm, c.norm_eps);
        self_attention(layer, c, s, i, T, first, ops);
        // x = x + W_down (silu(W_gate h) * W_up h), h = RMSNorm(x)
        ops.rms_norm(h, x, layer.ffn_norm, c.norm_eps);
        ops.gated_linear(gate, h, layer.gate, layer.up);
        ops.linear(gate, {{.y = x, .w = layer.down, .then = Then::add}});
        if (on_layer) on_layer(i + 1);
    }
}

void decoder_logits(const DecoderWeights& w, const DecoderConfig& c, DecoderState& s, int64_t row, Mat logits,
                    Ops& ops) {
    const Mat x = s.x.view().row_range(row, logits.rows);
    const Mat h = s.h.rows(logits.rows);
    ops.rms_norm(h, x, w.norm, c.norm_eps);
    ops.linear(h, {{logits, w.output}});
}

}  // namespace yivl
