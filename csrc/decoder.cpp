#include "decoder.h"

namespace yivl {

namespace {

// h = W_o attention(rope(W_q h), rope(W_k h), W_v h), keys and values going straight into the cache
void self_attention(const DecoderLayerWeights& w, const DecoderConfig& c, DecoderState& s, int64_t layer, int64_t T,
                    int64_t first, Ops& ops) {
    const Mat h = s.h.rows(T);
    const Mat q = s.q.rows(T);
    const Mat k = s.k_cache[layer].view();
    const Mat v = s.v_cache[layer].view();
    const Mat new_k = k.row_range(first, T);

    ops.linear(q, h, w.q);
    ops.linear(new_k, h, w.k);
    ops.linear(v.row_range(first, T), h, w.v);
    ops.rope(q, c.head_dim, first, c.rope_theta);
    ops.rope(new_k, c.head_dim, first, c.rope_theta);
    ops.attention(s.attn.rows(T), q, k.row_range(0, first + T), v.row_range(0, first + T),
                  {.n_heads = c.n_heads, .n_kv_heads = c.n_kv_heads, .head_dim = c.head_dim, .causal = true});
    ops.linear(h, s.attn.rows(T), w.attn_output);
}

}  // namespace

void decoder_forward(const DecoderWeights& w, const DecoderConfig& c, DecoderState& s, int64_t T, int64_t first,
                     Ops& ops, const std::function<void(int64_t)>& on_layer) {
    const Mat x = s.x.rows(T);
    const Mat h = s.h.rows(T);
    const Mat gate = s.gate.rows(T);
    const Mat up = s.up.rows(T);

    for (int64_t i = 0; i < c.n_layers; ++i) {
        const DecoderLayerWeights& layer = w.layers[i];
        // x = x + attention(RMSNorm(x))
        ops.rms_norm(h, x, layer.attn_norm, c.norm_eps);
        self_attention(layer, c, s, i, T, first, ops);
        ops.add(x, h);
        // x = x + W_down (silu(W_gate h) * W_up h), h = RMSNorm(x)
        ops.rms_norm(h, x, layer.ffn_norm, c.norm_eps);
        ops.linear(gate, h, layer.gate);
        ops.linear(up, h, layer.up);
        ops.swiglu(gate, up);
        ops.linear(h, gate, layer.down);
        ops.add(x, h);
        if (on_layer) on_layer(i + 1);
    }
}

void decoder_logits(const DecoderWeights& w, const DecoderConfig& c, DecoderState& s, int64_t row, Mat logits,
                    Ops& ops) {
    const Mat x = s.x.view().row_range(row, logits.rows);
    const Mat h = s.h.rows(logits.rows);
    ops.rms_norm(h, x, w.norm, c.norm_eps);
    ops.linear(logits, h, w.output);
}

}  // namespace yivl
