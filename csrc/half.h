// IEEE half precision, held as its bits. Static, not inline: kernels for one instruction set may call these, and their
// objects share nothing with the linker.
#pragma once

#include <cstdint>

#include "quant_blocks.h"

namespace yivl {

inline constexpr float kHalfMax = 65504.0f;

// Exact for every half, subnormals included: the multiplication moves the exponent from a bias of 15 to one of 127.
[[maybe_unused]] static float half_to_float(half_bits h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
    const float scaled = __builtin_bit_cast(float, magnitude) * 0x1p112f;
    const uint32_t not_finite = (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;
    return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, scaled) | not_finite | sign);
}

// The nearest half, ties to even; what is finite stays finite: beyond the largest half comes the largest half.
[[maybe_unused]] static half_bits half_from_float(float value) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    const uint32_t sign = bits >> 16 & 0x8000;
    uint32_t magnitude = bits & 0x7fffffff;
    constexpr uint32_t kLargest = 0x477fe000;  // 65504
    magnitude = magnitude < kLargest ? magnitude : kLargest;
    // The last place of 0.5 is that of a subnormal half: the addition rounds.
    const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
    const uint32_t subnormal = __builtin_bit_cast(uint32_t, shifted) - 0x3f000000;
    const uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    return static_cast<half_bits>(sign | (magnitude < 0x38800000 ? subnormal : normal));
}

}  // namespace yivl
