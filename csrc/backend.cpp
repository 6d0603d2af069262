#include <charconv>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace yivl {

namespace {

constexpr std::string_view kCuda = "cuda";

// N of "cuda:N"; 0 of "cuda"; -1 of anything else.
int cuda_number(std::string_view device) {
    if (!device.starts_with(kCuda)) return -1;
    device.remove_prefix(kCuda.size());
    if (device.empty()) return 0;
    int number = -1;
    const char* end = device.data() + device.size();
    const bool whole = device.front() == ':' && std::from_chars(device.data() + 1, end, number).ptr == end;
    return whole ? number : -1;
}

}  // namespace

std::unique_ptr<Backend> make_backend(std::string_view device, int n_threads, int64_t needed_bytes) {
    if (device == "cpu") return make_cpu_backend(n_threads);
    if (device == "auto") {
        const char* isa = std::getenv("YIVL_ISA");
        const int chosen = isa == nullptr || *isa == 0 ? choose_cuda_device(needed_bytes) : -1;
        return chosen < 0 ? make_cpu_backend(n_threads) : make_cuda_backend(chosen, needed_bytes);
    }
    const int number = cuda_number(device);
    if (number >= 0) return make_cuda_backend(number, needed_bytes);
    throw std::invalid_argument("device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', found '" + std::string(device) +
                                "'");
}

}  // namespace yivl
