// float32 weights in the bytes of any weight type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "control.h"
#include "quant_blocks.h"

namespace yivl {

// A matrix, rows side by side.
struct QuantizeInput {
    std::span<const float> values;      // (rows, columns)
    std::span<const float> importance;  // (columns,), or empty
    int64_t columns;
};

// Fills dst, whose size must be that of the matrix in that type, with the blocks that keep sum w (x - x')^2 small, w
// being the importance of the column or 1. Importance that is all zero counts as none, and its scale does not matter.
// Q8_0, F16, BF16 and, without importance, Q4_0 are rounded as everywhere else (gguf.quants), except that what a half
// cannot hold becomes the largest half and never infinite. The bytes are the same for any number of threads (0: one per
// physical core) and any instruction set (YIVL_ISA chooses).
//
// Throws std::invalid_argument for columns that are no whole number of blocks, for sizes that do not match, for values
// that are not finite and for importance that is negative or not finite.
void quantize(WeightType type, const QuantizeInput& input, std::span<std::byte> dst, int n_threads, Control& control);

}  // namespace yivl
