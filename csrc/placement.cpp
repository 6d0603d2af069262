#include "placement.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace yivl {

namespace {

Placement on_cpu(int n_threads) { return {.backend = make_cpu_backend(n_threads)}; }

Placement on_cuda(int device, int64_t n_gpu_layers, int n_threads, const MemoryPlan& plan) {
    Placement placement{.backend = make_cuda_backend(device, plan.weights_on_device(n_gpu_layers)),
                        .n_cpu_layers = plan.n_layers() - n_gpu_layers,
                        .n_gpu_layers = n_gpu_layers};
    if (placement.n_cpu_layers > 0) placement.cpu = make_cpu_backend(n_threads);
    return placement;
}

std::string megabytes(int64_t bytes) { return std::to_string((bytes + 999'999) / 1'000'000) + " MB"; }

// The first that so much fits; -1: none.
int roomy_cuda_device(int64_t needed_bytes, Control& control) {
    // No driver, or a card that cannot be used: nobody asked for one.
    const auto or_else = [&](auto&& ask, auto without) {
        try {
            return ask();
        } catch (const DeviceError& e) {
            control.log(std::string("no GPU: ") + e.what());
            return without;
        }
    };
    const int count = or_else(cuda_device_count, 0);
    for (int device = 0; device < count; ++device) {
        const auto has_room = [&] {
            const DeviceMemory memory = cuda_memory(device);
            if (memory.emulated) return false;
            if (needed_bytes <= memory.free_bytes) return true;
            control.log("not device cuda:" + std::to_string(device) + " (" + memory.name + "): the model needs " +
                        megabytes(needed_bytes) + " of its memory, " + megabytes(memory.free_bytes) + " are free");
            return false;
        };
        if (or_else(has_room, false)) return device;
    }
    return -1;
}

[[noreturn]] void does_not_fit(int device, const DeviceMemory& memory, int64_t n_gpu_layers, const MemoryPlan& plan) {
    throw AllocationError("device cuda:" + std::to_string(device) + " (" + memory.name + "): with " +
                          std::to_string(n_gpu_layers) + " of the decoder's " + std::to_string(plan.n_layers()) +
                          " layers the model needs " + megabytes(plan.on_device(n_gpu_layers)) + " of its memory, " +
                          megabytes(memory.free_bytes) + " of " + megabytes(memory.total_bytes) + " are free; " +
                          (n_gpu_layers > 0 ? "fewer layers (n_gpu_layers) or " : "") + "a smaller n_ctx needs less");
}

}  // namespace

int cuda_number(std::string_view device) {
    constexpr std::string_view kCuda = "cuda";
    if (!device.starts_with(kCuda)) return -1;
    device.remove_prefix(kCuda.size());
    if (device.empty()) return 0;
    int number = -1;
    const char* end = device.data() + device.size();
    const bool whole = device.front() == ':' && std::from_chars(device.data() + 1, end, number).ptr == end;
    return whole ? number : -1;
}

Placement place_model(std::string_view device, std::optional<int64_t> n_gpu_layers, int n_threads,
                      const MemoryPlan& plan, Control& control) {
    const int64_t most = device == "cpu" ? 0 : plan.n_layers();
    if (n_gpu_layers && (*n_gpu_layers < 0 || *n_gpu_layers > most)) {
        throw std::invalid_argument("n_gpu_layers: expected 0 " +
                                    (device == "cpu" ? "or None" : "to " + std::to_string(most)) + " with device '" +
                                    std::string(device) + "', found " + std::to_string(*n_gpu_layers));
    }
    if (device == "cpu") return on_cpu(n_threads);
    if (device == "auto") {
        const char* isa = std::getenv("YIVL_ISA");
        const int64_t n = n_gpu_layers.value_or(plan.n_layers());
        const int chosen = isa == nullptr || *isa == 0 ? roomy_cuda_device(plan.on_device(n), control) : -1;
        return chosen < 0 ? on_cpu(n_threads) : on_cuda(chosen, n, n_threads, plan);
    }
    const int number = cuda_number(device);
    if (number < 0) {
        throw std::invalid_argument("device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', found '" +
                                    std::string(device) + "'");
    }
    const DeviceMemory memory = cuda_memory(number);
    const int64_t fitting = plan.most_layers(memory.free_bytes);
    const int64_t wanted = n_gpu_layers.value_or(std::max<int64_t>(fitting, 0));
    if (wanted > fitting) does_not_fit(number, memory, wanted, plan);
    return on_cuda(number, wanted, n_threads, plan);
}

}  // namespace yivl
