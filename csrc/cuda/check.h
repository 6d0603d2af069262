// Results of the CUDA runtime become exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "errors.h"

namespace yivl::cuda {

// `what`: the kernel or the call. An error can also come from work that was started before.
inline void check(cudaError_t result, const char* what) {
    if (result == cudaSuccess) return;
    cudaGetLastError();  // so that the next call does not report it again
    throw DeviceError("CUDA: " + std::string(what) + ": " + cudaGetErrorString(result) + " (" +
                      cudaGetErrorName(result) + ")");
}

}  // namespace yivl::cuda
