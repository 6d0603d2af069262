#include "state.h"

#include <stdexcept>
#include <string>

namespace yivl {

VitState::VitState(Backend& backend, const VitConfig& c, int64_t decoder_width)
    : patches(backend, c.n_patches(), c.patch_pixels()),
      x(backend, c.n_patches() + 1, c.width),
      h(backend, c.n_patches() + 1, c.width),
      q(backend, c.n_patches() + 1, c.width),
      k(backend, c.n_patches() + 1, c.width),
      v(backend, c.n_patches() + 1, c.width),
      attn(backend, c.n_patches() + 1, c.width),
      mlp(backend, c.n_patches() + 1, c.mlp_width),
      projected(backend, c.n_patches(), decoder_width),
      embeddings(backend, c.n_patches(), decoder_width) {}

int64_t VitState::bytes(const VitConfig& c, int64_t decoder_width) {
    const int64_t rows = c.n_patches() + 1;
    const int64_t floats = c.n_patches() * (c.patch_pixels() + 2 * decoder_width) + rows * (6 * c.width + c.mlp_width);
    return floats * static_cast<int64_t>(sizeof(float));
}

DecoderState::DecoderState(Backend& backend, const DecoderConfig& c, Layers layers, int64_t n_ctx, int64_t batch)
    : layers(layers),
      n_ctx(n_ctx),
      batch(batch),
      x(backend, batch, c.width),
      h(backend, batch, c.width),
      q(backend, batch, c.q_width()),
      attn(backend, batch, c.q_width()),
      gate(backend, batch, c.mlp_width),
      logits(backend, 1, c.vocab_size),
      n_kv_heads(c.n_kv_heads),
      by_head(backend.cache_by_head()),
      k_cache(backend, layers.count() * n_ctx, c.kv_width()),
      v_cache(backend, layers.count() * n_ctx, c.kv_width()) {}

Heads DecoderState::of_layer(const Buffer& cache, int64_t layer) const {
    const Mat all = cache.view().row_range((layer - layers.begin) * n_ctx, n_ctx);
    return by_head ? Heads::by_head(Mat(all.data, n_kv_heads * n_ctx, all.cols / n_kv_heads), n_kv_heads)
                   : Heads(all, n_kv_heads);
}

int64_t DecoderState::kv_bytes(const DecoderConfig& c, int64_t n_layers, int64_t n_ctx) {
    return 2 * n_layers * n_ctx * c.kv_width() * static_cast<int64_t>(sizeof(float));
}

int64_t DecoderState::activation_bytes(const DecoderConfig& c, int64_t batch) {
    const int64_t floats = batch * (2 * c.width + 2 * c.q_width() + c.mlp_width) + c.vocab_size;
    return floats * static_cast<int64_t>(sizeof(float));
}

int64_t checked_context(const DecoderConfig& c, int64_t n_ctx) {
    if (n_ctx < 0 || n_ctx > c.context_length) {
        throw std::invalid_argument("n_ctx: expected 1 to the model's " + std::to_string(c.context_length) +
                                    ", found " + std::to_string(n_ctx));
    }
    return n_ctx > 0 ? n_ctx : c.context_length;
}

}  // namespace yivl
