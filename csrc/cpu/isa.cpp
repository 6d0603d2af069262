#include "cpu/isa.h"

#include <stdexcept>
#include <string>

namespace yivl {

std::vector<const Kernels*> available_kernels() { return {&kPortableKernels}; }

const Kernels& choose_kernels(std::string_view name) {
    const std::vector<const Kernels*> available = available_kernels();
    if (name.empty()) return *available.front();
    std::string names;
    for (const Kernels* kernels : available) {
        if (kernels->name == name) return *kernels;
        names += names.empty() ? "" : ", ";
        names += kernels->name;
    }
    throw std::invalid_argument("instruction set \"" + std::string(name) +
                                "\" is not available here; available: " + names);
}

}  // namespace yivl
