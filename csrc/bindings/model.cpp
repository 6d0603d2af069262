#include "bindings.h"

namespace yivl {

void bind_model(py::module_&) {}

}  // namespace yivl
