// In a build without CUDA.
#include "errors.h"
#include "ops.h"

namespace yivl {

std::unique_ptr<Backend> make_cuda_backend(int, int64_t) {
    throw DeviceError("CUDA: this build of yivl-edge has none; build it where a CUDA toolkit 12.4 or newer is found");
}

int choose_cuda_device(int64_t) { return -1; }

}  // namespace yivl
