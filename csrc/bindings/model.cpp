#include "model.h"

#include "bindings.h"

namespace yivl {

namespace {

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

// A Control that watches Python: signals, an object with is_set(), and a progress callback. It logs to Python's
// logging, as "yivl_edge".
class PyControl : public Control {
public:
    PyControl(py::object on_progress_callback, py::object cancel_flag)
        : progress_callback_(std::move(on_progress_callback)), cancel_flag_(std::move(cancel_flag)) {
        if (!progress_callback_.is_none()) {
            on_progress = [this](Stage stage, double fraction) {
                const py::gil_scoped_acquire gil;
                progress_callback_(stage_name(stage), fraction);
            };
        }
        on_log = [](const std::string& message) {
            const py::gil_scoped_acquire gil;
            // Paths need not be text.
            const auto text = py::reinterpret_steal<py::object>(
                PyUnicode_DecodeFSDefaultAndSize(message.data(), static_cast<py::ssize_t>(message.size())));
            if (!text) throw py::error_already_set();
            py::module_::import("logging").attr("getLogger")("yivl_edge").attr("info")("%s", text);
        };
        poll = [this] {
            const py::gil_scoped_acquire gil;
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
            if (!cancel_flag_.is_none() && py::cast<bool>(cancel_flag_.attr("is_set")())) cancel();
        };
    }

private:
    py::object progress_callback_;
    py::object cancel_flag_;
};

Pixels to_pixels(const std::optional<FloatArray>& array) {
    if (!array) return nullptr;
    return std::make_shared<const std::vector<float>>(array->data(), array->data() + array->size());
}

// What `compute` returns, computed without the GIL, as rows of `cols(config)` values: asked for afterwards, because it
// is `compute` that refuses a model whose config has no vision tower.
template <class Compute, class Cols>
py::array_t<float> compute_rows(const Session& session, Compute compute, Cols cols) {
    std::vector<float> values;
    {
        const py::gil_scoped_release release;
        values = compute();
    }
    const int64_t row = cols(session.model().config());
    const auto rows = static_cast<py::ssize_t>(values.size()) / row;
    return to_array(std::move(values), {rows, row});
}

std::vector<Message> to_messages(const std::vector<std::pair<std::string, std::string>>& messages) {
    std::vector<Message> result;
    for (const auto& [role, text] : messages) {
        if (role == "system") {
            result.push_back({Role::system, text});
        } else if (role == "user") {
            result.push_back({Role::user, text});
        } else if (role == "assistant") {
            result.push_back({Role::assistant, text});
        } else {
            throw std::invalid_argument("role: expected system, user or assistant, found '" + role + "'");
        }
    }
    return result;
}

const char* finish_name(FinishReason reason) {
    switch (reason) {
        case FinishReason::stop: return "stop";
        case FinishReason::length: return "length";
        case FinishReason::cancelled: return "cancelled";
        case FinishReason::none: break;
    }
    return "";
}

void bind_config(py::module_& m) {
    py::class_<VitConfig>(m, "VisionConfig")
        .def_readonly("image_size", &VitConfig::image_size)
        .def_readonly("patch_size", &VitConfig::patch_size)
        .def_readonly("width", &VitConfig::width)
        .def_readonly("n_heads", &VitConfig::n_heads)
        .def_readonly("head_dim", &VitConfig::head_dim)
        .def_readonly("mlp_width", &VitConfig::mlp_width)
        .def_readonly("n_blocks", &VitConfig::n_blocks)
        .def_readonly("norm_eps", &VitConfig::norm_eps)
        .def_property_readonly("n_patches", &VitConfig::n_patches);
    py::class_<DecoderConfig>(m, "DecoderConfig")
        .def_readonly("width", &DecoderConfig::width)
        .def_readonly("n_layers", &DecoderConfig::n_layers)
        .def_readonly("n_heads", &DecoderConfig::n_heads)
        .def_readonly("n_kv_heads", &DecoderConfig::n_kv_heads)
        .def_readonly("head_dim", &DecoderConfig::head_dim)
        .def_readonly("mlp_width", &DecoderConfig::mlp_width)
        .def_readonly("vocab_size", &DecoderConfig::vocab_size)
        .def_readonly("context_length", &DecoderConfig::context_length)
        .def_readonly("rope_theta", &DecoderConfig::rope_theta)
        .def_readonly("norm_eps", &DecoderConfig::norm_eps);
    py::class_<Config>(m, "Config")
        .def_readonly("name", &Config::name)
        .def_readonly("decoder", &Config::decoder)
        .def_readonly("vision", &Config::vit)
        .def_property_readonly("system", [](const Config& c) { return c.prompt.system; })
        .def_property_readonly("stops", [](const Config& c) { return c.prompt.stops; })
        .def_readonly("temperature", &Config::temperature)
        .def_readonly("max_tokens", &Config::max_tokens)
        .def_property_readonly("image_aspect_ratio", [](const Config& c) { return c.preprocess.pad ? "pad" : "crop"; })
        .def_property_readonly("image_mean", [](const Config& c) { return c.preprocess.mean; })
        .def_property_readonly("image_std", [](const Config& c) { return c.preprocess.std; })
        .def_property_readonly("pad_color", [](const Config& c) { return c.preprocess.pad_color; });
}

void bind_session(py::module_& m) {
    py::class_<Session>(m, "Session")
        .def(py::init<std::shared_ptr<const Model>, int64_t, int64_t>(), py::arg("model"), py::arg("n_ctx") = 0,
             py::arg("batch") = kDefaultBatch)
        .def_property_readonly("n_ctx", &Session::n_ctx)
        .def("cached_prefix",
             [](const Session& s, const std::vector<int32_t>& ids, const std::optional<FloatArray>& pixels) {
                 return s.cached_prefix(ids, to_pixels(pixels));
             })
        .def(
            "begin",
            [](Session& s, const std::vector<int32_t>& ids, const std::optional<FloatArray>& pixels, int64_t max_tokens,
               const SamplingOptions& sampling, std::vector<std::string> stops) {
                s.begin(ids, to_pixels(pixels), {max_tokens, sampling, std::move(stops)});
            },
            py::arg("ids"), py::arg("pixels"), py::arg("max_tokens"), py::arg("sampling"), py::arg("stops"))
        .def(
            "next", [](Session& s, PyControl& control) { return s.next(control); }, py::arg("control"),
            py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("finish_reason", [](const Session& s) { return finish_name(s.finish_reason()); })
        .def_property_readonly("text", [](const Session& s) { return s.text(); })
        .def_property_readonly("usage",
                               [](const Session& s) {
                                   const Usage& u = s.usage();
                                   return std::tuple(u.prompt_tokens, u.cached_tokens, u.completion_tokens);
                               })
        .def_property_readonly("timings",
                               [](const Session& s) {
                                   const Timings& t = s.timings();
                                   return std::tuple(t.image, t.prefill, t.first_token, t.decode);
                               })
        .def("prefill",
             [](Session& s, const std::vector<int32_t>& ids, const std::optional<FloatArray>& pixels,
                PyControl& control) {
                 const Pixels picture = to_pixels(pixels);
                 const py::gil_scoped_release release;
                 s.prefill(ids, picture, control);
             })
        .def("vision_features",
             [](Session& s, const FloatArray& pixels, PyControl& control) {
                 return compute_rows(
                     s, [&, picture = to_pixels(pixels)] { return s.vision_features(picture, control); },
                     [](const Config& c) { return c.vit->width; });
             })
        .def("encode_image",
             [](Session& s, const FloatArray& pixels, PyControl& control) {
                 return compute_rows(
                     s, [&, picture = to_pixels(pixels)] { return s.encode_image(picture, control); },
                     [](const Config& c) { return c.decoder.width; });
             })
        .def("embed_image",
             [](Session& s, const FloatArray& pixels, PyControl& control) {
                 const Pixels picture = to_pixels(pixels);
                 const py::gil_scoped_release release;
                 s.embed_image(picture, control);
             })
        .def(
            "logits",
            [](Session& s, const std::vector<int32_t>& ids, const std::optional<FloatArray>& pixels, PyControl& control,
               ActivationStatistics* statistics, std::optional<std::vector<int64_t>> positions) {
                const LogitsOptions options{std::move(positions), statistics};
                return compute_rows(
                    s, [&, picture = to_pixels(pixels)] { return s.logits(ids, picture, control, options); },
                    [](const Config& c) { return c.decoder.vocab_size; });
            },
            py::arg("ids"), py::arg("pixels"), py::arg("control"), py::arg("statistics") = py::none(),
            py::arg("positions") = py::none());
}

void bind_activations(py::module_& m) {
    py::class_<ActivationStatistics>(
        m, "ActivationStatistics",
        "Sums of squares of the input columns of every matrix that Session.logits uses; of one caller at a time.")
        .def(py::init([](const Model& model) { return ActivationStatistics(model.weights()); }), py::arg("model"))
        .def_property_readonly(
            "columns",
            [](const ActivationStatistics& self) {
                py::dict dict;
                for (const ActivationStatistics::Columns& columns : self.columns()) {
                    const py::array_t<double> sums(static_cast<py::ssize_t>(columns.sum_of_squares.size()),
                                                   columns.sum_of_squares.data());
                    const py::array_t<double> marked(static_cast<py::ssize_t>(columns.marked_squares.size()),
                                                     columns.marked_squares.data());
                    dict[py::cast(columns.name)] = py::make_tuple(sums, columns.rows, marked, columns.marked_rows);
                }
                return dict;
            },
            "dict of tensor name to (sums of squares (I,) float64, how many rows were summed, and the same two of "
            "the rows of the decoder's blocks whose logits were asked for).");
}

}  // namespace

void bind_model(py::module_& m) {
    py::class_<PyControl>(m, "Control")
        .def(py::init<py::object, py::object>(), py::arg("on_progress") = py::none(), py::arg("cancel") = py::none())
        .def("cancel", &PyControl::cancel)
        .def("check", &PyControl::check)
        .def_property_readonly("cancelled", &PyControl::cancelled);
    bind_config(m);
    py::enum_<Unit>(m, "Unit").value("memory", Unit::memory).value("float32", Unit::float32).value("half", Unit::half);
    py::class_<Model, std::shared_ptr<Model>>(m, "Model")
        .def_static(
            "open",
            [](const std::string& path, const std::string& mmproj, int n_threads, PyControl& control,
               const std::string& device, int64_t n_ctx, std::optional<int64_t> n_gpu_layers) {
                return std::const_pointer_cast<Model>(
                    Model::open({path, mmproj, n_threads, device, n_ctx, n_gpu_layers}, control));
            },
            py::arg("path"), py::arg("mmproj"), py::arg("n_threads"), py::arg("control"), py::arg("device") = "cpu",
            py::arg("n_ctx") = 0, py::arg("n_gpu_layers") = py::none(), py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("config", &Model::config, py::return_value_policy::reference_internal)
        .def_property_readonly("backend_name", [](const Model& model) { return model.backend().name(); })
        .def_property_readonly(
            "n_threads",
            [](const Model& model) { return (model.cpu() == nullptr ? model.backend() : *model.cpu()).n_threads(); })
        .def_property_readonly("n_gpu_layers", &Model::n_gpu_layers)
        .def(
            "exert", [](const Model& model, Unit unit, int64_t rounds) { return model.backend().exert(unit, rounds); },
            py::arg("unit"), py::arg("rounds"), py::call_guard<py::gil_scoped_release>())
        .def(
            "profile",
            [](const Model& model) {
                std::vector<std::tuple<std::string, int64_t, double, int64_t, int64_t>> kernels;
                for (const KernelTime& k : model.backend().profile()) {
                    kernels.emplace_back(k.name, k.calls, k.seconds, k.bytes, k.flop);
                }
                return kernels;
            },
            py::call_guard<py::gil_scoped_release>())
        .def("n_positions", [](const Model& model, const std::vector<int32_t>& ids) { return model.n_positions(ids); })
        .def("prompt_text",
             [](const Model& model, const std::vector<std::pair<std::string, std::string>>& messages, bool image) {
                 return build_prompt(model.config().prompt, to_messages(messages), image).text();
             })
        .def(
            "prompt_ids",
            [](const Model& model, const std::vector<std::pair<std::string, std::string>>& messages, bool image) {
                return prompt_ids(build_prompt(model.config().prompt, to_messages(messages), image), model.tokenizer());
            },
            py::call_guard<py::gil_scoped_release>())
        .def(
            "tokenize", [](const Model& model, const std::string& text) { return model.tokenizer().encode(text); },
            py::call_guard<py::gil_scoped_release>())
        .def(
            "detokenize",
            [](const Model& model, const std::vector<int32_t>& ids) { return model.tokenizer().decode(ids); },
            py::call_guard<py::gil_scoped_release>())
        .def(
            "preprocess",
            [](const Model& model, const ImageArray& image, PyControl& control) {
                const int64_t S = model.config().preprocess.image_size;
                std::vector<float> pixels;
                const ImageView input = view(image);
                {
                    const py::gil_scoped_release release;
                    pixels = preprocess(input, model.config().preprocess, control);
                }
                return to_array(std::move(pixels), {3, S, S});
            },
            py::arg("image"), py::arg("control"))
        .def(
            "check",
            [](const Model& model, const std::vector<int32_t>& ids, int64_t max_tokens, const SamplingOptions& sampling,
               std::vector<std::string> stops,
               int64_t n_ctx) { model.check(ids, {max_tokens, sampling, std::move(stops)}, n_ctx); },
            py::arg("ids"), py::arg("max_tokens"), py::arg("sampling"), py::arg("stops"), py::arg("n_ctx"));
    bind_activations(m);
    bind_session(m);
    m.attr("IMAGE_ID") = kImageId;
}

}  // namespace yivl
