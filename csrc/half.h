// IEEE half precision, held as its bits. Static, not inline: kernels for one instruction set may call these, and their
// objects share nothing with the linker.
#pragma once

#include <cstdint>

#include "quant_blocks.h"

namespace yivl {

inline constexpr float kHalfMax = 65504.0f;

// Exact for every half, subnormals included, which no float here is: a process that embeds this may have the CPU take
// such floats for zeros, as whatever was linked with -ffast-math by GCC before 13 does when it is loaded.
[[maybe_unused]] static float half_to_float(half_bits h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, magnitude = h & 0x7fff;
    // The last place of 0.5 is that of a subnormal half.
    const float subnormal = __builtin_bit_cast(float, 0x3f000000 | magnitude) - 0.5f;
    // From a bias of 15 to one of 127; what is not finite to the largest exponent.
    const uint32_t normal = (magnitude << 13) + ((magnitude < 0x7c00 ? 112u : 224u) << 23);
    return __builtin_bit_cast(float, (magnitude < 0x400 ? __builtin_bit_cast(uint32_t, subnormal) : normal) | sign);
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
