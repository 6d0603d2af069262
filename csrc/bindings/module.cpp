#include "bindings.h"
#include "errors.h"

PYBIND11_MODULE(_core, m) {
    using namespace yivl;
    m.doc() = "The native core of yivl_edge. Private: use yivl_edge.Model.";

    py::register_exception<ModelFileError>(m, "ModelFileError", PyExc_ValueError);
    py::register_exception<ImageError>(m, "ImageError", PyExc_ValueError);
    py::register_exception<ContextOverflowError>(m, "ContextOverflowError", PyExc_ValueError);
    py::register_exception<DeviceError>(m, "DeviceError", PyExc_RuntimeError);
    py::register_exception<Cancelled>(m, "Cancelled", PyExc_RuntimeError);
    py::register_exception_translator([](std::exception_ptr e) {
        try {
            if (e) std::rethrow_exception(e);
        } catch (const std::system_error& refused) {
            PyErr_SetString(PyExc_OSError, refused.what());
        }
    });

    bind_gguf(m);
    bind_image(m);
    bind_kernels(m);
    bind_model(m);
    bind_quantize(m);
    bind_text(m);
}
