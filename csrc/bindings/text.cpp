#include "bindings.h"

namespace yivl {

void bind_text(py::module_&) {}

}  // namespace yivl
