#include "buffer.h"

namespace yivl {

Buffer::Buffer(Backend& backend, int64_t rows, int64_t cols, int64_t stride)
    : memory_(backend.allocate(static_cast<size_t>(rows) * static_cast<size_t>(stride) * sizeof(float))),
      rows_(rows),
      cols_(cols),
      stride_(stride) {}

}  // namespace yivl
