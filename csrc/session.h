// A conversation with a model: its KV cache, what is in it, and the reply on its way.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "activations.h"
#include "sampler.h"
#include "state.h"
#include "text_stream.h"

namespace yivl {

class Model;

struct GenerateOptions {
    int64_t max_tokens = 1024;
    SamplingOptions sampling;
    std::vector<std::string> stops;  // beside the model's own
};

struct LogitsOptions {
    std::optional<std::vector<int64_t>> positions;  // rising; none: all, image rows included
    // If given, all that is computed is added to it, rows of the decoder's blocks at `positions` marked, and the
    // picture is encoded in any case.
    ActivationStatistics* statistics = nullptr;
};

// pixels (3, S, S) of one picture; also the key under which its embeddings are kept.
using Pixels = std::shared_ptr<const std::vector<float>>;

enum class FinishReason { none, stop, length, cancelled };

struct Usage {
    int64_t prompt_tokens = 0;      // positions, image rows included
    int64_t cached_tokens = 0;      // of these, positions taken from the session's cache
    int64_t completion_tokens = 0;  // sampled ids, an end-of-text id included
};

struct Timings {             // seconds
    double image = 0;        // ViT and projector; 0 when the embeddings were kept
    double prefill = 0;      // the prompt's other positions
    double first_token = 0;  // picture, prompt and the first sampled id
    double decode = 0;       // all sampled ids after the first
};

// A conversation's KV cache and what is in it. Belongs to one caller at a time; stays usable after an error or a
// cancel.
class Session {
public:
    // n_ctx 0: the model's context length. `batch`: positions computed at once in prefill. Throws std::invalid_argument
    // for a number out of range, AllocationError when the memory cannot be had.
    explicit Session(std::shared_ptr<const Model> model, int64_t n_ctx = 0, int64_t batch = kDefaultBatch);

    const Model& model() const { return *model_; }
    int64_t n_ctx() const { return decoder_.n_ctx; }
    // How many leading positions of this prompt the cache holds.
    int64_t cached_prefix(std::span<const int32_t> ids, const Pixels& pixels) const;

    // Sets up a reply; computes nothing yet. Throws ContextOverflowError when prompt and max_tokens exceed the context,
    // and std::invalid_argument for anything else that is wrong with the arguments.
    void begin(std::span<const int32_t> ids, Pixels pixels, const GenerateOptions& options);
    // The next piece of text, never empty; nothing at the end of the reply. The first call reads the prompt: it encodes
    // the picture if it is not the last one, and computes the positions that the cache lacks. A cancel ends the reply.
    std::optional<std::string> next(Control& control);

    // Of the last reply begun; std::bad_optional_access before the first.
    FinishReason finish_reason() const { return reply_.value().finish; }
    const std::string& text() const { return reply_.value().stream.text(); }
    const Usage& usage() const { return reply_.value().usage; }
    const Timings& timings() const { return reply_.value().timings; }

    // Computes what a reply to a prompt that begins like this needs, picture and positions, as far as the cache lacks
    // it. Throws Cancelled, and what `begin` throws for ids and pixels. Ends a reply on its way, as `logits` does.
    void prefill(std::span<const int32_t> ids, const Pixels& pixels, Control& control);

    // Stage by stage.
    std::vector<float> vision_features(const Pixels& pixels, Control& control);  // (N, W)
    std::vector<float> encode_image(const Pixels& pixels, Control& control);     // (N, D)
    void embed_image(const Pixels& pixels, Control& control);  // the same for a reply to come: it stays where it is
    // (R, V), one row for each position asked for; nothing is taken from the cache.
    std::vector<float> logits(std::span<const int32_t> ids, const Pixels& pixels, Control& control,
                              const LogitsOptions& options = {});

private:
    // A reply on its way.
    struct Reply {
        std::vector<int32_t> prompt;  // one id per position
        Pixels pixels;
        int64_t max_tokens;
        Sampler sampler;
        TextStream stream;
        std::vector<int32_t> history;  // prompt and reply ids; the last one is not in the cache yet
        FinishReason finish = FinishReason::none;
        Usage usage{};
        Timings timings{};
    };

    // What one call computes with.
    struct Work {
        Control& control;
        std::unique_ptr<Ops> ops;
        std::unique_ptr<Ops> cpu;  // null where no layer stays on the CPU
    };

    Work work(Control& control) const;
    void end_reply();
    std::vector<int32_t> expand(std::span<const int32_t> ids) const;
    void check_pixels(std::span<const int32_t> ids, const Pixels& pixels) const;
    int64_t matching_prefix(std::span<const int32_t> wanted, const Pixels& pixels) const;
    void embed_image(const Pixels& pixels, Work& work);
    void embed(std::span<const int32_t> positions, int64_t first_image_row, Work& work);
    void run_cpu_layers(int64_t T, int64_t first, int64_t n_wanted, Work& work,
                        const std::function<void(int64_t)>& on_layer = {});
    void forget_from(int64_t position);
    using OnBatch = std::function<void(int64_t, int64_t)>;
    // Computes positions [first, end) of `positions` in batches; `on_batch` sees each (row count, first position), and
    // `before_batch` sees it before. Logits can be had of the last `n_wanted` positions.
    void compute(std::span<const int32_t> positions, int64_t first, int64_t n_wanted, const Pixels& pixels, Work& work,
                 const OnBatch& on_batch = {}, const OnBatch& before_batch = {});
    // The next id.
    int32_t read_prompt(Control& control);
    int32_t decode_step(Control& control);
    int32_t sample(Ops& ops);

    std::shared_ptr<const Model> model_;
    std::optional<VitState> vit_;
    std::optional<DecoderState> cpu_decoder_;  // of the layers that stay on the CPU
    DecoderState decoder_;                     // of the others
    std::unique_ptr<StepRecord> step_;         // of decode_step
    std::vector<float> logits_;                // (V), downloaded

    std::vector<int32_t> positions_;  // what the KV cache holds, one id per position, kImageId for each image row
    Pixels cached_pixels_;            // the picture behind the image rows in the cache
    Pixels embedded_pixels_;          // the picture whose embeddings vit_ holds
    std::optional<Reply> reply_;
};

}  // namespace yivl
