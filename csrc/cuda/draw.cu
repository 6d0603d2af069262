// The next id, as Sampler::choose takes it: with the arithmetic of csrc/draw.h, for which this file is compiled without
// fused multiply-adds, and sums of integers, whose order does not matter.
//
// Weights are counted in steps (drawing::steps). Few of a vocabulary weigh anything at all, as a rule: those are the
// candidates, in the order of ids, and one block does the rest.
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace yivl::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kGreatestThreads = 1024;  // of one block, which reads all logits
constexpr int kAtOnce = 8;              // of each thread, before it compares them

struct Candidate {
    uint64_t weight;  // 0: left out by a filter
    uint32_t key;     // as large as the logit is, of all
    int32_t id;
};

// ---- repetition penalty ----

__global__ void penalise_kernel(float* to, const float* logits, const int32_t* ids, int n, float penalty) {
    wait_for_earlier_kernels();
    const int i = block_x() * kThreads + thread_id();
    if (i >= n || ids[i] < 0) return;
    to[ids[i]] = drawing::penalised(logits[ids[i]], penalty);  // an id that comes twice: the same again
}

// ---- the greatest logit ----

struct Best {
    float value;
    int index;
};

// The larger, of equal ones the first. A bad one has the index -1 and wins.
__device__ __forceinline__ Best better(Best a, Best b) {
    if (a.index < 0 || b.index < 0) return {INFINITY, -1};
    return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

__device__ __forceinline__ Best best_of_warp(Best best) {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        best = better(best, {shuffle_xor(best.value, mask), shuffle_xor(best.index, mask)});
    }
    return best;
}

static_assert(kGreatestThreads == kWarp * kWarp);
__global__ void __launch_bounds__(kGreatestThreads) greatest_kernel(int32_t* index, const float* logits, int n) {
    wait_for_earlier_kernels();
    struct Partial {
        Best of_warp[kWarp];
    };
    Partial& partial = shared<Partial>();
    Best best{-INFINITY, n};
    for (int begin = thread_id(); begin < n; begin += kAtOnce * kGreatestThreads) {
        float values[kAtOnce];
        YIVL_UNROLL
        for (int j = 0; j < kAtOnce; ++j) {
            const int i = begin + j * kGreatestThreads;
            values[j] = i < n ? logits[i] : -INFINITY;
        }
        YIVL_UNROLL
        for (int j = 0; j < kAtOnce; ++j) {
            const int i = begin + j * kGreatestThreads;
            if (i < n) best = better(best, {values[j], values[j] < INFINITY ? i : -1});
        }
    }
    best = best_of_warp(best);
    if (lane_id() == 0) partial.of_warp[warp_id()] = best;
    sync_block();
    if (warp_id() > 0) return;
    best = best_of_warp(partial.of_warp[lane_id()]);
    if (lane_id() == 0) *index = isfinite(best.value) ? best.index : -1;
}

// ---- weights ----

// The sum of the values of the threads before this one, and that of all.
struct Sums {
    uint64_t before, all;
};
__device__ Sums sums(uint64_t value) {
    struct Partial {
        uint64_t of_warp[kWarps];
    };
    Partial& partial = shared<Partial>();
    uint64_t sum = value;
    for (int step = 1; step < kWarp; step *= 2) {
        const uint64_t other = shuffle(sum, lane_id() - step);
        if (lane_id() >= step) sum += other;
    }
    sync_block();  // everyone has read the last result
    if (lane_id() == kWarp - 1) partial.of_warp[warp_id()] = sum;
    sync_block();
    Sums result{sum - value, 0};
    for (int warp = 0; warp < kWarps; ++warp) {
        if (warp < warp_id()) result.before += partial.of_warp[warp];
        result.all += partial.of_warp[warp];
    }
    return result;
}

struct Temperature {
    double inverse, steps;
};

