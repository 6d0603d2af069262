// Weights as float32, for every type: the definition that all faster paths must reproduce bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quant_blocks.h"

namespace yivl {

// dst[0..n) = the n weights that begin at `src`; n is a multiple of the type's block.
void dequantize_row(WeightType type, const std::byte* src, float* dst, int64_t n);

}  // namespace yivl
