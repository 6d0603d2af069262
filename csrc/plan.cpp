#include "plan.h"

#include <algorithm>
#include <charconv>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "ops.h"
#include "state.h"

namespace yivl {

namespace {

// N of "<prefix>N.rest"; -1 of another name.
int64_t block_number(std::string_view name, std::string_view prefix) {
    if (!name.starts_with(prefix)) return -1;
    int64_t number = -1;
    const char* end = name.data() + name.size();
    const auto [rest, error] = std::from_chars(name.data() + prefix.size(), end, number);
    return error == std::errc{} && rest != end && *rest == '.' ? number : -1;
}

}  // namespace

void MemoryPlan::check(int64_t n_gpu_layers) const {
    if (n_gpu_layers >= 0 && n_gpu_layers <= n_layers()) return;
    throw std::invalid_argument("n_gpu_layers: expected 0 to " + std::to_string(n_layers()) + ", found " +
                                std::to_string(n_gpu_layers));
}

int64_t MemoryPlan::weights_on_device(int64_t n_gpu_layers) const {
    check(n_gpu_layers);
    int64_t bytes = vision_weights + head + (n_gpu_layers == n_layers() ? table : 0);
    for (int64_t i = n_layers() - n_gpu_layers; i < n_layers(); ++i) bytes += layers[static_cast<size_t>(i)];
    return bytes;
}

int64_t MemoryPlan::kv_on_device(int64_t n_gpu_layers) const {
    check(n_gpu_layers);
    return n_gpu_layers * layer_kv;
}

int64_t MemoryPlan::on_device(int64_t n_gpu_layers) const {
    return weights_on_device(n_gpu_layers) + kv_on_device(n_gpu_layers) + decoder_activations + vision_activations +
           kDeviceReserve;
}

int64_t MemoryPlan::most_layers(int64_t free_bytes) const {
    int64_t n = n_layers();
    while (n >= 0 && on_device(n) > free_bytes) --n;
    return n;
}

MemoryPlan plan_memory(const GgufFile& text, const GgufFile* vision, const Config& c, int64_t n_ctx) {
    n_ctx = checked_context(c.decoder, n_ctx);
    MemoryPlan plan;
    plan.layers.resize(static_cast<size_t>(c.decoder.n_layers));
    for (const GgufTensor& tensor : text.tensors()) {
        const int64_t bytes = placed_bytes(tensor.data.size());
        const int64_t layer = block_number(tensor.name, "blk.");
        if (layer >= 0 && layer < plan.n_layers()) plan.layers[static_cast<size_t>(layer)] += bytes;
        if (tensor.name == "token_embd.weight") plan.table += bytes;
        if (tensor.name.starts_with("output")) plan.head += bytes;
    }
    if (text.find_tensor("output.weight") == nullptr) plan.head += std::exchange(plan.table, 0);
    if (c.vit) {
        for (const GgufTensor& tensor : vision->tensors()) {
            const bool runs = block_number(tensor.name, "v.blk.") < c.vit->n_blocks;
            const bool sees = tensor.name.starts_with("v.") || tensor.name.starts_with("mm.");
            if (runs && sees) plan.vision_weights += placed_bytes(tensor.data.size());
        }
        plan.vision_activations = VitState::bytes(*c.vit, c.decoder.width);
    }
    plan.layer_kv = DecoderState::kv_bytes(c.decoder, 1, n_ctx);
    plan.decoder_activations = DecoderState::activation_bytes(c.decoder, std::min(kDefaultBatch, n_ctx));
    return plan;
}

}  // namespace yivl
