#include "session.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <numeric>
#include <stdexcept>

#include "decoder.h"
#include "model.h"
#include "projector.h"
#include "vit.h"

namespace yivl {

namespace {

// Adds the seconds of its life to a total, also when an exception ends it.
class Timer {
public:
    explicit Timer(double& total) : total_(total) {}
    ~Timer() { total_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }
    Timer(const Timer&) = delete;
    Timer& operator=(const Timer&) = delete;

private:
    double& total_;
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

bool same_picture(const Pixels& a, const Pixels& b) { return a == b || (a != nullptr && b != nullptr && *a == *b); }

bool has_image_rows(std::span<const int32_t> positions) {
    return std::ranges::find(positions, kImageId) != positions.end();
}

// The positions asked for, all T of them by default.
std::vector<int64_t> checked_wanted(const std::optional<std::vector<int64_t>>& positions, int64_t T) {
    std::vector<int64_t> wanted(positions ? 0 : T);
    std::iota(wanted.begin(), wanted.end(), 0);
    if (!positions) return wanted;
    for (const int64_t position : *positions) {
        if (position < 0 || position >= T || (!wanted.empty() && position <= wanted.back())) {
            throw std::invalid_argument("positions: expected rising numbers from 0 to " + std::to_string(T - 1) +
                                        ", found " + std::to_string(position));
        }
        wanted.push_back(position);
    }
    return wanted;
}

int64_t checked_batch(int64_t batch, int64_t n_ctx) {
    if (batch < 1) throw std::invalid_argument("batch: expected at least 1, found " + std::to_string(batch));
    return std::min(batch, n_ctx);
}

// Rows of logits that are computed at once where every position's are wanted.
constexpr int64_t kLogitsRows = 256;

std::vector<float> downloaded(ConstMat x, Ops& ops) {
    std::vector<float> values(static_cast<size_t>(x.rows * x.cols));
    ops.download(Mat(values.data(), x.rows, x.cols), x);
    return values;
}

}  // namespace

Session::Session(std::shared_ptr<const Model> model, int64_t n_ctx, int64_t batch)
    : model_(std::move(model)),
      decoder_(model_->backend(), model_->config().decoder, {model_->n_cpu_layers(), model_->config().decoder.n_layers},
               checked_context(model_->config().decoder, n_ctx),
               checked_batch(batch, checked_context(model_->config().decoder, n_ctx))) {
    const Config& c = model_->config();
    if (c.vit) vit_.emplace(model_->backend(), *c.vit, c.decoder.width);
    if (model_->cpu() != nullptr) {
        cpu_decoder_.emplace(*model_->cpu(), c.decoder, Layers{0, model_->n_cpu_layers()}, decoder_.n_ctx,
                             decoder_.batch);
    }
    positions_.reserve(decoder_.n_ctx);
}

Session::Work Session::work(Control& control) const {
    Backend* cpu = model_->cpu();
    return {control, model_->backend().ops(control), cpu == nullptr ? nullptr : cpu->ops(control)};
}

// Before the cache gets other positions, on which it cannot go on.
void Session::end_reply() {
    if (reply_ && reply_->finish == FinishReason::none) reply_->finish = FinishReason::cancelled;
}

// One entry per position: an image becomes N entries of kImageId.
std::vector<int32_t> Session::expand(std::span<const int32_t> ids) const {
    std::vector<int32_t> positions;
    positions.reserve(model_->n_positions(ids));
    for (const int32_t id : ids) {
        positions.insert(positions.end(), id == kImageId ? model_->config().vit->n_patches() : 1, id);
    }
    return positions;
}

void Session::check_pixels(std::span<const int32_t> ids, const Pixels& pixels) const {
    if ((std::ranges::count(ids, kImageId) > 0) != (pixels != nullptr)) {
        throw std::invalid_argument("expected a picture exactly when the prompt has a place for one");
    }
    if (pixels == nullptr) return;
    const int64_t S = model_->config().vit->image_size;
    if (static_cast<int64_t>(pixels->size()) != 3 * S * S) {
        throw std::invalid_argument("pixels: expected " + std::to_string(3 * S * S) + " values, found " +
                                    std::to_string(pixels->size()));
    }
}

int64_t Session::cached_prefix(std::span<const int32_t> ids, const Pixels& pixels) const {
    return matching_prefix(expand(ids), pixels);
}

int64_t Session::matching_prefix(std::span<const int32_t> wanted, const Pixels& pixels) const {
    const auto [cached_end, wanted_end] = std::ranges::mismatch(positions_, wanted);
    int64_t count = wanted_end - wanted.begin();
    const int64_t first_image = std::ranges::find(positions_, kImageId) - positions_.begin();
    if (count > first_image && !same_picture(cached_pixels_, pixels)) count = first_image;
    return count;
}

void Session::forget_from(int64_t position) {
    positions_.resize(position);
    if (!has_image_rows(positions_)) cached_pixels_.reset();
}

void Session::embed_image(const Pixels& pixels, Work& work) {
    if (embedded_pixels_ != nullptr && same_picture(embedded_pixels_, pixels)) return;
    embedded_pixels_.reset();  // vit_ is about to be overwritten
    const Config& c = model_->config();
    const ConstMat features = vit_forward(*model_->weights().vit, *c.vit, *vit_, *pixels, *work.ops, work.control);
    projector_forward(*model_->weights().projector, *c.vit, *vit_, features, *work.ops, work.control);
    embedded_pixels_ = pixels;
}

// Rows [0, positions.size()) of x, where the first layer is: the table's rows of the ids, and the image's rows where
// the image stands, from `first_image_row` on.
void Session::embed(std::span<const int32_t> positions, int64_t first_image_row, Work& work) {
    const bool on_cpu = cpu_decoder_.has_value();
    const Mat x = (on_cpu ? *cpu_decoder_ : decoder_).x.rows(static_cast<int64_t>(positions.size()));
    for (size_t i = 0; i < positions.size();) {
        const bool image = positions[i] == kImageId;
        size_t end = i;
        while (end < positions.size() && (positions[end] == kImageId) == image) ++end;
        const Mat rows = x.row_range(static_cast<int64_t>(i), static_cast<int64_t>(end - i));
        if (!image) {
            (on_cpu ? work.cpu : work.ops)
                ->embed(rows, model_->weights().decoder.token_embedding, positions.subspan(i, end - i));
        } else if (const ConstMat from = vit_->embeddings.view().row_range(first_image_row, rows.rows); on_cpu) {
            work.ops->download(rows, from);
        } else {
            work.ops->copy(rows, from);
        }
        i = end;
    }
}

// T rows of x through the layers that stay on the CPU, and on to where the next one is.
void Session::run_cpu_layers(int64_t T, int64_t first, int64_t n_wanted, Work& work,
                             const std::function<void(int64_t)>& on_layer) {
    decoder_forward(model_->weights().decoder, model_->config().decoder, *cpu_decoder_, T, first, n_wanted, *work.cpu,
                    on_layer);
    work.ops->upload(decoder_.x.rows(T), cpu_decoder_->x.rows(T));
}

void Session::compute(std::span<const int32_t> positions, int64_t first, int64_t n_wanted, const Pixels& pixels,
                      Work& work, const OnBatch& on_batch, const OnBatch& before_batch) {
    const DecoderConfig& c = model_->config().decoder;
    const int64_t total = static_cast<int64_t>(positions.size());
    const int64_t image_begin = std::ranges::find(positions, kImageId) - positions.begin();

    forget_from(first);
    for (int64_t begin = first; begin < total;) {
        const int64_t T = std::min(decoder_.batch, total - begin);
        const std::span<const int32_t> batch = positions.subspan(begin, T);
        if (before_batch) before_batch(T, begin);
        const auto on_layer = [&](int64_t layers) {
            const double done = static_cast<double>(begin - first) +
                                static_cast<double>(T) * static_cast<double>(layers) / static_cast<double>(c.n_layers);
            work.control.progress(Stage::prefill, done / static_cast<double>(total - first));
        };
        embed(batch, std::max<int64_t>(begin - image_begin, 0), work);
        const int64_t wanted = std::clamp<int64_t>(n_wanted - (total - begin - T), 0, T);
        if (cpu_decoder_) run_cpu_layers(T, begin, wanted, work, on_layer);
        decoder_forward(model_->weights().decoder, c, decoder_, T, begin, wanted, *work.ops, on_layer);
        if (on_batch) on_batch(T, begin);
        if (has_image_rows(batch)) cached_pixels_ = pixels;
        positions_.insert(positions_.end(), batch.begin(), batch.end());
        begin += T;
    }
}

void Session::begin(std::span<const int32_t> ids, Pixels pixels, const GenerateOptions& options) {
    model_->check(ids, options, decoder_.n_ctx);
    check_pixels(ids, pixels);
    std::vector<std::string> stops = model_->config().prompt.stops;
    stops.insert(stops.end(), options.stops.begin(), options.stops.end());
    Reply reply{.prompt = expand(ids),
                .pixels = std::move(pixels),
                .max_tokens = options.max_tokens,
                .sampler = Sampler(options.sampling),
                .stream = TextStream(std::move(stops)),
                .history = {ids.begin(), ids.end()}};
    reply.usage.prompt_tokens = static_cast<int64_t>(reply.prompt.size());
    reply_.emplace(std::move(reply));
}

// Encodes the picture if it is not the last one, and computes the positions that the cache lacks; the last one always,
// since its logits choose the first id.
int32_t Session::read_prompt(Control& control) {
    Reply& r = *reply_;
    const int64_t cached = std::min(matching_prefix(r.prompt, r.pixels), r.usage.prompt_tokens - 1);
    r.usage.cached_tokens = cached;
    if (has_image_rows(std::span(r.prompt).subspan(cached))) {
        const Timer timer(r.timings.image);
        embed_image(r.pixels, control);
    }
    const Timer timer(r.timings.prefill);
    Work work = this->work(control);
    compute(r.prompt, cached, 1, r.pixels, work, [&](int64_t T, int64_t first) {
        if (first + T < r.usage.prompt_tokens) return;
        decoder_logits(model_->weights().decoder, model_->config().decoder, decoder_, T - 1, decoder_.logits.view(),
                       *work.ops);
    });
    return sample(*work.ops);
}

// The last sampled id enters the cache and gives the next logits.
int32_t Session::decode_step(Control& control) {
    Work work = this->work(control);
    const int32_t id = reply_->history.back();
    const DecoderWeights& w = model_->weights().decoder;
    const DecoderConfig& c = model_->config().decoder;
    const auto position = static_cast<int64_t>(positions_.size());
    if (cpu_decoder_) {
        embed({&id, 1}, 0, work);
        run_cpu_layers(1, position, 1, work);
    }
    work.ops->step({.id = id, .position = position, .n_ctx = decoder_.n_ctx}, step_, [&] {
        if (!cpu_decoder_) embed({&id, 1}, 0, work);
        decoder_forward(w, c, decoder_, 1, position, 1, *work.ops);
        decoder_logits(w, c, decoder_, 0, decoder_.logits.view(), *work.ops);
    });
    positions_.push_back(id);
    return sample(*work.ops);
}

int32_t Session::sample(Ops& ops) {
    const ConstMat logits = decoder_.logits.view();
    const Draw draw = reply_->sampler.next();
    if (const int32_t id = ops.draw(logits, reply_->history, draw); id >= 0) return id;
    logits_.resize(static_cast<size_t>(logits.cols));
    ops.download(Mat(logits_.data(), 1, logits.cols), logits);
    return reply_->sampler.choose(logits_, reply_->history, draw);
}

std::optional<std::string> Session::next(Control& control) {
    if (!reply_) throw std::logic_error("Session::next before Session::begin");
    Reply& r = *reply_;
    while (r.finish == FinishReason::none) {
        const bool first = r.usage.completion_tokens == 0;
        int32_t id = 0;
        try {
            const Timer timer(first ? r.timings.first_token : r.timings.decode);
            control.check();
            id = first ? read_prompt(control) : decode_step(control);
        } catch (const Cancelled&) {
            r.finish = FinishReason::cancelled;
            break;
        }
        r.history.push_back(id);
        ++r.usage.completion_tokens;

        std::string piece;
        if (id == model_->tokenizer().config().eos_id) {
            r.finish = FinishReason::stop;
        } else {
            piece = r.stream.push(model_->tokenizer().bytes(id));
            if (r.stream.stopped()) {
                r.finish = FinishReason::stop;
            } else if (r.usage.completion_tokens == r.max_tokens) {
                r.finish = FinishReason::length;
            }
        }
        if (r.finish != FinishReason::none) {
            piece += r.stream.finish();
            if (r.stream.stopped()) r.finish = FinishReason::stop;  // the last piece held back was a stop text
        }
        control.progress(Stage::decode,
                         r.finish != FinishReason::none
                             ? 1.0
                             : static_cast<double>(r.usage.completion_tokens) / static_cast<double>(r.max_tokens));
        if (!piece.empty()) return piece;
    }
    std::string rest = r.stream.finish();
    return rest.empty() ? std::nullopt : std::optional(std::move(rest));
}

void Session::prefill(std::span<const int32_t> ids, const Pixels& pixels, Control& control) {
    model_->check_ids(ids, 0, decoder_.n_ctx);
    check_pixels(ids, pixels);
    const std::vector<int32_t> positions = expand(ids);
    const int64_t cached = matching_prefix(positions, pixels);
    if (cached == static_cast<int64_t>(positions.size())) return;
    end_reply();
    Work work = this->work(control);
    if (has_image_rows(std::span(positions).subspan(cached))) embed_image(pixels, work);
    compute(positions, cached, 0, pixels, work);
}

std::vector<float> Session::vision_features(const Pixels& pixels, Control& control) {
    const Config& c = model_->config();
    model_->require_vision();
    check_pixels(std::array{kImageId}, pixels);
    embedded_pixels_.reset();
    const std::unique_ptr<Ops> ops = model_->backend().ops(control);
    const ConstMat features = vit_forward(*model_->weights().vit, *c.vit, *vit_, *pixels, *ops, control);
    return downloaded(features, *ops);
}

// Ends when the work is done, not when it is queued: callers take the time.
void Session::embed_image(const Pixels& pixels, Control& control) {
    model_->require_vision();
    check_pixels(std::array{kImageId}, pixels);
    Work work = this->work(control);
    embed_image(pixels, work);
}

std::vector<float> Session::encode_image(const Pixels& pixels, Control& control) {
    embed_image(pixels, control);
    return downloaded(vit_->embeddings.view(), *work(control).ops);
}

std::vector<float> Session::logits(std::span<const int32_t> ids, const Pixels& pixels, Control& control,
                                   const LogitsOptions& options) {
    model_->check_ids(ids, 0, decoder_.n_ctx);
    check_pixels(ids, pixels);
    const std::vector<int32_t> positions = expand(ids);
    const std::vector<int64_t> wanted = checked_wanted(options.positions, static_cast<int64_t>(positions.size()));
    end_reply();
    Work work = this->work(control);
    if (options.statistics != nullptr) {
        for (std::unique_ptr<Ops>* ops : {&work.ops, &work.cpu}) {
            if (*ops != nullptr) *ops = record_activations(std::move(*ops), *options.statistics);
        }
        options.statistics->mark({});
        embedded_pixels_.reset();
    }
    if (pixels != nullptr) embed_image(pixels, work);

    const int64_t V = model_->config().decoder.vocab_size;
    std::vector<float> result(wanted.size() * static_cast<size_t>(V));
    const Buffer some(model_->backend(), std::min(decoder_.batch, kLogitsRows), V);
    size_t done = 0;
    const auto mark_wanted = [&](int64_t T, int64_t first) {
        if (options.statistics == nullptr) return;
        std::vector<bool> marks(static_cast<size_t>(T));
        for (size_t i = done; i < wanted.size() && wanted[i] < first + T; ++i) {
            marks[static_cast<size_t>(wanted[i] - first)] = true;
        }
        options.statistics->mark(std::move(marks));
    };
    const auto read_wanted = [&](int64_t T, int64_t first) {
        if (options.statistics != nullptr) options.statistics->mark({});
        while (done < wanted.size() && wanted[done] < first + T) {
            // Positions that stand together are computed together.
            int64_t rows = 1;
            while (rows < kLogitsRows && done + rows < wanted.size() && wanted[done + rows] == wanted[done] + rows &&
                   wanted[done + rows] < first + T) {
                ++rows;
            }
            decoder_logits(model_->weights().decoder, model_->config().decoder, decoder_, wanted[done] - first,
                           some.rows(rows), *work.ops);
            work.ops->download(Mat(&result[done * static_cast<size_t>(V)], rows, V), some.rows(rows));
            done += rows;
        }
    };
    compute(positions, 0, static_cast<int64_t>(positions.size()), pixels, work, read_wanted, mark_wanted);
    return result;
}

}  // namespace yivl
