// When the memory of the emulated device may be touched.
#pragma once

namespace yivl::cuda::emulator {

// Lets this process read and write device memory as long as one of them lives.
class DeviceAccess {
public:
    DeviceAccess();
    ~DeviceAccess();
    DeviceAccess(const DeviceAccess&) = delete;
    DeviceAccess& operator=(const DeviceAccess&) = delete;
};

// 10 * major + minor of the emulated card.
int capability();

// Throws what YIVL_EMULATOR_FAIL asks for: see docs/cuda.md. Before every launch.
void fail_launch_if_asked(const char* kernel);

}  // namespace yivl::cuda::emulator
