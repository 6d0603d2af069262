// Which instruction set to use: decided once per backend, from what the CPU and the operating system offer.
#pragma once

#include <string_view>
#include <vector>

#include "cpu/kernels.h"

namespace yivl {

extern const Kernels kPortableKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx2VnniKernels;  // the same, quicker on quantised weights
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;  // quicker on quantised weights
extern const Kernels kAvx512VnniSumsKernels;
extern const Kernels kAvx512VnniSumsManyLinesKernels;
extern const PackedKernels kAmxPackedKernels;
extern const PackedAttention kAmxAttentionKernels;
extern const Kernels kNeonKernels;
extern const Kernels kNeonDotprodKernels;  // quicker on quantised weights
extern const Kernels kNeonI8mmKernels;     // quicker still

// The kernel tables that this CPU can run, best first.
std::vector<const Kernels*> available_kernels();

// The table of that name; an empty name takes the best. Throws std::invalid_argument if the name is unknown, or if the
// CPU or this build lacks it.
const Kernels& choose_kernels(std::string_view name);

// The table that YIVL_ISA in the environment names; the best without it.
const Kernels& default_kernels();

}  // namespace yivl
