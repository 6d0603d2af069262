#include "sampler.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <functional>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>

#include "errors.h"

namespace yivl {

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

void require(bool ok, const char* option, const char* expected, float found) {
    if (!ok)
        throw std::invalid_argument(std::string(option) + ": expected " + expected + ", found " + number_text(found));
}

// The first position of the greatest logit.
size_t greatest(std::span<const float> logits) {
    // Lanes, because a single running maximum of floats is not vectorised.
    std::array<float, 16> most;
    std::array<int32_t, 16> bad{};
    most.fill(-infinity);
    const auto look = [&](size_t lane, float logit) {
        most[lane] = logit > most[lane] ? logit : most[lane];
        bad[lane] |= !(logit < infinity);
    };
    size_t i = 0;
    for (; i + most.size() <= logits.size(); i += most.size())
        for (size_t lane = 0; lane < most.size(); ++lane) look(lane, logits[i + lane]);
    for (; i < logits.size(); ++i) look(0, logits[i]);

    if (std::any_of(bad.begin(), bad.end(), [](int32_t b) { return b != 0; }))
        throw ModelFileError("the logits hold NaN or infinity: the model's weights are damaged");
    const float top = *std::max_element(most.begin(), most.end());
    if (top == -infinity) throw ModelFileError("all logits are -infinity: the model's weights are damaged");
    return static_cast<size_t>(std::find(logits.begin(), logits.end(), top) - logits.begin());
}

}  // namespace

Sampler::Sampler(const SamplingOptions& options) : options_(options), state_(options.seed) {
    const auto& o = options_;
    require(o.temperature >= 0 && o.temperature < infinity, "temperature", "a finite number of at least 0",
            o.temperature);
    require(o.top_p > 0 && o.top_p <= 1, "top_p", "a number above 0 and up to 1", o.top_p);
    require(o.min_p >= 0 && o.min_p <= 1, "min_p", "a number from 0 to 1", o.min_p);
    require(o.repetition_penalty > 0 && o.repetition_penalty < infinity, "repetition_penalty",
            "a finite number above 0", o.repetition_penalty);
    if (o.top_k < 0)
        throw std::invalid_argument("top_k: expected a number of at least 0, found " + std::to_string(o.top_k));
}

int32_t Sampler::choose(std::span<float> logits, std::span<const int32_t> previous_ids, const Draw& draw) {
    if (logits.empty()) throw std::invalid_argument("expected at least one logit, found none");
    if (options_.repetition_penalty != 1) penalise(logits, previous_ids);
    const size_t best = greatest(logits);
    if (options_.temperature == 0) return static_cast<int32_t>(best);

    std::span<Candidate> kept = weigh(logits, logits[best]);
    if (options_.top_p < 1) kept = top_p(kept);
    if (options_.min_p > 0) {
        const auto improbable = [&](const Candidate& c) { return c.weight < options_.min_p; };
        kept = kept.first(std::remove_if(kept.begin(), kept.end(), improbable) - kept.begin());
    }

    const double target = draw.random * total_weight(kept);
    double cumulated = 0;
    for (const Candidate& candidate : kept) {
        cumulated += candidate.weight;
        if (cumulated > target) return candidate.id;
    }
    return kept.back().id;  // random() * total may round up to the total
}

void Sampler::penalise(std::span<float> logits, std::span<const int32_t> previous_ids) {
    for (const int32_t id : previous_ids) {
        if (id >= 0 && static_cast<size_t>(id) >= logits.size())
            throw std::invalid_argument("previous id " + std::to_string(id) + " is not below the number of logits, " +
                                        std::to_string(logits.size()));
    }
    if (seen_.size() < logits.size()) seen_.resize(logits.size());
    const float penalty = options_.repetition_penalty;
    for (const int32_t id : previous_ids) {
        if (id < 0 || seen_[id]) continue;
        seen_[id] = 1;
        logits[id] = drawing::penalised(logits[id], penalty);
    }
    for (const int32_t id : previous_ids)
        if (id >= 0) seen_[id] = 0;
}

