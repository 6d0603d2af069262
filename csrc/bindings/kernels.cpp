#include "bindings.h"

namespace yivl {

void bind_kernels(py::module_&) {}

}  // namespace yivl
