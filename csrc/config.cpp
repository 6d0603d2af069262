#include "config.h"

#include <cmath>

namespace yivl {

namespace {

// The model's own limits are far below these; beyond them sizes could overflow or a file is nonsense.
constexpr int64_t kMaxWidth = 1 << 20;
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxContext = 1 << 24;
constexpr int64_t kFormatVersion = 1;

constexpr const char* kDefaultSystem =
    "This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI assistant. "
    "Read all the images carefully, and respond to the human's questions with informative, helpful, detailed and "
    "polite answers. 这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。"
    "仔细阅读所有的图像，并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。";

int64_t integer_in(const GgufFile& file, const char* key, int64_t low, int64_t high) {
    const int64_t value = file.integer(key);
    if (value < low || value > high) {
        file.fail(std::string(key) + ": expected an integer from " + std::to_string(low) + " to " +
                  std::to_string(high) + ", found " + std::to_string(value));
    }
    return value;
}

float positive(const GgufFile& file, const char* key) {
    const double number = file.number(key);
    const auto value = static_cast<float>(number);
    if (!(value > 0) || std::isinf(value)) {
        file.fail(std::string(key) + ": expected a positive number that 32 bits can hold, found " +
                  number_text(number));
    }
    return value;
}

DecoderConfig read_decoder(const GgufFile& file) {
    const std::string_view architecture = file.string("general.architecture");
    if (architecture != "llama") {
        file.fail("general.architecture: expected 'llama' (a Yi decoder), found " + quoted(architecture) +
                  (architecture == "clip" ? "; this is an mmproj file: give the text model first and this one as mmproj"
                                          : ""));
    }
    DecoderConfig c{};
    c.width = integer_in(file, "llama.embedding_length", 1, kMaxWidth);
    c.n_layers = integer_in(file, "llama.block_count", 1, kMaxLayers);
    c.mlp_width = integer_in(file, "llama.feed_forward_length", 1, kMaxWidth);
    c.n_heads = integer_in(file, "llama.attention.head_count", 1, c.width);
    c.n_kv_heads = file.has("llama.attention.head_count_kv")
                       ? integer_in(file, "llama.attention.head_count_kv", 1, c.n_heads)
                       : c.n_heads;
    if (c.n_heads % c.n_kv_heads != 0) {
        file.fail("llama.attention.head_count_kv: expected a divisor of the head count " + std::to_string(c.n_heads) +
                  ", found " + std::to_string(c.n_kv_heads));
    }
    if (c.width % c.n_heads != 0) {
        file.fail("llama.attention.head_count: expected a divisor of the width " + std::to_string(c.width) +
                  ", found " + std::to_string(c.n_heads));
    }
    c.head_dim = c.width / c.n_heads;
    if (c.head_dim % 2 != 0) file.fail("head dim: expected an even number, found " + std::to_string(c.head_dim));
    if (file.has("llama.rope.dimension_count") && file.integer("llama.rope.dimension_count") != c.head_dim) {
        file.fail("llama.rope.dimension_count: expected the head dim " + std::to_string(c.head_dim) + ", found " +
                  std::to_string(file.integer("llama.rope.dimension_count")));
    }
    for (const char* key : {"llama.rope.scaling.type", "llama.expert_count"}) {
        if (!file.has(key)) continue;
        const auto& value = file.metadata().find(key)->second;
        if (const auto* text = std::get_if<std::string_view>(&value); text && *text == "none") continue;
        if (const auto* count = std::get_if<uint64_t>(&value); count && *count == 0) continue;
        file.fail(std::string(key) + ": not part of Yi-VL's architecture");
    }
    c.context_length = integer_in(file, "llama.context_length", 1, kMaxContext);
    c.norm_eps = positive(file, "llama.attention.layer_norm_rms_epsilon");
    c.rope_theta = file.has("llama.rope.freq_base") ? positive(file, "llama.rope.freq_base") : 10000.0F;
    c.vocab_size = static_cast<int64_t>(file.strings("tokenizer.ggml.tokens").size());
    return c;
}

// A file of ours says how many blocks run. In files from elsewhere, 32 blocks are ViT-H whole, of which 31 run; any
// other count comes from a script that already left the unused block out.
int64_t blocks_run(const GgufFile& file) {
    const int64_t in_file = integer_in(file, "clip.vision.block_count", 1, kMaxLayers);
    if (file.has("yivl.vision.blocks_run")) return integer_in(file, "yivl.vision.blocks_run", 1, in_file);
    return in_file == 32 ? 31 : in_file;
}

VitConfig read_vit(const GgufFile& file) {
    if (!file.has("clip.has_vision_encoder") || !file.boolean("clip.has_vision_encoder")) {
        const std::string found = file.has("general.architecture")
                                      ? ", found architecture " + quoted(file.string("general.architecture"))
                                      : "";
        file.fail("expected a vision tower (clip.has_vision_encoder = true)" + found +
                  "; is this the mmproj file of the pair?");
    }
    const std::string_view projector = file.string("clip.projector_type");
    if (projector != "mlp" && projector != "mlp_norm") {
        file.fail("clip.projector_type: expected 'mlp', found " + quoted(projector));
    }
    VitConfig c{};
    c.image_size = integer_in(file, "clip.vision.image_size", 1, 1 << 14);
    c.patch_size = integer_in(file, "clip.vision.patch_size", 1, c.image_size);
    if (c.image_size % c.patch_size != 0) {
        file.fail("clip.vision.image_size: expected a multiple of the patch size " + std::to_string(c.patch_size) +
                  ", found " + std::to_string(c.image_size));
    }
    c.width = integer_in(file, "clip.vision.embedding_length", 1, kMaxWidth);
    c.mlp_width = integer_in(file, "clip.vision.feed_forward_length", 1, kMaxWidth);
    c.n_heads = integer_in(file, "clip.vision.attention.head_count", 1, c.width);
    if (c.width % c.n_heads != 0) {
        file.fail("clip.vision.attention.head_count: expected a divisor of the width " + std::to_string(c.width) +
                  ", found " + std::to_string(c.n_heads));
    }
    c.head_dim = c.width / c.n_heads;
    c.n_blocks = blocks_run(file);
    c.norm_eps = positive(file, "clip.vision.attention.layer_norm_epsilon");
    c.projector_norm_eps =
        file.has("yivl.vision.projector_norm_epsilon") ? positive(file, "yivl.vision.projector_norm_epsilon") : 1e-5F;
    return c;
}

std::array<float, 3> three_floats(const GgufFile& file, const char* key) {
    const std::span<const float> values = file.floats(key);
    if (values.size() != 3) {
        file.fail(std::string(key) + ": expected 3 numbers, found " + std::to_string(values.size()));
    }
    return {values[0], values[1], values[2]};
}

PreprocessConfig read_preprocess(const GgufFile& file, int64_t image_size) {
    PreprocessConfig c;
    c.image_size = image_size;
    c.mean = three_floats(file, "clip.vision.image_mean");
    c.std = three_floats(file, "clip.vision.image_std");
    for (int i = 0; i < 3; ++i) {
        if (!(c.mean[i] >= 0 && c.mean[i] <= 1)) {
            file.fail("clip.vision.image_mean: expected numbers from 0 to 1, found " + number_text(c.mean[i]));
        }
        if (!(c.std[i] > 0) || std::isinf(c.std[i])) {
            file.fail("clip.vision.image_std: expected positive finite numbers, found " + number_text(c.std[i]));
        }
        c.pad_color[i] = static_cast<uint8_t>(c.mean[i] * 255.0F);
    }
    if (file.has("yivl.image.aspect_ratio")) {
        const std::string_view mode = file.string("yivl.image.aspect_ratio");
        if (mode != "pad" && mode != "crop") {
            file.fail("yivl.image.aspect_ratio: expected 'pad' or 'crop', found " + quoted(mode));
        }
        c.pad = mode == "pad";
    }
    if (file.has("yivl.image.pad_color")) {
        const std::span<const int64_t> color = file.integers("yivl.image.pad_color");
        if (color.size() != 3)
            file.fail("yivl.image.pad_color: expected 3 numbers, found " + std::to_string(color.size()));
        for (int i = 0; i < 3; ++i) {
            if (color[i] < 0 || color[i] > 255) {
                file.fail("yivl.image.pad_color: expected numbers from 0 to 255, found " + std::to_string(color[i]));
            }
            c.pad_color[i] = static_cast<uint8_t>(color[i]);
        }
    }
    return c;
}

PromptConfig read_prompt(const GgufFile& file) {
    PromptConfig c{kDefaultSystem, {"###", "\nHuman:"}};
    if (file.has("yivl.prompt.system")) c.system = file.string("yivl.prompt.system");
    if (file.has("yivl.prompt.stops")) {
        c.stops.clear();
        for (const std::string_view stop : file.strings("yivl.prompt.stops")) {
            if (stop.empty()) file.fail("yivl.prompt.stops: expected texts, found an empty one");
            c.stops.emplace_back(stop);
        }
    }
    return c;
}

}  // namespace

Config read_config(const GgufFile& text, const GgufFile* vision) {
    Config c;
    if (text.has("yivl.format_version") && text.integer("yivl.format_version") != kFormatVersion) {
        text.fail("yivl.format_version: expected " + std::to_string(kFormatVersion) + ", found " +
                  std::to_string(text.integer("yivl.format_version")) + "; a newer yivl-edge may read this file");
    }
    if (text.has("general.name")) c.name = text.string("general.name");
    c.decoder = read_decoder(text);
    c.prompt = read_prompt(text);
    if (text.has("yivl.sampling.temperature")) {
        const double temperature = text.number("yivl.sampling.temperature");
        if (!(temperature >= 0 && temperature <= 100)) {
            text.fail("yivl.sampling.temperature: expected a number from 0 to 100, found " + number_text(temperature));
        }
        c.temperature = static_cast<float>(temperature);
    }
    if (text.has("yivl.sampling.max_tokens"))
        c.max_tokens = integer_in(text, "yivl.sampling.max_tokens", 1, kMaxContext);
    if (vision != nullptr) {
        const Config half = read_vision_config(*vision);
        c.vit = half.vit;
        c.preprocess = half.preprocess;
    }
    return c;
}

Config read_vision_config(const GgufFile& vision) {
    Config c;
    c.vit = read_vit(vision);
    c.preprocess = read_preprocess(vision, c.vit->image_size);
    return c;
}

}  // namespace yivl