// The weights of the top k ids, in the order of ids.
std::span<Sampler::Candidate> Sampler::weigh(std::span<const float> logits, double top) {
    const float least = least_of_top_k(logits);
    const double inverse_temperature = 1.0 / options_.temperature;
    const double steps = drawing::steps(static_cast<int64_t>(logits.size())), step = 1 / steps;
    if (candidates_.size() < logits.size()) candidates_.resize(logits.size());
    size_t count = 0;
    // In blocks, so that the exponentials are vectorised.
    constexpr size_t block = 64;
    std::array<double, block> exponents, weights;
    for (size_t begin = 0; begin < logits.size(); begin += block) {
        const size_t size = std::min(block, logits.size() - begin);
        for (size_t i = 0; i < size; ++i) exponents[i] = (logits[begin + i] - top) * inverse_temperature;
        for (size_t i = 0; i < size; ++i)
            weights[i] = drawing::rounded(drawing::exponential(exponents[i]) * steps) * step;
        for (size_t i = 0; i < size; ++i) {
            candidates_[count] = {weights[i], static_cast<int32_t>(begin + i)};
            // Without a branch: what is kept looks random to the predictor.
            count += static_cast<size_t>(exponents[i] >= drawing::kLeastExponent) &
                     static_cast<size_t>(weights[i] > 0) & static_cast<size_t>(logits[begin + i] >= least);
        }
    }
    return std::span(candidates_).first(count);
}

// The logit of the last of the top k.
float Sampler::least_of_top_k(std::span<const float> logits) {
    const auto k = static_cast<size_t>(options_.top_k);
    if (k == 0 || k >= logits.size()) return -infinity;
    order_.assign(logits.begin(), logits.end());
    std::nth_element(order_.begin(), order_.begin() + (k - 1), order_.end(), std::greater<>());
    return order_[k - 1];
}

// The fewest most probable candidates whose probabilities reach top_p, in the order of ids.
std::span<Sampler::Candidate> Sampler::top_p(std::span<Candidate> candidates) {
    // The sums of narrow classes of weight tell in which class top_p is reached: only that one must be sorted. Of equal
    // exponents a double's bits are as ordered as its value: 64 classes for each power of two from 1 down to 2^-64.
    const auto class_of = [](const Candidate& c) {
        return (std::bit_cast<uint64_t>(1.0) - std::bit_cast<uint64_t>(c.weight)) >> 46;
    };
    class_weights_.assign(64 * 64 + 1, 0.0);
    for (const Candidate& candidate : candidates) class_weights_[class_of(candidate)] += candidate.weight;
    const double wanted = options_.top_p * total_weight(candidates);
    double cumulated = 0;
    size_t edge = 0;
    while (edge + 1 < class_weights_.size() && cumulated + class_weights_[edge] < wanted)
        cumulated += class_weights_[edge++];

    const auto before = [](const Candidate& a, const Candidate& b) {
        return a.weight > b.weight || (a.weight == b.weight && a.id < b.id);
    };
    at_edge_.reserve(candidates_.size());
    at_edge_.clear();
    std::copy_if(candidates.begin(), candidates.end(), std::back_inserter(at_edge_),
                 [&](const Candidate& c) { return class_of(c) == edge; });
    std::sort(at_edge_.begin(), at_edge_.end(), before);
    const auto last = std::find_if(at_edge_.begin(), at_edge_.end(),
                                   [&](const Candidate& c) { return (cumulated += c.weight) >= wanted; });
    const auto beyond = [&](const Candidate& c) {
        return class_of(c) > edge || (class_of(c) == edge && last != at_edge_.end() && before(*last, c));
    };
    return candidates.first(std::remove_if(candidates.begin(), candidates.end(), beyond) - candidates.begin());
}

double Sampler::total_weight(std::span<const Candidate> candidates) {
    double total = 0;
    for (const Candidate& candidate : candidates) total += candidate.weight;
    return total;
}

double Sampler::random() {
    state_ += 0x9E3779B97F4A7C15u;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    return static_cast<double>(z >> 11) * 0x1p-53;
}

}  // namespace yivl
