#include "buffer.h"

namespace yivl {

Buffer::Buffer(Backend& backend, int64_t rows, int64_t cols)
    : memory_(backend.allocate(static_cast<size_t>(rows) * static_cast<size_t>(cols) * sizeof(float))),
      rows_(rows),
      cols_(cols) {}

}  // namespace yivl
