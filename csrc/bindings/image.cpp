#include "image.h"

#include "bindings.h"

namespace yivl {
namespace {

py::array_t<uint8_t> image_array(Image&& image) {
    auto* owner = new Image(std::move(image));
    py::capsule free_owner(owner, [](void* p) { delete static_cast<Image*>(p); });
    return py::array_t<uint8_t>({owner->height, owner->width, int64_t{3}}, owner->data.data(), free_owner);
}

}  // namespace

ImageView view(const ImageArray& image) {
    if (image.ndim() != 3) {
        throw ImageError("expected an array (height, width, channels), found " + std::to_string(image.ndim()) +
                         " dimensions");
    }
    return {image.shape(1), image.shape(0), image.shape(2), {image.data(), static_cast<size_t>(image.size())}};
}

void bind_image(py::module_& m) {
    using namespace py::literals;

    py::class_<PreprocessConfig>(m, "PreprocessConfig")
        .def(py::init([](int64_t image_size, bool pad, std::array<uint8_t, 3> pad_color, std::array<float, 3> mean,
                         std::array<float, 3> std) { return PreprocessConfig{image_size, pad, pad_color, mean, std}; }),
             py::kw_only(), "image_size"_a, "pad"_a, "pad_color"_a, "mean"_a, "std"_a)
        .def_readonly("image_size", &PreprocessConfig::image_size)
        .def_readonly("pad", &PreprocessConfig::pad)
        .def_readonly("pad_color", &PreprocessConfig::pad_color)
        .def_readonly("mean", &PreprocessConfig::mean)
        .def_readonly("std", &PreprocessConfig::std);

    m.def(
        "fit",
        [](const ImageArray& image, const PreprocessConfig& config) {
            const ImageView input = view(image);
            return image_array([&] {
                py::gil_scoped_release release;
                Control control;
                return fit(input, config, control);
            }());
        },
        py::arg("image").noconvert(), "config"_a,
        "uint8 (H, W, 3) or (H, W, 4) -> uint8 (S, S, 3): padded or cropped, and resized.");
    m.def(
        "resize_bicubic",
        [](const ImageArray& image, int64_t width, int64_t height) {
            const ImageView input = view(image);
            return image_array([&] {
                py::gil_scoped_release release;
                Control control;
                return resize_bicubic(input, width, height, control);
            }());
        },
        py::arg("image").noconvert(), "width"_a, "height"_a, "uint8 (H, W, 3) -> uint8 (height, width, 3).");
    m.def(
        "preprocess",
        [](const ImageArray& image, const PreprocessConfig& config) {
            const ImageView input = view(image);
            std::vector<float> pixels;
            {
                py::gil_scoped_release release;
                Control control;
                pixels = preprocess(input, config, control);
            }
            return to_array(std::move(pixels), {3, config.image_size, config.image_size});
        },
        py::arg("image").noconvert(), "config"_a,
        "uint8 (H, W, 3) or (H, W, 4) -> float32 (3, S, S): fitted and normalised.");
}

}  // namespace yivl
