// A matrix of activations or small weights, in the memory of a backend.
#pragma once

#include "ops.h"

namespace yivl {

// On the CPU the memory is not touched, so pages cost nothing until they are used.
class Buffer {
public:
    Buffer() = default;
    Buffer(Backend& backend, int64_t rows, int64_t cols);
    Mat view() const { return {reinterpret_cast<float*>(memory_.get()), rows_, cols_}; }
    Mat rows(int64_t count) const { return view().row_range(0, count); }

private:
    Memory memory_;
    int64_t rows_ = 0;
    int64_t cols_ = 0;
};

}  // namespace yivl
