#include <optional>
#include <utility>

#include "bindings.h"
#include "sampler.h"
#include "text_stream.h"
#include "tokenizer.h"

namespace yivl {

namespace {

// UTF-8 of a str (UnicodeEncodeError, a ValueError, for a lone surrogate), or the bytes of a bytes object. The view
// lives as long as `text`.
std::string_view utf8_of(py::handle text) {
    Py_ssize_t size = 0;
    if (PyBytes_Check(text.ptr()))
        return {PyBytes_AS_STRING(text.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(text.ptr()))};
    if (!PyUnicode_Check(text.ptr()))
        throw py::type_error("expected str or bytes, found " +
                             py::str(py::type::of(text).attr("__name__")).cast<std::string>());
    const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    if (!data) throw py::error_already_set();
    return {data, static_cast<size_t>(size)};
}

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

std::vector<float> logits_of(const FloatArray& logits) {
    if (logits.ndim() != 1)
        throw std::invalid_argument("logits: expected shape (V,), found " + std::to_string(logits.ndim()) + " axes");
    return {logits.data(), logits.data() + logits.size()};
}

}  // namespace

void bind_text(py::module_& m) {
    py::class_<Tokenizer>(m, "Tokenizer", "SentencePiece BPE over the given pieces. Safe for use from many threads.")
        .def(py::init([](std::vector<std::string> pieces, std::vector<float> scores, const std::vector<int32_t>& types,
                         int32_t bos_id, int32_t eos_id, int32_t unk_id, bool add_bos, bool add_eos,
                         bool add_dummy_prefix, bool remove_extra_whitespaces, std::vector<int32_t> special_ids) {
                 TokenizerConfig config;
                 config.pieces = std::move(pieces);
                 config.scores = std::move(scores);
                 for (const int32_t type : types) config.types.push_back(static_cast<PieceType>(type));
                 config.bos_id = bos_id;
                 config.eos_id = eos_id;
                 config.unk_id = unk_id;
                 config.add_bos = add_bos;
                 config.add_eos = add_eos;
                 config.add_dummy_prefix = add_dummy_prefix;
                 config.remove_extra_whitespaces = remove_extra_whitespaces;
                 config.special_ids = std::move(special_ids);
                 return std::make_unique<Tokenizer>(std::move(config));
             }),
             py::arg("pieces"), py::arg("scores"), py::arg("types"), py::kw_only(), py::arg("bos_id") = -1,
             py::arg("eos_id") = -1, py::arg("unk_id") = 0, py::arg("add_bos") = false, py::arg("add_eos") = false,
             py::arg("add_dummy_prefix") = false, py::arg("remove_extra_whitespaces") = false,
             py::arg("special_ids") = std::vector<int32_t>{})
        .def_static(
            "parse",
            [](const py::bytes& data, const std::string& name) {
                const std::string_view bytes = data;
                const auto file = GgufFile::parse(std::as_bytes(std::span(bytes)), name);
                return std::make_unique<Tokenizer>(Tokenizer::read_config(*file));
            },
            py::arg("data"), py::arg("name") = "<bytes>", "The tokeniser of a GGUF file in memory.")
        .def_property_readonly("vocab_size", &Tokenizer::vocab_size)
        .def(
            "encode",
            [](const Tokenizer& self, const py::object& text, bool add_special) {
                const std::string_view utf8 = utf8_of(text);
                py::gil_scoped_release unlocked;
                return self.encode(utf8, add_special);
            },
            py::arg("text"), py::arg("add_special") = true,
            "Ids of a str, or of bytes in UTF-8. Raises ValueError for a lone surrogate or invalid UTF-8.")
        .def(
            "decode",
            [](const Tokenizer& self, const std::vector<int32_t>& ids, bool skip_special) {
                py::gil_scoped_release unlocked;
                return self.decode(ids, skip_special);
            },
            py::arg("ids"), py::arg("skip_special") = true,
            "Text of ids; bytes that are not UTF-8 become U+FFFD. Raises ValueError for an id outside the vocabulary.")
        .def(
            "bytes", [](const Tokenizer& self, int32_t id) { return py::bytes(self.bytes(id)); }, py::arg("id"),
            "The raw bytes that an id adds to a reply.");

    py::class_<TextStream>(m, "TextStream", "From the raw bytes of generated ids to the text of a reply.")
        .def(py::init<std::vector<std::string>>(), py::arg("stops"))
        .def(
            "push", [](TextStream& self, const py::bytes& bytes) { return self.push(utf8_of(bytes)); },
            py::arg("bytes"))
        .def("finish", &TextStream::finish)
        .def_property_readonly("stopped", &TextStream::stopped)
        .def_property_readonly("text", &TextStream::text);

    py::class_<SamplingOptions>(m, "SamplingOptions")
        .def(py::init([](float temperature, int32_t top_k, float top_p, float min_p, float repetition_penalty,
                         uint64_t seed) {
                 return SamplingOptions{temperature, top_k, top_p, min_p, repetition_penalty, seed};
             }),
             py::kw_only(), py::arg("temperature") = 0.2f, py::arg("top_k") = 0, py::arg("top_p") = 1.0f,
             py::arg("min_p") = 0.0f, py::arg("repetition_penalty") = 1.0f, py::arg("seed") = 0)
        .def_readonly("temperature", &SamplingOptions::temperature)
        .def_readonly("top_k", &SamplingOptions::top_k)
        .def_readonly("top_p", &SamplingOptions::top_p)
        .def_readonly("min_p", &SamplingOptions::min_p)
        .def_readonly("repetition_penalty", &SamplingOptions::repetition_penalty)
        .def_readonly("seed", &SamplingOptions::seed);

    py::class_<Sampler>(m, "Sampler", "Draws ids; raises ValueError for an option out of its range.")
        .def(py::init<const SamplingOptions&>(), py::arg("options"))
        .def(
            "sample",
            [](Sampler& self, const FloatArray& logits, const std::vector<int32_t>& previous_ids) {
                std::vector<float> copy = logits_of(logits);
                py::gil_scoped_release unlocked;
                return self.sample(copy, previous_ids);
            },
            py::arg("logits"), py::arg("previous_ids") = std::vector<int32_t>{},
            "The next id, from float32 logits of shape (V,), which are left as they are.");

    m.def(
        "draws",
        [](const FloatArray& logits, const SamplingOptions& options, int64_t n) {
            std::vector<float> copy = logits_of(logits);
            std::vector<int32_t> ids(static_cast<size_t>(std::max<int64_t>(n, 0)));
            {
                py::gil_scoped_release unlocked;
                Sampler sampler(options);
                for (int32_t& id : ids) id = sampler.sample(copy, {});
            }
            return py::array_t<int32_t>(static_cast<py::ssize_t>(ids.size()), ids.data());
        },
        py::arg("logits"), py::arg("options"), py::arg("n"), "n ids drawn one after another from the same logits.");
}

}  // namespace yivl
