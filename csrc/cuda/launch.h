// The one way to start a kernel.
#pragma once

#include "cuda/device.h"
#include "cuda/profile.h"
#include "cuda/runtime.h"

#ifdef __CUDACC__
#include "cuda/check.h"
#endif

namespace yivl::cuda {

struct Grid {
    int64_t x = 1, y = 1, z = 1;  // blocks; y and z at most 65535
};

// Starts `kernel` on every thread of the grid, after the stream's earlier work but for what it does before
// wait_for_earlier_kernels: launch(stream, "name", kernel, grid, threads, dynamic shared bytes, arguments...). A grid
// without blocks starts nothing. Throws DeviceError naming the kernel. An error inside a kernel shows at a later call
// of the stream.
template <class... Parameters, class... Arguments>
void launch([[maybe_unused]] Stream& stream, const char* name, void (*kernel)(Parameters...), Grid grid, int threads,
            size_t dynamic_shared, Arguments... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    const Work work = stream.take_work();
    std::unique_ptr<Event> begin = stream.profile == nullptr ? nullptr : Profile::mark(stream);
#ifdef __CUDACC__
    const OnDevice here(stream.device());
    // More than this must be asked for, once for each kernel and device; asking again costs little.
    constexpr size_t kWithoutAsking = 48 << 10;
    if (dynamic_shared > kWithoutAsking) {
        check(
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_shared)),
            name);
    }
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = {static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z)};
    config.blockDim = {static_cast<unsigned>(threads), 1, 1};
    config.dynamicSmemBytes = dynamic_shared;
    config.stream = static_cast<cudaStream_t>(stream.handle());
    config.attrs = &early;
    config.numAttrs = stream.overlaps_kernels() && stream.profile == nullptr ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
#else
    (emulator::check_argument(name, arguments), ...);
    const emulator::Index blocks{static_cast<int>(grid.x), static_cast<int>(grid.y), static_cast<int>(grid.z)};
    emulator::start(stream.handle(),
                    {name, blocks, threads, dynamic_shared, [=] { kernel(static_cast<Parameters>(arguments)...); }});
#endif
    if (begin != nullptr) stream.profile->add(stream, name, work, std::move(begin));
}

}  // namespace yivl::cuda
