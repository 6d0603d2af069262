#include "gguf.h"

#include <pybind11/stl/filesystem.h>

#include "bindings.h"
#include "config.h"
#include "ops.h"
#include "plan.h"
#include "state.h"
#include "tokenizer.h"

namespace yivl {

namespace {

struct PyGguf {
    std::shared_ptr<const GgufFile> file;
    py::object bytes;  // what parse() was given, kept alive
};

struct PyTensor {
    PyGguf owner;
    const GgufTensor* tensor;
};

struct ToPython {
    template <class Scalar>
    py::object operator()(const Scalar& value) const {
        return py::cast(value);
    }
    py::object operator()(const GgufArray& array) const {
        return std::visit(
            [](const auto& items) -> py::object {
                py::list list(items.size());
                size_t i = 0;
                for (const auto item : items) list[i++] = py::cast(item);
                return list;
            },
            array.items);
    }
};

PyGguf open_file(const std::filesystem::path& path) {
    py::gil_scoped_release release;
    return {GgufFile::open(path.string()), {}};
}

PyGguf parse_bytes(const py::bytes& bytes, const std::string& name) {
    const std::string_view text = bytes;
    return {GgufFile::parse(std::as_bytes(std::span(text)), name), bytes};
}

py::dict metadata(const PyGguf& self) {
    py::dict dict;
    for (const auto& [key, value] : self.file->metadata()) dict[py::cast(key)] = std::visit(ToPython{}, value);
    return dict;
}

std::vector<PyTensor> tensors(const PyGguf& self) {
    std::vector<PyTensor> list;
    for (const GgufTensor& tensor : self.file->tensors()) list.push_back({self, &tensor});
    return list;
}

// uint8 (nbytes), a read-only view of the file.
py::array_t<uint8_t> tensor_data(const py::object& self) {
    const std::span<const std::byte> data = self.cast<const PyTensor&>().tensor->data;
    py::array_t<uint8_t> view(static_cast<py::ssize_t>(data.size()), reinterpret_cast<const uint8_t*>(data.data()),
                              self);
    view.attr("flags").attr("writeable") = false;
    return view;
}

void bind_inspection(py::module_& m) {
    py::class_<TokenizerConfig>(m, "TokenizerConfig", "What a file says of its tokeniser.")
        .def_readonly("pieces", &TokenizerConfig::pieces)
        .def_property_readonly("types",
                               [](const TokenizerConfig& c) {
                                   std::vector<int32_t> numbers;
                                   for (const PieceType type : c.types) numbers.push_back(static_cast<int32_t>(type));
                                   return numbers;
                               })
        .def_readonly("bos_id", &TokenizerConfig::bos_id)
        .def_readonly("eos_id", &TokenizerConfig::eos_id)
        .def_readonly("unk_id", &TokenizerConfig::unk_id)
        .def_readonly("add_bos", &TokenizerConfig::add_bos)
        .def_readonly("add_eos", &TokenizerConfig::add_eos)
        .def_readonly("add_dummy_prefix", &TokenizerConfig::add_dummy_prefix)
        .def_readonly("remove_extra_whitespaces", &TokenizerConfig::remove_extra_whitespaces)
        .def_readonly("special_ids", &TokenizerConfig::special_ids);
    m.def(
        "read_config",
        [](const PyGguf& text, const std::optional<PyGguf>& vision) {
            return read_config(*text.file, vision ? vision->file.get() : nullptr);
        },
        py::arg("text"), py::arg("vision") = py::none());
    m.def(
        "read_vision_config", [](const PyGguf& vision) { return read_vision_config(*vision.file); }, py::arg("vision"),
        "The vision half alone; the decoder's part of the result means nothing.");
    m.def(
        "read_tokenizer_config", [](const PyGguf& text) { return Tokenizer::read_config(*text.file); },
        py::arg("text"));
    m.def(
        "memory_needed",
        [](const Config& c, int64_t n_ctx) {
            const int64_t batch = std::min(kDefaultBatch, n_ctx);
            return std::tuple(DecoderState::kv_bytes(c.decoder, c.decoder.n_layers, n_ctx),
                              DecoderState::activation_bytes(c.decoder, batch),
                              c.vit ? VitState::bytes(*c.vit, c.decoder.width) : 0);
        },
        py::arg("config"), py::arg("n_ctx"),
        "Bytes that a session allocates: KV cache, decoder activations, vision activations.");
    py::class_<MemoryPlan>(m, "MemoryPlan", "What a model takes of a device's memory, in bytes.")
        .def(py::init([](const PyGguf& text, const std::optional<PyGguf>& vision, const Config& c, int64_t n_ctx) {
                 return plan_memory(*text.file, vision ? vision->file.get() : nullptr, c, n_ctx);
             }),
             py::arg("text"), py::arg("vision"), py::arg("config"), py::arg("n_ctx") = 0)
        .def_property_readonly("n_layers", &MemoryPlan::n_layers)
        .def_readonly("vision_weights", &MemoryPlan::vision_weights)
        .def_readonly("decoder_activations", &MemoryPlan::decoder_activations)
        .def_readonly("vision_activations", &MemoryPlan::vision_activations)
        .def("weights_on_device", &MemoryPlan::weights_on_device, py::arg("n_gpu_layers"))
        .def("kv_on_device", &MemoryPlan::kv_on_device, py::arg("n_gpu_layers"))
        .def("on_device", &MemoryPlan::on_device, py::arg("n_gpu_layers"))
        .def("most_layers", &MemoryPlan::most_layers, py::arg("free_bytes"));
    m.attr("DEVICE_RESERVE") = kDeviceReserve;
}

}  // namespace

void bind_gguf(py::module_& m) {
    py::class_<PyTensor>(m, "GgufTensor", "One tensor of a GGUF file.")
        .def_property_readonly("name", [](const PyTensor& self) { return self.tensor->name; })
        .def_property_readonly("type", [](const PyTensor& self) { return type_info(self.tensor->type).name; })
        .def_property_readonly("shape", [](const PyTensor& self) { return py::tuple(py::cast(self.tensor->shape)); })
        .def_property_readonly("nbytes", [](const PyTensor& self) { return self.tensor->data.size(); })
        .def_property_readonly(
            "offset", [](const PyTensor& self) { return self.tensor->data.data() - self.owner.file->bytes().data(); },
            "From the start of the file, in bytes.")
        .def_property_readonly("data", tensor_data, "uint8 (nbytes,): a read-only view of the file.");

    py::class_<PyGguf>(m, "GgufFile", "A GGUF file, mapped into memory and checked.")
        .def_static("open", open_file, py::arg("path"))
        .def_static("parse", parse_bytes, py::arg("data"), py::arg("name") = "<bytes>",
                    "The same for bytes in memory; `name` stands for the path in errors.")
        .def_property_readonly("file_size", [](const PyGguf& self) { return self.file->file_size(); })
        .def_property_readonly("metadata", metadata, "dict of key to int, float, bool, str or a list of these.")
        .def_property_readonly("tensors", tensors, "list of GgufTensor, in the file's order.");
    bind_inspection(m);
}

}  // namespace yivl
