#include "bindings.h"

namespace yivl {

void bind_image(py::module_&) {}

}  // namespace yivl
