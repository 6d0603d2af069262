#include "cuda/runtime.h"

#include "cuda/check.h"
#include "cuda/kernels.h"

namespace yivl::cuda {

namespace {

std::string version_text(int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

void copy_rows(Stream& stream, void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
               size_t rows, cudaMemcpyKind kind) {
    if (width == 0 || rows == 0) return;
    const OnDevice here(stream.device());
    const auto handle = static_cast<cudaStream_t>(stream.handle());
    // The runtime takes no pitch beyond 2 GiB.
    const bool side_by_side = rows == 1 || (to_pitch == width && from_pitch == width);
    check(side_by_side ? cudaMemcpyAsync(to, from, width * rows, kind, handle)
                       : cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, width, rows, kind, handle),
          "copying");
}

}  // namespace

int device_count() {
    int driver = 0, runtime = 0;
    check(cudaRuntimeGetVersion(&runtime), "asking for the runtime's version");
    check(cudaDriverGetVersion(&driver), "asking for the driver's version");
    if (driver == 0) throw DeviceError("CUDA: expected an NVIDIA driver, found none");
    int count = 0;
    const cudaError_t result = cudaGetDeviceCount(&count);
    if (result == cudaErrorInsufficientDriver) {
        cudaGetLastError();
        throw DeviceError("CUDA: expected a driver for CUDA " + version_text(runtime) + ", found one for CUDA " +
                          version_text(driver));
    }
    if (result != cudaErrorNoDevice) check(result, "looking for devices");
    cudaGetLastError();
    if (count == 0) throw DeviceError("CUDA: expected an NVIDIA GPU, found none");
    return count;
}

DeviceInfo device_info(int device) {
    const int count = device_count();
    if (device < 0 || device >= count) {
        throw DeviceError("CUDA: expected a device from 0 to " + std::to_string(count - 1) + ", found " +
                          std::to_string(device));
    }
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, device), "asking for the device's properties");
    const OnDevice here(device);
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "asking for free memory");
    return {properties.name,
            10 * properties.major + properties.minor,
            properties.multiProcessorCount,
            static_cast<int64_t>(total),
            static_cast<int64_t>(free),
            false};
}

std::byte* allocate(int device, size_t bytes) {
    const OnDevice here(device);
    void* memory = nullptr;
    const cudaError_t result = cudaMalloc(&memory, bytes);
    if (result == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        size_t free = 0, total = 0;
        check(cudaMemGetInfo(&free, &total), "asking for free memory");
        throw AllocationError("CUDA: cannot allocate " + std::to_string(bytes) + " bytes on device " +
                              std::to_string(device) + ", which has " + std::to_string(free) + " of " +
                              std::to_string(total) + " free");
    }
    check(result, "allocating memory");
    return static_cast<std::byte*>(memory);
}

void release(int device, std::byte* memory) noexcept {
    // At the process's end the runtime may be gone before us; the memory is then free already.
    const OnDevice here(device, std::nothrow);
    if (cudaFree(memory) != cudaSuccess) cudaGetLastError();
}

Stream::Stream(int device) : device_(device) {
    const OnDevice here(device_);
    // Older drivers cannot record it, and code for older cards does not wait.
    constexpr int kOldestDriver = 12040, kOldestMajor = 9;
    int driver = 0, major = 0;
    [[maybe_unused]] int minor = 0;
    check(cudaDriverGetVersion(&driver), "asking for the driver's version");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_), "asking for its capability");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_), "asking for its capability");
    overlaps_kernels_ = driver >= kOldestDriver && major >= kOldestMajor && code_capability() >= 10 * kOldestMajor;
#ifdef YIVL_HAS_WARPGROUP_CODE
    has_warpgroups_ = major == 9 && minor == 0;
#endif
    cudaStream_t stream;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
    handle_ = stream;
}

