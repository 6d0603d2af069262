#include "model.h"

#include <algorithm>
#include <stdexcept>

namespace yivl {

namespace {

// A picture is seen before its question is read. Nothing is read ahead where a GPU has some of the weights, not even
// those that stay on the CPU.
std::vector<std::span<const std::byte>> files_to_read(const Placement& placement, const Weights& weights) {
    std::vector<std::span<const std::byte>> files;
    if (placement.cpu != nullptr || placement.n_gpu_layers > 0) return files;
    if (weights.vision_file != nullptr) files.push_back(weights.vision_file->bytes());
    if (weights.text_file != weights.vision_file) files.push_back(weights.text_file->bytes());
    return files;
}

}  // namespace

Model::Model(Config config, Placement placement, Weights weights, Tokenizer tokenizer)
    : config_(std::move(config)),
      placement_(std::move(placement)),
      weights_(std::move(weights)),
      tokenizer_(std::move(tokenizer)),
      read_ahead_(files_to_read(placement_, weights_)) {}

std::shared_ptr<const Model> Model::open(const ModelOptions& options, Control& control) {
    control.progress(Stage::load, 0.0);
    std::shared_ptr<const GgufFile> text = GgufFile::open(options.path);
    std::shared_ptr<const GgufFile> vision;
    if (!options.mmproj.empty()) {
        vision = GgufFile::open(options.mmproj);
    } else if (text->has("clip.has_vision_encoder")) {
        vision = text;
    }
    Config config = read_config(*text, vision.get());
    Tokenizer tokenizer(Tokenizer::read_config(*text));
    Placement placement = place_model(options.device, options.n_gpu_layers, options.n_threads,
                                      plan_memory(*text, vision.get(), config, options.n_ctx), control);
    Weights weights =
        bind_weights(text, vision, config, {*placement.backend, placement.cpu.get(), placement.n_cpu_layers}, control);
    control.progress(Stage::load, 1.0);
    std::string opened = "opened " + options.path + " on " + placement.backend->name();
    if (placement.cpu) {
        opened += ", but " + std::to_string(placement.n_cpu_layers) + " of " + std::to_string(config.decoder.n_layers) +
                  " layers on " + placement.cpu->name();
    }
    control.log(opened);
    return std::shared_ptr<const Model>(
        new Model(std::move(config), std::move(placement), std::move(weights), std::move(tokenizer)));
}

int64_t Model::n_positions(std::span<const int32_t> ids) const {
    const int64_t images = std::ranges::count(ids, kImageId);
    if (images > 0) require_vision();
    return static_cast<int64_t>(ids.size()) + (images > 0 ? images * (config_.vit->n_patches() - 1) : 0);
}

void Model::require_vision() const {
    if (config_.vit) return;
    throw std::invalid_argument(
        "this model file has no vision tower: open it with the mmproj file that belongs to it, or ask without a "
        "picture");
}

void Model::check_ids(std::span<const int32_t> ids, int64_t max_tokens, int64_t n_ctx) const {
    const int64_t images = std::ranges::count(ids, kImageId);
    if (ids.empty()) throw std::invalid_argument("expected a prompt of at least one token, found none");
    if (images > 1) {
        throw std::invalid_argument("expected at most one image, found " + std::to_string(images) +
                                    ": Yi-VL looks at one picture per conversation");
    }
    if (images > 0) require_vision();
    for (const int32_t id : ids) {
        if (id != kImageId && (id < 0 || id >= config_.decoder.vocab_size)) {
            throw std::invalid_argument("token id: expected 0 to " + std::to_string(config_.decoder.vocab_size - 1) +
                                        ", found " + std::to_string(id));
        }
    }
    const int64_t prompt = n_positions(ids);
    const int64_t room = n_ctx > 0 ? n_ctx : config_.decoder.context_length;
    if (max_tokens > room - prompt) {  // the sum could overflow
        const uint64_t needed = static_cast<uint64_t>(prompt) + static_cast<uint64_t>(max_tokens);
        throw ContextOverflowError("the conversation needs " + std::to_string(needed) + " tokens (" +
                                   std::to_string(prompt) + " prompt + " + std::to_string(max_tokens) +
                                   " reply), the context holds " + std::to_string(room) +
                                   ": shorten the conversation, lower max_tokens or raise n_ctx");
    }
}

void Model::check(std::span<const int32_t> ids, const GenerateOptions& options, int64_t n_ctx) const {
    if (options.max_tokens < 1) {
        throw std::invalid_argument("max_tokens: expected at least 1, found " + std::to_string(options.max_tokens));
    }
    Sampler{options.sampling};
    TextStream{options.stops};
    check_ids(ids, options.max_tokens, n_ctx);
}

}  // namespace yivl
