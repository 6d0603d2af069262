// One struct per stage, bound to the tensors of the file; every shape is checked here.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "buffer.h"
#include "config.h"
#include "gguf.h"

namespace yivl {

struct LayerNormWeights {
    Vec weight;  // (D)
    Vec bias;    // (D)

    Norm with(float eps) const { return {weight, bias, eps}; }
};

struct LinearWeights {
    Weight weight;  // (O, I)
    Vec bias;       // (O)
};

struct VitBlockWeights {
    LayerNormWeights ln1;
    LinearWeights q, k, v, out;  // (W, W)
    LayerNormWeights ln2;
    LinearWeights fc1;  // (F, W)
    LinearWeights fc2;  // (W, F)
};

struct VitWeights {
    Weight patch_embedding;       // (W, 3 P P)
    Vec class_embedding;          // (W)
    ConstMat position_embedding;  // (N + 1, W)
    LayerNormWeights pre_ln;
    std::vector<VitBlockWeights> blocks;
};

struct ProjectorWeights {
    LinearWeights linear1;  // (D, W)
    LayerNormWeights norm1;
    LinearWeights linear2;  // (D, D)
    LayerNormWeights norm2;
};

struct DecoderLayerWeights {
    Vec attn_norm;       // (D)
    Weight q;            // (H hd, D), rows in adjacent-pair order
    Weight k;            // (K hd, D), rows in adjacent-pair order
    Weight v;            // (K hd, D)
    Weight attn_output;  // (D, H hd)
    Vec ffn_norm;        // (D)
    Weight gate, up;     // (F, D)
    Weight down;         // (D, F)
};

struct DecoderWeights {
    Weight token_embedding;  // (V, D)
    std::vector<DecoderLayerWeights> layers;
    Vec norm;       // (D)
    Weight output;  // (V, D)
};

struct Weights {
    std::shared_ptr<const GgufFile> text_file;           // keeps the mapped matrices alive
    std::shared_ptr<const GgufFile> vision_file;         // the same file in the single layout; null without vision
    std::vector<Buffer> vectors;                         // norms, biases and tables, widened to float32
    std::map<const std::byte*, std::string_view> names;  // of the tensors, by where the backend has them

    DecoderWeights decoder;
    std::optional<VitWeights> vit;
    std::optional<ProjectorWeights> projector;
};

// Where weights are placed: the embedding table and the first layers of the decoder can be elsewhere than the rest.
struct WeightPlaces {
    Backend& backend;
    Backend* cpu = nullptr;
    int64_t n_cpu_layers = 0;
};

// Finds and checks every tensor that `config` calls for, and places it where it is computed with; the small ones are
// widened. Throws ModelFileError naming file, tensor, expected and found, and what the backends throw.
Weights bind_weights(std::shared_ptr<const GgufFile> text, std::shared_ptr<const GgufFile> vision, const Config& config,
                     const WeightPlaces& places, Control& control);

}  // namespace yivl