Stream::~Stream() {
    const OnDevice here(device_, std::nothrow);
    if (cudaStreamDestroy(static_cast<cudaStream_t>(handle_)) != cudaSuccess) cudaGetLastError();
}

void Stream::copy_in(void* to, size_t to_pitch, const void* host, size_t host_pitch, size_t width, size_t rows) {
    // Up to 64 KiB of pageable memory are taken when the call returns, though they may not have arrived; where the
    // device can read such memory itself, that is not promised of more.
    constexpr size_t kTakenAtOnce = 64 << 10;
    copy_rows(*this, to, to_pitch, host, host_pitch, width, rows, cudaMemcpyHostToDevice);
    if (width * rows > kTakenAtOnce) synchronize();
}

void Stream::copy_out(void* host, size_t host_pitch, const void* from, size_t from_pitch, size_t width, size_t rows) {
    copy_rows(*this, host, host_pitch, from, from_pitch, width, rows, cudaMemcpyDeviceToHost);
    synchronize();
}

void Stream::copy(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows) {
    copy_rows(*this, to, to_pitch, from, from_pitch, width, rows, cudaMemcpyDeviceToDevice);
}

void Stream::synchronize() {
    const OnDevice here(device_);
    check(cudaStreamSynchronize(static_cast<cudaStream_t>(handle_)), "waiting for the device");
}

Graph::~Graph() {
    if (handle_ == nullptr) return;
    const OnDevice here(device_, std::nothrow);
    if (cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(handle_)) != cudaSuccess) cudaGetLastError();
}

void Graph::record(Stream& stream, const std::function<void()>& work) {
    const OnDevice here(device_);
    const auto handle = static_cast<cudaStream_t>(stream.handle());
    // Relaxed: a Control may run Python meanwhile, which may drop a session, and giving back memory must not fail.
    check(cudaStreamBeginCapture(handle, cudaStreamCaptureModeRelaxed), "beginning to record");
    cudaGraph_t graph = nullptr;
    try {
        work();
    } catch (...) {
        if (cudaStreamEndCapture(handle, &graph) == cudaSuccess) cudaGraphDestroy(graph);
        cudaGetLastError();
        throw;
    }
    check(cudaStreamEndCapture(handle, &graph), "ending to record");
    cudaGraphExec_t ready = nullptr;
    const cudaError_t result = cudaGraphInstantiate(&ready, graph, 0);
    cudaGraphDestroy(graph);
    check(result, "preparing what was recorded");
    handle_ = ready;
}

void Graph::start(Stream& stream) {
    const OnDevice here(device_);
    check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(handle_), static_cast<cudaStream_t>(stream.handle())),
          "starting what was recorded");
}

Event::Event(int device, Kind kind) : device_(device) {
    const OnDevice here(device_);
    cudaEvent_t event;
    check(cudaEventCreateWithFlags(&event, kind == timed ? cudaEventDefault : cudaEventDisableTiming),
          "making an event");
    handle_ = event;
}

Event::~Event() {
    const OnDevice here(device_, std::nothrow);
    if (cudaEventDestroy(static_cast<cudaEvent_t>(handle_)) != cudaSuccess) cudaGetLastError();
}

void Event::record(Stream& stream) {
    const OnDevice here(device_);
    check(cudaEventRecord(static_cast<cudaEvent_t>(handle_), static_cast<cudaStream_t>(stream.handle())),
          "recording an event");
}

void Event::wait() {
    const OnDevice here(device_);
    check(cudaEventSynchronize(static_cast<cudaEvent_t>(handle_)), "waiting for the device");
}

double seconds_between(Event& begin, Event& end) {
    float milliseconds = 0.0f;
    check(cudaEventElapsedTime(&milliseconds, static_cast<cudaEvent_t>(begin.handle_),
                               static_cast<cudaEvent_t>(end.handle_)),
          "timing");
    return double{milliseconds} * 1e-3;
}

}  // namespace yivl::cuda
