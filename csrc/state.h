// Every activation and the KV cache of one session, allocated once. Sizes follow from the config alone, so that what a
// session will need is known before anything is loaded.
#pragma once

#include "buffer.h"
#include "config.h"

namespace yivl {

struct VitState {
    VitState(Backend& backend, const VitConfig& c, int64_t decoder_width);

    Buffer patches;     // (N, 3 P P)
    Buffer x;           // (N + 1, W) residual stream, class row first
    Buffer h;           // (N + 1, W) normalised
    Buffer q, k, v;     // (N + 1, W)
    Buffer attn;        // (N + 1, W)
    Buffer mlp;         // (N + 1, F)
    Buffer projected;   // (N, D)
    Buffer embeddings;  // (N, D) what the decoder reads

    static int64_t bytes(const VitConfig& c, int64_t decoder_width);
};

// The layers [begin, end) of a decoder.
struct Layers {
    int64_t begin, end;

    int64_t count() const { return end - begin; }
};

// Of the layers that one backend runs.
struct DecoderState {
    // `batch`: how many positions are computed at once in prefill.
    DecoderState(Backend& backend, const DecoderConfig& c, Layers layers, int64_t n_ctx, int64_t batch);

    Layers layers;
    int64_t n_ctx;
    int64_t batch;
    Buffer x;                 // (B, D) residual stream
    Buffer h;                 // (B, D) normalised
    Buffer q;                 // (B, H hd)
    Buffer attn;              // (B, H hd)
    Buffer gate;              // (B, F)
    Buffer logits;            // (1, V)
    int64_t n_kv_heads;       // K
    bool by_head;             // in the cache each layer is (K, n_ctx, hd)
    Buffer k_cache, v_cache;  // (layers n_ctx, K hd)

    // Of one of the layers: (n_ctx, K hd).
    Heads keys(int64_t layer) const { return of_layer(k_cache, layer); }
    Heads values(int64_t layer) const { return of_layer(v_cache, layer); }

    static int64_t kv_bytes(const DecoderConfig& c, int64_t n_layers, int64_t n_ctx);
    static int64_t activation_bytes(const DecoderConfig& c, int64_t batch);

private:
    Heads of_layer(const Buffer& cache, int64_t layer) const;
};

// Positions computed at once when nothing else is asked for: a picture with its question in one go (1024 image tokens,
// system text, question), since every pass unpacks all weights once.
inline constexpr int64_t kDefaultBatch = 1152;

// Positions of a session; 0: the model's context length. Throws std::invalid_argument for more than that.
int64_t checked_context(const DecoderConfig& c, int64_t n_ctx);

}  // namespace yivl
