#include "weights.h"

#include <array>
#include <string>

namespace yivl {

namespace {

class Binder {
public:
    Binder(const GgufFile& file, Backend& backend, Control& control, Weights& weights)
        : file_(file), backend_(backend), control_(control), weights_(weights), ops_(backend.ops(control)) {}

    const GgufTensor& tensor(const std::string& name) const {
        const GgufTensor* found = file_.find_tensor(name);
        if (found == nullptr) file_.fail("tensor '" + name + "' is missing");
        return *found;
    }

    bool has(const std::string& name) const { return file_.find_tensor(name) != nullptr; }

    // The tensor read as (rows, cols), whatever its number of dimensions.
    Weight matrix(const std::string& name, std::span<const int64_t> shape) {
        const GgufTensor& t = tensor(name);
        if (!std::equal(t.shape.begin(), t.shape.end(), shape.begin(), shape.end())) {
            file_.fail("tensor '" + name + "': expected shape " + shape_text(shape) + ", found " + shape_text(t.shape));
        }
        int64_t cols = 1;
        for (const int64_t n : shape.subspan(1)) cols *= n;
        return {t.type, shape[0], cols, place(t)};
    }
    Weight matrix(const std::string& name, int64_t rows, int64_t cols) { return matrix(name, std::array{rows, cols}); }

    // A small tensor, widened to float32 and owned by us.
    ConstMat table(const std::string& name, std::span<const int64_t> shape) {
        const GgufTensor& t = tensor(name);
        switch (t.type) {
            case WeightType::F32:
            case WeightType::F16:
            case WeightType::BF16: break;
            default:
                file_.fail("tensor '" + name + "': expected type F32, F16 or BF16, found " +
                           std::string(type_info(t.type).name));
        }
        const Weight w = matrix(name, shape);
        const Weight flat{w.type, 1, w.rows * w.cols, w.data};
        const Mat values = weights_.vectors.emplace_back(backend_, 1, flat.cols).view();
        const int32_t first_row = 0;
        ops_->embed(values, flat, {&first_row, 1});
        return {values.data, w.rows, w.cols};
    }
    Vec vector(const std::string& name, int64_t size) {
        const ConstMat values = table(name, std::array{size});
        return {values.data, static_cast<size_t>(size)};
    }

    LayerNormWeights layer_norm(const std::string& name, int64_t size) {
        return {vector(name + ".weight", size), vector(name + ".bias", size)};
    }
    LinearWeights linear(const std::string& name, int64_t rows, int64_t cols) {
        return {matrix(name + ".weight", rows, cols), vector(name + ".bias", rows)};
    }

private:
    const std::byte* place(const GgufTensor& t) {
        const auto [at, is_new] = placed_.try_emplace(t.name, nullptr);  // an output head can be the embedding's table
        if (is_new) {
            at->second = backend_.place(t.data, control_);
            weights_.names.emplace(at->second, t.name);
        }
        return at->second;
    }

