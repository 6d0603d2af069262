// What an id is drawn by, and the arithmetic of it that backends share, bit by bit. The sampler says what it means.
//
// Compile what uses this without fusing a * b + c: it must round the same way everywhere.
#pragma once

#include <bit>
#include <cstdint>

#ifdef __CUDACC__
#define YIVL_ANYWHERE __host__ __device__
#else
#define YIVL_ANYWHERE
#endif

namespace yivl {

struct SamplingOptions {
    float temperature = 0.2f;  // 0: greedy
    int32_t top_k = 0;         // the k most probable ids, and those as probable as the last of them; 0: all
    float top_p = 1.0f;        // the fewest most probable ids (equal ones: the lower) whose sum reaches top_p; 1: all
    float min_p = 0.0f;        // ids at least min_p times as probable as the most probable one; 0: all
    float repetition_penalty = 1.0f;  // > 1 makes ids that have occurred less probable (Keskar et al. 2019, CTRL)
    uint64_t seed = 0;
};

struct Draw {
    SamplingOptions options;
    double random;  // in [0, 1)
};

namespace drawing {

// Scores above 0 are divided by the penalty, those below multiplied.
YIVL_ANYWHERE constexpr float penalised(float logit, float penalty) {
    return logit < 0 ? logit * penalty : logit / penalty;
}

// Where exponential() may be asked: ids less probable than this, relative to the most probable one, weigh nothing.
inline constexpr double kLeastExponent = -44.36141955583650;  // ln 2^-64

// e^x for kLeastExponent <= x <= 0 (any other x: some number) with a relative error below 1e-15. The standard library's
// differs between systems.
YIVL_ANYWHERE constexpr double exponential(double x) {
    constexpr int kTerms = 13;
    struct Factorials {
        double reciprocals[kTerms];
        YIVL_ANYWHERE constexpr Factorials() : reciprocals{1.0} {
            for (int n = 1; n < kTerms; ++n) reciprocals[n] = reciprocals[n - 1] / n;
        }
    };
    constexpr Factorials factorials;
    constexpr double log2_e = 1.4426950408889634;
    constexpr double ln2_high = 0.693147180369123816490;  // 33 bits, so that k * ln2_high is exact
    constexpr double ln2_low = 1.90821492927058770002e-10;
    constexpr double shift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer in the low bits
    const double shifted = x * log2_e + shift;
    const double k = shifted - shift;
    const double r = (x - k * ln2_high) - k * ln2_low;  // e^x = 2^k e^r, |r| <= ln 2 / 2
    double sum = factorials.reciprocals[kTerms - 1];
    for (int n = kTerms - 1; n-- > 0;) sum = sum * r + factorials.reciprocals[n];
    const uint64_t exponent = __builtin_bit_cast(uint64_t, shifted) + 1023;
    return sum * __builtin_bit_cast(double, exponent << 52);
}

// Weights are whole multiples of 1 / steps, so that sums of V of them are exact in a double, in any order: what the
// most probable id weighs is 1, what weighs less than half a step is never drawn. With V = 64,000 a step is 2^-37.
inline double steps(int64_t n_logits) {
    return static_cast<double>(uint64_t{1} << (53 - std::bit_width(static_cast<uint64_t>(n_logits))));
}

// x >= 0 to the nearest integer, below 2^52.
YIVL_ANYWHERE constexpr double rounded(double x) {
    constexpr double shift = 4503599627370496.0;  // 2^52
    return (x + shift) - shift;
}

}  // namespace drawing

}  // namespace yivl
