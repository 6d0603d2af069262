// The kernels, one operation at a time, on numpy arrays: for the tests and the benchmarks.
#include <algorithm>
#include <atomic>

#include "bindings.h"
#include "buffer.h"
#include "cpu/dequant.h"
#include "cpu/isa.h"
#include "cpu/ops_cpu.h"
#include "cpu/threads.h"
#include "placement.h"
#include "sampler.h"

namespace yivl {

namespace {

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Floats = py::array_t<float>;

WeightType weight_type(uint32_t number) {
    const TypeInfo* info = find_type(number);
    if (info == nullptr) throw std::invalid_argument("unknown weight type " + std::to_string(number));
    return info->type;
}

// A float32 matrix with rows of any stride and columns side by side, not copied.
template <class T, class Array>
View<T> matrix(Array& array, const char* name) {
    const py::ssize_t item = sizeof(float);
    // numpy's strides say nothing where there is nothing to step over.
    const bool one_row = array.ndim() == 2 && (array.shape(0) <= 1 || array.shape(1) == 0);
    const bool fits = array.ndim() == 2 && (one_row || (array.strides(0) >= 0 && array.strides(0) % item == 0)) &&
                      (array.size() == 0 || array.shape(1) == 1 || array.strides(1) == item);
    if (!fits) throw std::invalid_argument(std::string(name) + " must be a float32 matrix with contiguous rows");
    T* data;
    if constexpr (std::is_const_v<T>) {
        data = array.data();
    } else {
        data = array.mutable_data();
    }
    return {data, array.shape(0), array.shape(1), one_row ? array.shape(1) : array.strides(0) / item};
}

Mat out(Floats& array, const char* name) { return matrix<float>(array, name); }
ConstMat in(const Floats& array, const char* name) { return matrix<const float>(array, name); }

Vec vec(const Floats& array) {
    if (array.ndim() != 1 || (array.size() > 1 && array.strides(0) != py::ssize_t{sizeof(float)})) {
        throw std::invalid_argument("expected a contiguous float32 vector");
    }
    return {array.data(), static_cast<size_t>(array.size())};
}

void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

Weight weight(const Bytes& bytes, uint32_t type, int64_t rows, int64_t cols) {
    const TypeInfo& info = type_info(weight_type(type));
    require(rows >= 0 && cols >= 0 && cols % info.block == 0, "columns must be a whole number of blocks");
    const Weight w{info.type, rows, cols, reinterpret_cast<const std::byte*>(bytes.data())};
    require(bytes.size() == rows * w.row_bytes(), "the bytes do not match type, rows and columns");
    return w;
}

// Lets a test cancel an operation, or hear from it.
class KernelControl {
public:
    explicit KernelControl(const py::object& poll) {
        if (poll.is_none()) return;
        control.poll = [poll] {
            const py::gil_scoped_acquire gil;
            poll();
        };
    }
    Control control;
};

// One operation on the caller's arrays: as they are on the CPU, as copies on a device, with the same strides.
class Call {
public:
    Call(Backend& backend, bool on_host, Control& control)
        : ops(backend.ops(control)), backend_(backend), on_host_(on_host), control_(control) {}

    ConstMat in(ConstMat host) {
        if (on_host_) return host;
        const Mat device = buffers_.emplace_back(backend_, host.rows, host.stride).view().col_range(0, host.cols);
        ops->upload(device, host);
        return device;
    }
    Vec in(Vec host) {
        const auto n = static_cast<int64_t>(host.size());
        return host.empty() ? host : Vec(in(ConstMat(host.data(), 1, n)).data, host.size());
    }
    Weight in(Weight w) {
        w.data = backend_.place({w.data, static_cast<size_t>(w.rows * w.row_bytes())}, control_);
        return w;
    }
    // Holds what the array holds; the array gets what it holds at the end.
    Mat inout(Mat host) {
        if (on_host_) return host;
        const ConstMat device = in(ConstMat(host));
        const Mat result(const_cast<float*>(device.data), device.rows, device.cols, device.stride);
        results_.emplace_back(host, result);
        return result;
    }
    void finish() {
        for (const auto& [host, device] : results_) ops->download(host, device);
    }

    std::unique_ptr<Ops> ops;

private:
    Backend& backend_;
    bool on_host_;
    Control& control_;
    std::vector<Buffer> buffers_;
    std::vector<std::pair<Mat, Mat>> results_;
};

class KernelOps {
public:
    KernelOps(const std::string& isa, int n_threads)
        : on_host_(isa != "cuda"),
          backend_(on_host_ ? make_cpu_backend(n_threads, choose_kernels(isa)) : make_cuda_backend(0, 0)) {}

    std::string isa() const { return backend_->name(); }
    int n_threads() const { return backend_->n_threads(); }

