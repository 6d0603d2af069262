// From the logits of the last position to the next id.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "draw.h"

namespace yivl {

// The filters work in transformers' order: repetition penalty, temperature, top_k, top_p, min_p.
//
// The same seed and logits give the same ids on any machine and any backend: random numbers come from SplitMix64
// (Steele, Lea and Flood 2014; one step per id drawn, none when greedy), its upper 53 bits as a number u in [0, 1); the
// exponential is made of basic IEEE operations, and rounded so that sums are exact; the id drawn is the first whose
// cumulated probability, in the order of ids, exceeds u.
class Sampler {
public:
    // Throws std::invalid_argument naming the option, its range and what was found.
    explicit Sampler(const SamplingOptions& options);

    // The next id. logits: (V); those of previous ids are overwritten if there is a repetition penalty. previous_ids:
    // those of prompt and reply; negative ones (an image's place) are ignored. Throws std::runtime_error if a logit is
    // NaN or +infinity, or all are -infinity; std::invalid_argument for no logits or a previous id that is not below V.
    // Allocates only when V is larger than ever before.
    int32_t sample(std::span<float> logits, std::span<const int32_t> previous_ids) {
        return choose(logits, previous_ids, next());
    }

    // The same in two parts, of which a backend may have done the second.
    Draw next() { return {options_, options_.temperature == 0 ? 0.0 : random()}; }
    int32_t choose(std::span<float> logits, std::span<const int32_t> previous_ids, const Draw& draw);

private:
    struct Candidate {
        double weight;  // probability, not normalised: 1 for the most probable id
        int32_t id;
    };

    void penalise(std::span<float> logits, std::span<const int32_t> previous_ids);
    std::span<Candidate> weigh(std::span<const float> logits, double top);
    float least_of_top_k(std::span<const float> logits);
    std::span<Candidate> top_p(std::span<Candidate> candidates);
    static double total_weight(std::span<const Candidate> candidates);
    double random();

    SamplingOptions options_;
    uint64_t state_;
    std::vector<uint8_t> seen_;          // (V), all 0 between calls
    std::vector<float> order_;           // (V), scratch of top_k
    std::vector<Candidate> candidates_;  // (V), of which the first ones count
    std::vector<double> class_weights_;  // scratch of top_p
    std::vector<Candidate> at_edge_;     // at most (V), scratch of top_p
};

}  // namespace yivl