// The weights of a tile of logits, and how many are above 0.
__global__ void weigh_kernel(uint64_t* weights, int32_t* counts, const float* logits, int n, const int32_t* greatest,
                             Temperature t) {
    wait_for_earlier_kernels();
    if (*greatest < 0) return;
    const int i = block_x() * kThreads + thread_id();
    uint64_t weight = 0;
    if (i < n) {
        const double exponent = (double{logits[i]} - double{logits[*greatest]}) * t.inverse;
        if (exponent >= drawing::kLeastExponent) {
            weight = static_cast<uint64_t>(drawing::rounded(drawing::exponential(exponent) * t.steps));
        }
        weights[i] = weight;
    }
    const Sums count = sums(weight > 0 ? 1 : 0);
    if (thread_id() == 0) counts[block_x()] = static_cast<int32_t>(count.all);
}

// ---- filters, and the draw ----

__device__ __forceinline__ uint32_t key_of(float logit) {
    const uint32_t bits = bits_of_float(logit + 0.0f);  // -0 is as large as 0
    return bits >> 31 != 0 ? ~bits : bits | 0x80000000;
}

// The largest key that is reached by `wanted` of what fn(candidate) counts, from the largest down; fn gives key and
// amount.
struct Counted {
    uint64_t key, amount;
};
template <class Fn>
__device__ uint64_t edge(const Candidate* candidates, int n, uint64_t wanted, int bits, Fn&& fn) {
    uint64_t key = 0;
    for (int bit = bits - 1; bit >= 0; --bit) {
        const uint64_t higher = key | uint64_t{1} << bit;
        uint64_t amount = 0;
        for (int i = thread_id(); i < n; i += kThreads) {
            const Counted counted = fn(candidates[i]);
            if (counted.key >= higher) amount += counted.amount;
        }
        if (sums(amount).all >= wanted) key = higher;
    }
    return key;
}

// Those above 0 in the order of ids; returns how many.
__device__ int gather(Candidate* candidates, const uint64_t* weights, const int32_t* counts, const float* logits,
                      int n) {
    int found = 0;
    const int n_tiles = (n + kThreads - 1) / kThreads;
    for (int first = 0; first < n_tiles; first += kWarp) {
        const int count = first + lane_id() < n_tiles ? counts[first + lane_id()] : 0;
        const unsigned some = ballot(count > 0);
        for (int lane = 0; lane < kWarp; ++lane) {
            if ((some >> lane & 1) == 0) continue;
            const int i = (first + lane) * kThreads + thread_id();
            const uint64_t weight = i < n ? weights[i] : 0;
            const int at = found + static_cast<int>(sums(weight > 0 ? 1 : 0).before);
            if (weight > 0) candidates[at] = {weight, key_of(logits[i]), i};
            found += shuffle(count, lane);
        }
    }
    sync_block();
    return found;
}

__device__ void keep_top_k(Candidate* candidates, int n, int k) {
    const uint64_t least = edge(candidates, n, k, 32, [](const Candidate& c) { return Counted{c.key, 1}; });
    for (int i = thread_id(); i < n; i += kThreads) {
        if (candidates[i].key < least) candidates[i].weight = 0;
    }
    sync_block();
}

__device__ void keep_top_p(Candidate* candidates, int n, double p, int bits) {
    uint64_t mine = 0;
    for (int i = thread_id(); i < n; i += kThreads) mine += candidates[i].weight;
    const auto wanted = static_cast<uint64_t>(ceil(p * static_cast<double>(sums(mine).all)));
    const uint64_t least =
        edge(candidates, n, wanted, bits, [](const Candidate& c) { return Counted{c.weight, c.weight}; });
    mine = 0;
    for (int i = thread_id(); i < n; i += kThreads) mine += candidates[i].weight > least ? candidates[i].weight : 0;
    // Of those at the edge only the first are needed.
    const uint64_t needed = (wanted - sums(mine).all + least - 1) / least;
    uint64_t at_edge = 0;
    for (int begin = 0; begin < n; begin += kThreads) {
        const int i = begin + thread_id();
        const uint64_t weight = i < n ? candidates[i].weight : 0;
        const Sums equal = sums(weight == least ? 1 : 0);
        const bool kept = weight > least || (weight == least && at_edge + equal.before < needed);
        if (i < n && !kept) candidates[i].weight = 0;
        at_edge += equal.all;
    }
    sync_block();
}

