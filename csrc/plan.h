// How much memory a model takes, part by part, and how many of the decoder's layers a device has room for: known from
// the headers of its files, before anything is loaded.
#pragma once

#include <cstdint>
#include <vector>

#include "config.h"
#include "gguf.h"

namespace yivl {

// A device that has no room for all of the decoder runs its last layers, the output head, and what belongs to the
// picture; the CPU runs the first layers. The embedding table is where the first layer is. All sizes are in bytes.
struct MemoryPlan {
    int64_t table = 0;            // weights of the embedding
    int64_t head = 0;             // weights of the output; if the table is that matrix, too, it counts here only
    std::vector<int64_t> layers;  // weights of each
    int64_t vision_weights = 0;   // of vision tower and projector

    // Of one session.
    int64_t layer_kv = 0;  // keys and values of one layer
    int64_t decoder_activations = 0;
    int64_t vision_activations = 0;

    int64_t n_layers() const { return static_cast<int64_t>(layers.size()); }
    // What a device holds that runs the last `n_gpu_layers`, 0 to n_layers(); others throw std::invalid_argument.
    int64_t weights_on_device(int64_t n_gpu_layers) const;
    int64_t kv_on_device(int64_t n_gpu_layers) const;
    // Altogether, with what the backend needs beside the model.
    int64_t on_device(int64_t n_gpu_layers) const;
    // Of the layers, as many as fit into so much memory; -1 if what must be there without any does not.
    int64_t most_layers(int64_t free_bytes) const;

private:
    void check(int64_t n_gpu_layers) const;
};

// `vision` is the mmproj file, the text file itself in the single layout, or null; n_ctx 0: the model's context length.
// Throws std::invalid_argument for an n_ctx out of range.
MemoryPlan plan_memory(const GgufFile& text, const GgufFile* vision, const Config& config, int64_t n_ctx);

}  // namespace yivl
