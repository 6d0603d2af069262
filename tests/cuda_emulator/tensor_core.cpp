// The sums of a tensor core, as exact as the least exact card's: what is computed with them must be good enough there.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>

#include "cuda/device.h"

namespace yivl::cuda::emulator {

namespace {

constexpr uint32_t kInfinity = 0x7f800000;

uint32_t magnitude(float f) { return std::bit_cast<uint32_t>(f) & 0x7fffffff; }

// To 24 bits, toward zero.
int32_t cut_off(int32_t sum) {
    const auto all = static_cast<uint32_t>(std::abs(sum));
    const int bits = std::bit_width(all);
    const int dropped = bits > 24 ? bits - 24 : 0;
    const auto kept = static_cast<int32_t>(all >> dropped << dropped);
    return sum < 0 ? -kept : kept;
}

}  // namespace

// Four products at a time. Each is exact; it and the sum so far are cut off, toward zero, after 24 bits of the largest
// among them, and so is their sum. So Volta's and Turing's do; A100 adds 8 at a time and H100 16, with a few bits more
// (Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021; Khattak and Mikaitis, "Accurate models of NVIDIA
// tensor cores", 2025).
void add_products(float (&d)[8], const float (&a)[16], const float (&b)[16][8]) {
    constexpr int kAtOnce = 4;
    for (int first = 0; first < 16; first += kAtOnce) {
        for (int n = 0; n < 8; ++n) {
            float terms[kAtOnce + 1] = {d[n]};
            for (int k = 0; k < kAtOnce; ++k) terms[k + 1] = a[first + k] * b[first + k][n];
            uint32_t largest = 0;
            for (const float term : terms) largest = std::max(largest, magnitude(term));
            if (largest >= kInfinity) {
                for (int k = 0; k < kAtOnce; ++k) d[n] += terms[k + 1];
                continue;
            }
            // 2^(E - 127) <= largest < 2^(E - 126), and 2^(E - 127 - 23) the unit in which terms are whole. Below
            // 2^-102 units are no smaller.
            const uint32_t exponent = std::max(largest >> 23, uint32_t{25});
            const float unit = std::bit_cast<float>((exponent - 23) << 23);
            const float units_in_one = std::bit_cast<float>((254 + 23 - exponent) << 23);
            int32_t sum = 0;
            for (const float term : terms) sum += static_cast<int32_t>(term * units_in_one);
            d[n] = static_cast<float>(cut_off(sum)) * unit;
        }
    }
}

}  // namespace yivl::cuda::emulator