    // Runs fn(call) without the GIL.
    template <class Fn>
    void run(KernelControl* control, Fn&& fn) {
        const py::gil_scoped_release release;
        Control unwatched;
        Call call(*backend_, on_host_, control == nullptr ? unwatched : control->control);
        fn(call);
        call.finish();
    }

private:
    bool on_host_;
    std::unique_ptr<Backend> backend_;
};

// What the machine can do at most, for benchmarks to compare with.
class Ceilings {
public:
    Ceilings(const std::string& isa, int n_threads)
        : kernels_(choose_kernels(isa)), pool_(n_threads == 0 ? default_thread_count() : n_threads) {}

    // Multiply-adds on registers, on all threads; how many floating-point operations that was.
    int64_t multiply_add(int64_t rounds) { return operations_of(*kernels_.floats, rounds); }

    // The same in the unit for packed operands; 0 if the instruction set has none.
    int64_t packed_multiply_add(int64_t rounds) {
        return kernels_.packed == nullptr ? 0 : operations_of(*kernels_.packed, rounds);
    }

    // Whether that unit computes products with weights of a type.
    bool packs(const std::string& type) const {
        const TypeInfo* info = find_type(type);
        if (info == nullptr) throw std::invalid_argument("unknown weight type " + type);
        return kernels_.packed != nullptr && kernels_.packed->order(info->type) >= 0;
    }

    // Reads the array once.
    void read(const Floats& values) {
        const Vec v = vec(values);
        constexpr int64_t kPiece = 1 << 16;
        const auto n = static_cast<int64_t>(v.size());
        run((n + kPiece - 1) / kPiece, [&](int64_t piece) {
            float sink;
            kernels_.read(v.data() + piece * kPiece, std::min(kPiece, n - piece * kPiece), &sink);
        });
    }

private:
    int64_t operations_of(const PackedKernels& kernels, int64_t rounds) {
        std::atomic<int64_t> operations{0};
        run(pool_.n_threads(), [&](int64_t) { operations += kernels.multiply_add(rounds); });
        return operations;
    }

    template <class Fn>
    void run(int64_t n, Fn&& fn) {
        const py::gil_scoped_release release;
        Control control;
        pool_.parallel_for(control, n, 1, [&](int64_t begin, int64_t, int) { fn(begin); });
    }

