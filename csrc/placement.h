// Which backends a model computes with, and what runs where.
#pragma once

#include <memory>
#include <optional>
#include <string_view>

#include "control.h"
#include "ops.h"
#include "plan.h"

namespace yivl {

struct Placement {
    std::unique_ptr<Backend> backend = nullptr;  // of all but the layers that stay on the CPU
    std::unique_ptr<Backend> cpu = nullptr;      // of the decoder's first n_cpu_layers; null if there are none
    int64_t n_cpu_layers = 0;
    int64_t n_gpu_layers = 0;  // of a GPU's backend; 0 without one
};

// `device`: "cpu"; "cuda" or "cuda:1", with as many of the decoder's layers as its free memory has room for, or with
// `n_gpu_layers` of them; or "auto", which is the first GPU that all layers fit, or `n_gpu_layers`, and else the CPU
// (as where YIVL_ISA chooses the CPU's instruction set). Throws std::invalid_argument for another name or a number of
// layers that there is not, DeviceError or AllocationError for a device that cannot be used. Logs why "auto" takes
// none.
Placement place_model(std::string_view device, std::optional<int64_t> n_gpu_layers, int n_threads,
                      const MemoryPlan& plan, Control& control);

// The number of a CUDA device by its name: N of "cuda:N", 0 of "cuda", -1 of anything else.
int cuda_number(std::string_view device);

}  // namespace yivl
