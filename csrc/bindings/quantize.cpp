#include "quantize/quantize.h"

#include <algorithm>
#include <cctype>

#include "bindings.h"
#include "cpu/threads.h"

namespace yivl {

namespace {

using PlainFloats = py::array_t<float, py::array::c_style>;

const TypeInfo& type_called(std::string name) {
    std::ranges::transform(name, name.begin(), [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
    if (const TypeInfo* info = find_type(name)) return *info;
    std::string known;
    for (const TypeInfo& info : weight_types()) known += (known.empty() ? "" : ", ") + std::string(info.name);
    throw std::invalid_argument("unknown weight type \"" + name + "\", expected one of " + known);
}

// Without a conversion: from float64 it could make infinities.
PlainFloats float_array(const py::object& array, const char* name) {
    if (!py::isinstance<py::array_t<float>>(array)) {
        const py::object found =
            py::isinstance<py::array>(array) ? array.attr("dtype") : py::type::of(array).attr("__name__");
        throw py::type_error(std::string(name) + ": expected a float32 array, found " +
                             py::cast<std::string>(py::str(found)));
    }
    return PlainFloats::ensure(array);
}

std::span<const float> span(const PlainFloats& array) { return {array.data(), static_cast<size_t>(array.size())}; }

py::array_t<uint8_t> quantize_array(const py::object& array, const std::string& type,
                                    const std::optional<py::object>& importance, std::optional<int> n_threads) {
    const TypeInfo& info = type_called(type);
    const PlainFloats values = float_array(array, "array");
    if (values.ndim() != 1 && values.ndim() != 2) {
        throw std::invalid_argument("array must have the shape (rows, columns) or (columns,), found " +
                                    std::to_string(values.ndim()) + " dimensions");
    }
    if (n_threads && *n_threads < 1) {
        throw std::invalid_argument("n_threads must be at least 1, found " + std::to_string(*n_threads));
    }
    const py::ssize_t rows = values.ndim() == 2 ? values.shape(0) : 1, columns = values.shape(values.ndim() - 1);
    QuantizeInput input{span(values), {}, columns};
    PlainFloats weights;
    if (importance) {
        weights = float_array(*importance, "importance");
        if (weights.ndim() != 1 || weights.shape(0) != columns) {
            std::string shape = py::cast<std::string>(py::str(importance->attr("shape")));
            throw std::invalid_argument("importance must have one value per column, expected the shape (" +
                                        std::to_string(columns) + ",), found " + shape);
        }
        input.importance = span(weights);
    }
    py::array_t<uint8_t> bytes({rows, columns / info.block * info.bytes});
    const std::span dst{reinterpret_cast<std::byte*>(bytes.mutable_data()), static_cast<size_t>(bytes.size())};
    Control control;
    control.poll = [] {
        const py::gil_scoped_acquire gil;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    };
    {
        const py::gil_scoped_release release;
        quantize(info.type, input, dst, n_threads.value_or(0), control);
    }
    return bytes;
}

}  // namespace

void bind_quantize(py::module_& m) {
    m.def("quantize", &quantize_array, py::arg("array"), py::arg("type"), py::arg("importance") = py::none(),
          py::kw_only(), py::arg("n_threads") = py::none(),
          R"(Weights in the bytes of a GGUF weight type.

Args:
    array: float32, (rows, columns), or (columns,) for one row. Finite; columns a multiple of the type's block: 256 for
        the K types and IQ4_XS, 32 for the others, 1 for F32, F16 and BF16.
    type: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL or IQ4_XS, in any case.
    importance: float32, (columns,), not negative: how much an error in each column matters. What is kept small is
        sum importance * (array - result)^2. None or all zero: every column the same. Without effect on F32, F16, BF16 and
        Q8_0.
    n_threads: Threads that compute; None: one per physical core. The result does not depend on it.

Returns:
    uint8, (rows, bytes per row): what `gguf.quants.dequantize` reads. Scales that half precision cannot hold become the
    largest half, so that the result is finite.

Raises:
    ValueError: An argument outside what is said here; the message has what was expected and what was found.
    TypeError: An array that is not float32.)");
}

}  // namespace yivl