    const Kernels& kernels_;
    ThreadPool pool_;
};

// Weight, bias or none, and eps.
using NormArguments = std::tuple<Floats, std::optional<Floats>, float>;

// What a norm is of, and room for it, while an operation runs.
class NormedInput {
public:
    NormedInput(ConstMat x, const std::optional<NormArguments>& norm) : x_(x) {
        if (!norm) return;
        const auto& [weight, bias, eps] = *norm;
        require(weight.size() == x.cols && (!bias || bias->size() == x.cols), "shapes do not match");
        norm_ = Norm{.weight = vec(weight), .bias = bias ? vec(*bias) : Vec{}, .eps = eps};
        room_.resize(static_cast<size_t>(x.rows * x.cols));
    }
    Input in(Call& c) {
        const ConstMat x = c.in(x_);
        if (!norm_) return x;
        const Norm norm{.weight = c.in(norm_->weight), .bias = c.in(norm_->bias), .eps = norm_->eps};
        return {x, norm, c.inout(Mat(room_.data(), x.rows, x.cols))};
    }

private:
    ConstMat x_;
    std::optional<Norm> norm_;
    std::vector<float> room_;
};

void linear(KernelOps& self, Floats y, const Floats& x, const Bytes& bytes, uint32_t type,
            const std::optional<Floats>& bias, KernelControl* control, const std::string& then,
            const std::optional<NormArguments>& norm) {
    const Mat to = out(y, "y");
    const ConstMat from = in(x, "x");
    const Weight w = weight(bytes, type, to.cols, from.cols);
    const Vec b = bias ? vec(*bias) : Vec{};
    require(to.rows == from.rows && (b.empty() || static_cast<int64_t>(b.size()) == w.rows), "shapes do not match");
    require(then == "store" || then == "add" || then == "gelu", "then must be store, add or gelu");
    const Then what = then == "add" ? Then::add : then == "gelu" ? Then::gelu : Then::store;
    NormedInput input(from, norm);
    self.run(control, [&](Call& c) { c.ops->linear(input.in(c), {{c.inout(to), c.in(w), c.in(b), what}}); });
}

void layer_norm(KernelOps& self, Floats y, const Floats& x, const Floats& weight, const Floats& bias, float eps) {
    const Mat to = out(y, "y");
    const ConstMat from = in(x, "x");
    require(to.rows == from.rows && to.cols == from.cols && weight.size() == from.cols && bias.size() == from.cols,
            "shapes do not match");
    self.run(nullptr, [&, w = vec(weight), b = vec(bias)](Call& c) {
        c.ops->norm(c.inout(to), c.in(from), {c.in(w), c.in(b), eps});
    });
}

void rms_norm(KernelOps& self, Floats y, const Floats& x, const Floats& weight, float eps) {
    const Mat to = out(y, "y");
    const ConstMat from = in(x, "x");
    require(to.rows == from.rows && to.cols == from.cols && weight.size() == from.cols, "shapes do not match");
    self.run(nullptr,
             [&, w = vec(weight)](Call& c) { c.ops->norm(c.inout(to), c.in(from), {.weight = c.in(w), .eps = eps}); });
}

void gelu(KernelOps& self, Floats x) {
    self.run(nullptr, [to = out(x, "x")](Call& c) { c.ops->gelu(c.inout(to)); });
}

void gated_linear(KernelOps& self, Floats y, const Floats& x, const Bytes& gate, uint32_t gate_type, const Bytes& up,
                  uint32_t up_type, const std::optional<NormArguments>& norm) {
    const Mat to = out(y, "y");
    const ConstMat from = in(x, "x");
    const Weight w_gate = weight(gate, gate_type, to.cols, from.cols);
    const Weight w_up = weight(up, up_type, to.cols, from.cols);
    require(to.rows == from.rows, "shapes do not match");
    NormedInput input(from, norm);
    self.run(nullptr, [&](Call& c) { c.ops->gated_linear(c.inout(to), input.in(c), c.in(w_gate), c.in(w_up)); });
}

void add(KernelOps& self, Floats y, const Floats& x) {
    const Mat to = out(y, "y");
    const ConstMat from = in(x, "x");
    require(to.rows == from.rows && to.cols == from.cols, "shapes do not match");
    self.run(nullptr, [&](Call& c) { c.ops->add(c.inout(to), c.in(from)); });
}

void rope(KernelOps& self, Floats x, int64_t head_dim, int64_t first, float theta) {
    const Mat to = out(x, "x");
    require(head_dim > 0 && head_dim % 2 == 0 && to.cols % head_dim == 0, "shapes do not match");
    self.run(nullptr, [&](Call& c) { c.ops->rope(c.inout(to), head_dim, first, theta); });
}

void attention(KernelOps& self, Floats y, const Floats& q, const Floats& k, const Floats& v, int64_t n_heads,
               int64_t n_kv_heads, bool causal, KernelControl* control, bool rounded) {
    const Mat to = out(y, "y");
    const ConstMat qs = in(q, "q"), ks = in(k, "k"), vs = in(v, "v");
    require(n_kv_heads > 0 && n_heads > 0 && n_heads % n_kv_heads == 0 && qs.cols % n_heads == 0, "bad head counts");
    const int64_t head_dim = qs.cols / n_heads;
    require(to.rows == qs.rows && to.cols == qs.cols && ks.cols == n_kv_heads * head_dim && vs.cols == ks.cols &&
                vs.rows == ks.rows && qs.rows >= 1 && ks.rows >= 1 && (!causal || ks.rows >= qs.rows),
            "shapes do not match");
    self.run(control, [&](Call& c) {
        c.ops->attention(c.inout(to), c.in(qs), {c.in(ks), n_kv_heads}, {c.in(vs), n_kv_heads},
                         {n_heads, n_kv_heads, head_dim, causal, rounded});
    });
}

void embed(KernelOps& self, Floats y, const Bytes& bytes, uint32_t type, int64_t rows,
           const std::vector<int32_t>& ids) {
    const Mat to = out(y, "y");
    const Weight table = weight(bytes, type, rows, to.cols);
    require(to.rows == static_cast<int64_t>(ids.size()), "shapes do not match");
    for (const int32_t id : ids) require(id >= 0 && id < rows, "id out of range");
    self.run(nullptr, [&](Call& c) { c.ops->embed(c.inout(to), c.in(table), ids); });
}

int32_t draw(KernelOps& self, const Floats& x, Sampler& sampler, const std::vector<int32_t>& previous_ids) {
    const ConstMat from = in(x, "x");
    require(from.rows == 1 && from.cols > 0, "x must be one row of values");
    for (const int32_t id : previous_ids) require(id < from.cols, "id out of range");
    int32_t id = -1;
    self.run(nullptr, [&](Call& c) { id = c.ops->draw(c.in(from), previous_ids, sampler.next()); });
    return id;
}

}  // namespace

void bind_kernels(py::module_& m) {
    m.def(
        "dequantize",
        [](const Bytes& bytes, uint32_t type, int64_t rows, int64_t cols, const std::string& isa) {
            const Weight w = weight(bytes, type, rows, cols);
            std::vector<float> values(static_cast<size_t>(rows * cols));
            auto* dequantize = isa.empty() ? dequantize_row : choose_kernels(isa).dequantize;
            {
                const py::gil_scoped_release release;
                for (int64_t i = 0; i < rows; ++i) {
                    dequantize(w.type, w.data + i * w.row_bytes(), values.data() + i * cols, cols);
                }
            }
            return to_array(std::move(values), {rows, cols});
        },
        py::arg("bytes"), py::arg("type"), py::arg("rows"), py::arg("cols"), py::arg("isa") = "",
        "Weights of a GGUF type as float32 (rows, cols); by the reference code, or by an instruction set's kernel.");
    m.def("default_thread_count", &default_thread_count, "Physical cores that this process may use.");
    m.def("cgroup_cpus", &cgroup_cpus, py::arg("root") = "", "CPUs that quotas of cgroups allow; 0: no limit.");
    m.def(
        "available_isas",
        [] {
            std::vector<std::string> names;
            for (const Kernels* kernels : available_kernels()) names.push_back(kernels->name);
            return names;
        },
        "Names of the instruction sets that this CPU and build offer, best first.");
    m.def(
        "isa_name", [] { return std::string(make_cpu_backend(1)->name()); },
        "The instruction set that a model would use, YIVL_ISA considered.");
    m.def(
        "isa_variant", [](const std::string& isa) { return std::string(choose_kernels(isa).variant); }, py::arg("isa"),
        "What an instruction set's kernels use beyond what all CPUs have that can take it, or nothing.");

    m.def(
        "cuda_device", [] { return std::string(make_cuda_backend(0, 0)->name()); },
        "The name of the first CUDA device; DeviceError says why there is none.");
    m.def(
        "cuda_memory",
        [](const std::string& device) {
            const DeviceMemory memory = cuda_memory(cuda_number(device));
            return std::tuple(memory.name, memory.total_bytes, memory.free_bytes);
        },
        py::arg("device"), "Name, total and free bytes of a CUDA device; DeviceError says why it cannot be used.");

    py::class_<KernelControl>(m, "KernelControl")
        .def(py::init<const py::object&>(), py::arg("poll") = py::none())
        .def("cancel", [](KernelControl& self) { self.control.cancel(); });

    py::class_<Ceilings>(m, "Ceilings")
        .def(py::init<const std::string&, int>(), py::arg("isa") = "", py::arg("n_threads") = 0)
        .def("multiply_add", &Ceilings::multiply_add, py::arg("rounds"))
        .def("packed_multiply_add", &Ceilings::packed_multiply_add, py::arg("rounds"))
        .def("packs", &Ceilings::packs, py::arg("type"))
        .def("read", &Ceilings::read, py::arg("values").noconvert());

    // Results go into arrays that the caller gives, so that tests can pass views with strides.
    const auto to = [](const char* name) { return py::arg(name).noconvert(); };
    const auto control = py::arg("control") = py::none();
    py::class_<KernelOps>(m, "KernelOps")
        .def(py::init<const std::string&, int>(), py::arg("isa") = "", py::arg("n_threads") = 0)
        .def_property_readonly("isa", &KernelOps::isa)
        .def_property_readonly("n_threads", &KernelOps::n_threads)
        .def("linear", &linear, to("y"), to("x"), py::arg("bytes"), py::arg("type"), py::arg("bias") = py::none(),
             control, py::arg("then") = "store", py::arg("norm") = py::none())
        .def("gated_linear", &gated_linear, to("y"), to("x"), py::arg("gate"), py::arg("gate_type"), py::arg("up"),
             py::arg("up_type"), py::arg("norm") = py::none())
        .def("layer_norm", &layer_norm, to("y"), to("x"), py::arg("weight"), py::arg("bias"), py::arg("eps"))
        .def("rms_norm", &rms_norm, to("y"), to("x"), py::arg("weight"), py::arg("eps"))
        .def("gelu", &gelu, to("x"))
        .def("add", &add, to("y"), to("x"))
        .def("rope", &rope, to("x"), py::arg("head_dim"), py::arg("first"), py::arg("theta"))
        .def("attention", &attention, to("y"), to("q"), to("k"), to("v"), py::arg("n_heads"), py::arg("n_kv_heads"),
             py::arg("causal"), control, py::arg("rounded") = false)
        .def("draw", &draw, py::arg("x"), py::arg("sampler"), py::arg("previous_ids") = std::vector<int32_t>{})
        .def("embed", &embed, to("y"), py::arg("bytes"), py::arg("type"), py::arg("rows"), py::arg("ids"));
}

}  // namespace yivl