    const GgufFile& file_;
    Backend& backend_;
    Control& control_;
    Weights& weights_;
    std::unique_ptr<Ops> ops_;
    std::map<std::string_view, const std::byte*> placed_;
};

// `first` binds the embedding table and the first n_first layers, `last` the rest.
DecoderWeights bind_decoder(Binder& first, int64_t n_first, Binder& last, const DecoderConfig& c) {
    DecoderWeights w;
    w.token_embedding = first.matrix("token_embd.weight", c.vocab_size, c.width);
    for (int64_t i = 0; i < c.n_layers; ++i) {
        Binder& bind = i < n_first ? first : last;
        const std::string blk = "blk." + std::to_string(i) + ".";
        DecoderLayerWeights& layer = w.layers.emplace_back();
        layer.attn_norm = bind.vector(blk + "attn_norm.weight", c.width);
        layer.q = bind.matrix(blk + "attn_q.weight", c.q_width(), c.width);
        layer.k = bind.matrix(blk + "attn_k.weight", c.kv_width(), c.width);
        layer.v = bind.matrix(blk + "attn_v.weight", c.kv_width(), c.width);
        layer.attn_output = bind.matrix(blk + "attn_output.weight", c.width, c.q_width());
        layer.ffn_norm = bind.vector(blk + "ffn_norm.weight", c.width);
        layer.gate = bind.matrix(blk + "ffn_gate.weight", c.mlp_width, c.width);
        layer.up = bind.matrix(blk + "ffn_up.weight", c.mlp_width, c.width);
        layer.down = bind.matrix(blk + "ffn_down.weight", c.width, c.mlp_width);
    }
    w.norm = last.vector("output_norm.weight", c.width);
    const char* output = last.has("output.weight") ? "output.weight" : "token_embd.weight";
    w.output = last.matrix(output, c.vocab_size, c.width);
    return w;
}

VitWeights bind_vit(Binder& bind, const VitConfig& c) {
    VitWeights w;
    w.patch_embedding =
        bind.matrix("v.patch_embd.weight", std::array<int64_t, 4>{c.width, 3, c.patch_size, c.patch_size});
    w.class_embedding = bind.vector("v.class_embd", c.width);
    w.position_embedding = bind.table("v.position_embd.weight", std::array{c.n_patches() + 1, c.width});
    w.pre_ln = bind.layer_norm("v.pre_ln", c.width);
    for (int64_t i = 0; i < c.n_blocks; ++i) {
        const std::string blk = "v.blk." + std::to_string(i) + ".";
        VitBlockWeights& block = w.blocks.emplace_back();
        block.ln1 = bind.layer_norm(blk + "ln1", c.width);
        block.q = bind.linear(blk + "attn_q", c.width, c.width);
        block.k = bind.linear(blk + "attn_k", c.width, c.width);
        block.v = bind.linear(blk + "attn_v", c.width, c.width);
        block.out = bind.linear(blk + "attn_out", c.width, c.width);
        block.ln2 = bind.layer_norm(blk + "ln2", c.width);
        // Older scripts called fc1 "ffn_down": the first layer is the one with as many outputs as the MLP is wide.
        const bool swapped =
            c.mlp_width != c.width && bind.tensor(blk + "ffn_down.weight").shape.front() == c.mlp_width;
        block.fc1 = bind.linear(blk + (swapped ? "ffn_down" : "ffn_up"), c.mlp_width, c.width);
        block.fc2 = bind.linear(blk + (swapped ? "ffn_up" : "ffn_down"), c.width, c.mlp_width);
    }
    return w;
}

ProjectorWeights bind_projector(Binder& bind, const VitConfig& vit, int64_t decoder_width) {
    return {
        .linear1 = bind.linear("mm.0", decoder_width, vit.width),
        .norm1 = bind.layer_norm("mm.1", decoder_width),
        .linear2 = bind.linear("mm.3", decoder_width, decoder_width),
        .norm2 = bind.layer_norm("mm.4", decoder_width),
    };
}

}  // namespace

Weights bind_weights(std::shared_ptr<const GgufFile> text, std::shared_ptr<const GgufFile> vision, const Config& config,
                     const WeightPlaces& places, Control& control) {
    Weights w;
    Binder decoder(*text, places.backend, control, w);
    if (places.cpu == nullptr) {
        w.decoder = bind_decoder(decoder, 0, decoder, config.decoder);
    } else {
        Binder on_cpu(*text, *places.cpu, control, w);
        w.decoder = bind_decoder(on_cpu, places.n_cpu_layers, decoder, config.decoder);
    }
    if (config.vit) {
        Binder tower(*vision, places.backend, control, w);
        w.vit = bind_vit(tower, *config.vit);
        w.projector = bind_projector(tower, *config.vit, config.decoder.width);
    }
    w.text_file = std::move(text);
    w.vision_file = std::move(vision);
    return w;
}

}  // namespace yivl
