// In a build without CUDA.
#include "errors.h"
#include "ops.h"

namespace yivl {

namespace {

[[noreturn]] void missing() {
    throw DeviceError("CUDA: this build of yivl-edge has none; build it where a CUDA toolkit 12.4 or newer is found");
}

}  // namespace

int cuda_device_count() { missing(); }
DeviceMemory cuda_memory(int) { missing(); }
std::unique_ptr<Backend> make_cuda_backend(int, int64_t) { missing(); }

}  // namespace yivl
