// What a model file says of its own sizes. Nothing about the model is hard-coded elsewhere.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "gguf.h"
#include "image.h"

namespace yivl {

struct VitConfig {
    int64_t image_size;  // S
    int64_t patch_size;  // P
    int64_t width;       // W
    int64_t n_heads;
    int64_t head_dim;
    int64_t mlp_width;
    int64_t n_blocks;  // that run: 31 of ViT-H's 32
    float norm_eps;
    float projector_norm_eps;

    int64_t grid() const { return image_size / patch_size; }
    int64_t n_patches() const { return grid() * grid(); }                 // N
    int64_t patch_pixels() const { return 3 * patch_size * patch_size; }  // inputs of the patch embedding
};

struct DecoderConfig {
    int64_t width;       // D
    int64_t n_layers;    // L
    int64_t n_heads;     // H
    int64_t n_kv_heads;  // K
    int64_t head_dim;    // hd
    int64_t mlp_width;   // F
    int64_t vocab_size;  // V
    int64_t context_length;
    float rope_theta;
    float norm_eps;

    int64_t q_width() const { return n_heads * head_dim; }
    int64_t kv_width() const { return n_kv_heads * head_dim; }
};

struct PromptConfig {
    std::string system;              // default system text
    std::vector<std::string> stops;  // texts that end a reply
};

struct Config {
    std::string name;  // empty if the file has none
    DecoderConfig decoder{};
    std::optional<VitConfig> vit;  // none in a text model opened without its mmproj
    PreprocessConfig preprocess;
    PromptConfig prompt;
    float temperature = 0.2F;
    int64_t max_tokens = 1024;
};

// Reads the keys of docs/file-format.md. `vision` is the mmproj file, the text file itself in the single layout, or
// null. Throws ModelFileError naming file, key, expected and found.
Config read_config(const GgufFile& text, const GgufFile* vision);
// What an mmproj file says without its text model: everything but `vit` and `preprocess` keeps its default.
Config read_vision_config(const GgufFile& vision);

}  // namespace yivl
