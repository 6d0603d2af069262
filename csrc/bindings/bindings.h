// What the files in this folder share. The bindings convert types and release the GIL; they hold no logic. They are
// compiled as one unit: a name stands in one of them only.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace yivl {

namespace py = pybind11;

void bind_gguf(py::module_& m);
void bind_image(py::module_& m);
void bind_kernels(py::module_& m);
void bind_model(py::module_& m);
void bind_quantize(py::module_& m);
void bind_text(py::module_& m);

struct ImageView;

// (height, width, channels), C-contiguous.
using ImageArray = py::array_t<uint8_t, py::array::c_style>;

// Lives as long as the array. Throws ImageError for any other number of axes.
ImageView view(const ImageArray& image);

// A float32 array of this shape that takes over the vector's memory.
inline py::array_t<float> to_array(std::vector<float>&& values, std::vector<py::ssize_t> shape) {
    auto* owner = new std::vector<float>(std::move(values));
    py::capsule free_owner(owner, [](void* p) { delete static_cast<std::vector<float>*>(p); });
    return py::array_t<float>(std::move(shape), owner->data(), free_owner);
}

}  // namespace yivl
