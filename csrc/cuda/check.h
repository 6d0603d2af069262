// Results of the CUDA runtime become exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <new>
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

// A device is the calling thread's as long as this lives; then the one before is again, which others in the process who
// use CUDA count on.
class OnDevice {
public:
    explicit OnDevice(int device) : OnDevice(device, std::nothrow) { check(result_, "choosing the device"); }
    // For destructors: without a device, what follows fails by itself.
    OnDevice(int device, std::nothrow_t) noexcept {
        result_ = cudaGetDevice(&before_);
        if (result_ != cudaSuccess || before_ == device) return;
        result_ = cudaSetDevice(device);
        changed_ = result_ == cudaSuccess;
    }
    ~OnDevice() {
        if (changed_ && cudaSetDevice(before_) != cudaSuccess) cudaGetLastError();
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

private:
    cudaError_t result_;
    int before_ = 0;
    bool changed_ = false;
};

}  // namespace yivl::cuda
