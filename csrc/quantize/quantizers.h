// What one instruction set offers for making weights small. Every set computes the same bytes: lanes hold different
// groups of weights, so that no sum depends on how many lanes there are, and nothing is fused.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quant_blocks.h"

namespace yivl {

// A matrix as one sequence of blocks.
struct QuantizeSource {
    const float* values;      // finite
    const float* importance;  // (columns,), positive, about 1 on average over every block of a row
    bool weighted;            // whether it says anything: if not, all of it is 1
    int64_t columns;          // a whole number of blocks
};

struct Quantizers {
    // Blocks [begin, end) of the matrix; dst is where block `begin` goes.
    void (*quantize)(WeightType type, const QuantizeSource& source, int64_t begin, int64_t end, std::byte* dst);
};

extern const Quantizers kPortableQuantizers;
extern const Quantizers kAvx2Quantizers;
extern const Quantizers kAvx512Quantizers;

}  // namespace yivl
