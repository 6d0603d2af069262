#include "bindings.h"

namespace yivl {

void bind_gguf(py::module_&) {}

}  // namespace yivl
