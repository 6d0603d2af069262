#include "state.h"

#include <new>
#include <string>

namespace yivl {

namespace {

constexpr size_t kAlignment = 64;  // a cache line, and the widest vector

class AllocationError : public std::bad_alloc {
public:
    explicit AllocationError(size_t bytes)
        : message_("cannot allocate " + std::to_string(bytes) +
                   " bytes of activations or KV cache; a smaller n_ctx needs less") {}
    const char* what() const noexcept override { return message_.c_str(); }

private:
    std::string message_;
};

}  // namespace

Buffer::Buffer(int64_t rows, int64_t cols) : rows_(rows), cols_(cols) {
    const size_t bytes = static_cast<size_t>(rows) * static_cast<size_t>(cols) * sizeof(float);
    const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    data_.reset(static_cast<float*>(std::aligned_alloc(kAlignment, rounded > 0 ? rounded : kAlignment)));
    if (data_ == nullptr) throw AllocationError(rounded);
}

VitState::VitState(const VitConfig& c, int64_t decoder_width)
    : patches(c.n_patches(), c.patch_pixels()),
      x(c.n_patches() + 1, c.width),
      h(c.n_patches() + 1, c.width),
      q(c.n_patches() + 1, c.width),
      k(c.n_patches() + 1, c.width),
      v(c.n_patches() + 1, c.width),
      attn(c.n_patches() + 1, c.width),
      mlp(c.n_patches() + 1, c.mlp_width),
      projected(c.n_patches(), decoder_width),
      embeddings(c.n_patches(), decoder_width) {}

int64_t VitState::bytes(const VitConfig& c, int64_t decoder_width) {
    const int64_t rows = c.n_patches() + 1;
    const int64_t floats = c.n_patches() * (c.patch_pixels() + 2 * decoder_width) + rows * (6 * c.width + c.mlp_width);
    return floats * static_cast<int64_t>(sizeof(float));
}

DecoderState::DecoderState(const DecoderConfig& c, int64_t n_ctx, int64_t batch)
    : n_ctx(n_ctx),
      batch(batch),
      x(batch, c.width),
      h(batch, c.width),
      q(batch, c.q_width()),
      attn(batch, c.q_width()),
      gate(batch, c.mlp_width),
      logits(1, c.vocab_size) {
    for (int64_t i = 0; i < c.n_layers; ++i) {
        k_cache.emplace_back(n_ctx, c.kv_width());
        v_cache.emplace_back(n_ctx, c.kv_width());
    }
}

int64_t DecoderState::kv_bytes(const DecoderConfig& c, int64_t n_ctx) {
    return 2 * c.n_layers * n_ctx * c.kv_width() * static_cast<int64_t>(sizeof(float));
}

int64_t DecoderState::activation_bytes(const DecoderConfig& c, int64_t batch) {
    const int64_t floats = batch * (2 * c.width + 2 * c.q_width() + c.mlp_width) + c.vocab_size;
    return floats * static_cast<int64_t>(sizeof(float));
}

}  // namespace yivl