struct Choice {
    int32_t top_k;
    double top_p, least_weight;  // of one that is kept: min_p
    double random;
    int weight_bits;
};

__global__ void draw_kernel(int32_t* id, Candidate* candidates, const uint64_t* weights, const int32_t* counts,
                            const float* logits, int n_logits, Choice choice) {
    wait_for_earlier_kernels();
    if (*id < 0) return;  // so far, where the greatest is
    const int n = gather(candidates, weights, counts, logits, n_logits);
    if (choice.top_k > 0 && choice.top_k < n) keep_top_k(candidates, n, choice.top_k);
    if (choice.top_p < 1) keep_top_p(candidates, n, choice.top_p, choice.weight_bits);
    const auto weight_of = [&](int i) {
        const uint64_t weight = i < n ? candidates[i].weight : 0;
        return static_cast<double>(weight) >= choice.least_weight ? weight : 0;
    };
    uint64_t mine = 0;
    for (int i = thread_id(); i < n; i += kThreads) mine += weight_of(i);
    const uint64_t total = sums(mine).all;
    auto target = static_cast<uint64_t>(choice.random * static_cast<double>(total));
    if (target >= total) target = total - 1;  // the product may round up
    // The first whose sum with those before it exceeds the target.
    uint64_t before = 0;
    for (int begin = 0; before <= target; begin += kThreads) {
        const uint64_t weight = weight_of(begin + thread_id());
        const Sums of_tile = sums(weight);
        const uint64_t sum = before + of_tile.before;
        if (sum <= target && target < sum + weight) *id = candidates[begin + thread_id()].id;
        before += of_tile.all;
    }
}

int64_t tiles(int64_t n) { return (n + kThreads - 1) / kThreads; }

}  // namespace

size_t draw_bytes(int64_t n_logits) {
    const auto n = static_cast<size_t>(n_logits);
    return n * (sizeof(Candidate) + sizeof(uint64_t) + sizeof(float)) +
           static_cast<size_t>(tiles(n_logits)) * sizeof(int32_t);
}

void draw(Stream& stream, int32_t* id, Vec logits, std::span<const int32_t> previous_ids, const Draw& draw,
          std::byte* memory) {
    const SamplingOptions& o = draw.options;
    const auto n = static_cast<int>(logits.size());
    auto* candidates = reinterpret_cast<Candidate*>(memory);
    auto* weights = reinterpret_cast<uint64_t*>(candidates + n);
    auto* penalised = reinterpret_cast<float*>(weights + n);
    auto* counts = reinterpret_cast<int32_t*>(penalised + n);

    const float* scores = logits.data();
    if (!previous_ids.empty()) {
        stream.copy(penalised, logits.size_bytes(), scores, logits.size_bytes(), logits.size_bytes(), 1);
        const auto n_ids = static_cast<int>(previous_ids.size());
        launch(stream, "penalise", penalise_kernel, {tiles(n_ids)}, kThreads, 0, penalised, scores, previous_ids.data(),
               n_ids, o.repetition_penalty);
        scores = penalised;
    }
    launch(stream, "greatest", greatest_kernel, {1}, kGreatestThreads, 0, id, scores, n);
    if (o.temperature == 0) return;
    const double steps = drawing::steps(n);
    launch(stream, "weigh", weigh_kernel, {tiles(n)}, kThreads, 0, weights, counts, scores, n, id,
           Temperature{1.0 / o.temperature, steps});
    const Choice choice{o.top_k, o.top_p, o.min_p * steps, draw.random,
                        static_cast<int>(std::bit_width(static_cast<uint64_t>(steps)))};
    launch(stream, "draw", draw_kernel, {1}, kThreads, 0, id, candidates, weights, counts, scores, n, choice);
}

}  // namespace yivl::cuda
