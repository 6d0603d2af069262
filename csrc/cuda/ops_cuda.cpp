// The operations of the seam on a GPU: where its memory comes from, and the order of its work. The arithmetic is in the
// kernels.
#include <array>
#include <cassert>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/runtime.h"
#include "errors.h"
#include "ops.h"

namespace yivl {

namespace cuda {

namespace {

// The host runs ahead of the device by at most two windows of so many operations: a cancel waits for no more.
constexpr int kWindow = 16;
// Of x: more are multiplied on tensor cores.
constexpr int64_t kMostMatvecRows = 8;
// Weights are copied in pieces, so that a cancel waits for no more than one.
constexpr size_t kPlacedAtOnce = 16 << 20;
// What the model does not count: the kernels' code, streams, rounding of every allocation.
constexpr int64_t kReserve = 256 << 20;

std::string megabytes(int64_t bytes) { return std::to_string((bytes + 999'999) / 1'000'000) + " MB"; }

Memory allocate_shared(int device, size_t bytes) {
    return {allocate(device, bytes), [device](std::byte* memory) { release(device, memory); }};
}

// Memory that grows when more is asked for, and then holds nothing.
template <class T>
class Scratch {
public:
    T* at_least(Stream& stream, int64_t n) {
        if (n > size_) {
            stream.synchronize();  // work may still use the old one
            memory_.reset();
            memory_ = allocate_shared(stream.device(), static_cast<size_t>(n) * sizeof(T));
            size_ = n;
        }
        return reinterpret_cast<T*>(memory_.get());
    }

private:
    Memory memory_;
    int64_t size_ = 0;
};

// What one caller needs at a time; kept for the next.
struct Workspace {
    explicit Workspace(int device) : stream(device), windows{Event(device), Event(device)} {}

    Stream stream;
    std::array<Event, 2> windows;
    Scratch<int32_t> ids;
    Scratch<int32_t> index;
    Scratch<std::byte> rounded;
    Scratch<std::byte> halves;
    Scratch<std::byte> split_kv;
    // cos and sin of every pair of a head at a range of positions: the same for all layers.
    Scratch<float> rotations;
    int64_t rotations_head_dim = 0, rotations_first = 0, rotations_rows = 0;
    float rotations_theta = 0.0f;
};

// Workspaces that nobody uses.
class Workspaces {
public:
    explicit Workspaces(int device) : device_(device) {}

    std::unique_ptr<Workspace> take() {
        {
            const std::lock_guard lock(mutex_);
            if (!idle_.empty()) {
                std::unique_ptr<Workspace> workspace = std::move(idle_.back());
                idle_.pop_back();
                return workspace;
            }
        }
        return std::make_unique<Workspace>(device_);
    }
    void give_back(std::unique_ptr<Workspace> workspace) {
        const std::lock_guard lock(mutex_);
        idle_.push_back(std::move(workspace));
    }

private:
    int device_;
    std::mutex mutex_;
    std::vector<std::unique_ptr<Workspace>> idle_;
};

class CudaOps final : public Ops {
public:
    CudaOps(Workspaces& workspaces, Control& control)
        : workspaces_(workspaces), control_(control), workspace_(workspaces.take()), stream_(workspace_->stream) {}

    // What was started ends before the memory that it uses can go, and before another stream may read its results.
    ~CudaOps() override {
        try {
            stream_.synchronize();
        } catch (const DeviceError&) {
            return;  // whoever uses the device next hears of it; the workspace is not used again
        }
        workspaces_.give_back(std::move(workspace_));
    }
    CudaOps(const CudaOps&) = delete;
    CudaOps& operator=(const CudaOps&) = delete;

    void upload(Mat y, ConstMat host) override {
        assert(y.rows == host.rows && y.cols == host.cols);
        next();
        stream_.copy_in(y.data, bytes(y.stride), host.data, bytes(host.stride), bytes(y.cols), y.rows);
    }
    void download(Mat host, ConstMat x) override {
        assert(host.rows == x.rows && host.cols == x.cols);
        next();
        stream_.copy_out(host.data, bytes(host.stride), x.data, bytes(x.stride), bytes(x.cols), x.rows);
    }
    void copy(Mat y, ConstMat x) override {
        assert(y.rows == x.rows && y.cols == x.cols);
        next();
        stream_.copy(y.data, bytes(y.stride), x.data, bytes(x.stride), bytes(x.cols), x.rows);
    }

    void linear(ConstMat x, std::span<const Product> products) override {
        std::vector<FinishedProduct> finished;
        for (const Product& p : products) {
            assert(p.y.rows == x.rows && p.y.cols == p.w.rows && p.w.cols == x.cols);
            finished.push_back({p.y, p.w, p.bias, finish_of(p.then)});
        }
        next();
        multiply(x, finished);
    }
    void gated_linear(Mat y, ConstMat x, const Weight& gate, const Weight& up) override {
        assert(y.rows == x.rows && y.cols == gate.rows && gate.cols == x.cols);
        assert(up.rows == gate.rows && up.cols == gate.cols);
        next();
        if (gate.type == up.type && takes_gemm(x, gate.type)) {
            cuda::gated_gemm(stream_, y, halves(x), gate, up);
            return;
        }
        if (gate.type == up.type && has_matvec(gate.type)) {
            cuda::gated_matvec(stream_, y, x, takes_rounded(gate.type) ? rounded(x) : RoundedInput{}, gate, up);
            return;
        }
        const FinishedProduct products[] = {{y, gate, {}, Finish::silu}, {y, up, {}, Finish::times}};
        multiply(x, products);
    }
    void layer_norm(Mat y, ConstMat x, Vec weight, Vec bias, float eps) override {
        assert(y.rows == x.rows && y.cols == x.cols);
        assert(static_cast<int64_t>(weight.size()) == x.cols && weight.size() == bias.size());
        next();
        cuda::layer_norm(stream_, y, x, weight, bias, eps);
    }
    void rms_norm(Mat y, ConstMat x, Vec weight, float eps) override {
        assert(y.rows == x.rows && y.cols == x.cols && static_cast<int64_t>(weight.size()) == x.cols);
        next();
        cuda::rms_norm(stream_, y, x, weight, eps);
    }
    void gelu(Mat x) override {
        next();
        cuda::gelu(stream_, x);
    }
    void add(Mat y, ConstMat x) override {
        assert(y.rows == x.rows && y.cols == x.cols);
        next();
        cuda::add(stream_, y, x);
    }
    void rope(Mat x, int64_t head_dim, int64_t first, float theta) override {
        assert(head_dim > 0 && head_dim % 2 == 0 && x.cols % head_dim == 0);
        next();
        cuda::rotate(stream_, x, rotations(head_dim, first, x.rows, theta));
    }
    void attention(Mat out, ConstMat q, ConstMat k, ConstMat v, const AttentionShape& shape) override {
        assert(shape.n_kv_heads > 0 && shape.n_heads % shape.n_kv_heads == 0);
        assert(q.cols == shape.n_heads * shape.head_dim && k.cols == shape.n_kv_heads * shape.head_dim);
        assert(out.rows == q.rows && out.cols == q.cols && v.rows == k.rows && v.cols == k.cols);
        assert(k.rows >= 1 && (!shape.causal || k.rows >= q.rows));
        if (shape.head_dim > kMaxHeadDim) {
            throw DeviceError("CUDA: expected heads of at most " + std::to_string(kMaxHeadDim) + " values, found " +
                              std::to_string(shape.head_dim));
        }
        next();
        if (q.rows > 1 && shape.head_dim <= kMaxFlashHeadDim) {
            const auto needed = static_cast<int64_t>(split_bytes(k.rows, shape));
            std::byte* memory = workspace_->split_kv.at_least(stream_, needed);
            cuda::flash_attention(stream_, out, q, k, v, shape, memory);
        } else {
            cuda::attention(stream_, out, q, k, v, shape);
        }
    }
    void embed(Mat y, const Weight& table, std::span<const int32_t> ids) override {
        assert(y.rows == static_cast<int64_t>(ids.size()) && y.cols == table.cols);
        next();
        int32_t* on_device = workspace_->ids.at_least(stream_, y.rows);
        stream_.copy_in(on_device, ids.size_bytes(), ids.data(), ids.size_bytes(), ids.size_bytes(), 1);
        cuda::embed(stream_, y, table, on_device);
    }
    int32_t argmax(ConstMat x) override {
        assert(x.rows == 1);
        next();
        int32_t* on_device = workspace_->index.at_least(stream_, 1);
        cuda::argmax(stream_, on_device, {x.data, static_cast<size_t>(x.cols)});
        int32_t index = -1;
        stream_.copy_out(&index, sizeof(index), on_device, sizeof(index), sizeof(index), 1);
        return index;
    }

private:
    static size_t bytes(int64_t n) { return static_cast<size_t>(n) * sizeof(float); }

    // Before every operation.
    void next() {
        control_.check();
        if (++count_ % kWindow != 0) return;
        Event& window = workspace_->windows[count_ / kWindow % 2];
        window.wait();
        window.record(stream_);
    }

    static Finish finish_of(Then then) {
        switch (then) {
            case Then::store: return Finish::store;
            case Then::add: return Finish::add;
            case Then::gelu: return Finish::gelu;
        }
        return Finish::store;
    }

    RoundedInput rounded(ConstMat x) {
        const auto bytes = static_cast<int64_t>(rounded_bytes(x.rows, x.cols));
        return cuda::round_input(stream_, x, workspace_->rounded.at_least(stream_, bytes));
    }

    // Of more rows, each costs less on tensor cores.
    static bool takes_gemm(ConstMat x, WeightType type) { return x.rows > kMostMatvecRows && has_gemm(type); }

    HalfInput halves(ConstMat x) {
        const auto bytes = static_cast<int64_t>(half_bytes(x.rows, x.cols));
        return cuda::to_halves(stream_, x, workspace_->halves.at_least(stream_, bytes));
    }

    // In order; neighbours of one type are one launch.
    void multiply(ConstMat x, std::span<const FinishedProduct> products) {
        std::optional<RoundedInput> in_integers;
        std::optional<HalfInput> in_halves;
        while (!products.empty()) {
            const WeightType type = products[0].w.type;
            size_t n = 1;
            while (n < products.size() && n < kMostProducts && products[n].w.type == type) ++n;
            if (takes_gemm(x, type)) {
                if (!in_halves) in_halves = halves(x);
                cuda::gemm(stream_, *in_halves, products.first(n));
            } else if (has_matvec(type)) {
                if (takes_rounded(type) && !in_integers) in_integers = rounded(x);
                cuda::matvec(stream_, x, in_integers.value_or(RoundedInput{}), products.first(n));
            } else {
                n = 1;
                cuda::linear(stream_, x, products[0]);
            }
            products = products.subspan(n);
        }
    }

    ConstMat rotations(int64_t head_dim, int64_t first, int64_t rows, float theta) {
        Workspace& w = *workspace_;
        const bool known = head_dim == w.rotations_head_dim && theta == w.rotations_theta &&
                           first >= w.rotations_first && first + rows <= w.rotations_first + w.rotations_rows;
        if (!known) {
            w.rotations_rows = 0;
            const Mat cos_sin(w.rotations.at_least(stream_, rows * head_dim), rows, head_dim);
            cuda::rotations(stream_, cos_sin, first, theta);
            w.rotations_head_dim = head_dim;
            w.rotations_first = first;
            w.rotations_rows = rows;
            w.rotations_theta = theta;
        }
        const ConstMat all(w.rotations.at_least(stream_, 0), w.rotations_rows, head_dim);
        return all.row_range(first - w.rotations_first, rows);
    }

    Workspaces& workspaces_;
    Control& control_;
    std::unique_ptr<Workspace> workspace_;
    Stream& stream_;
    int count_ = 0;
};

class CudaBackend final : public Backend {
public:
    CudaBackend(int device, const DeviceInfo& info)
        : device_(device),
          name_("cuda:" + std::to_string(device) + " " + info.name),
          workspaces_(device),
          loading_(device) {}

    const char* name() const override { return name_.c_str(); }
    int n_threads() const override { return 1; }
    std::unique_ptr<Ops> ops(Control& control) override { return std::make_unique<CudaOps>(workspaces_, control); }
    Memory allocate(size_t bytes) override { return allocate_shared(device_, bytes); }

    const std::byte* place(std::span<const std::byte> bytes, Control& control) override {
        const std::byte* placed = placed_.emplace_back(allocate_shared(device_, bytes.size())).get();
        for (size_t begin = 0; begin < bytes.size(); begin += kPlacedAtOnce) {
            control.check();
            const std::span<const std::byte> piece =
                bytes.subspan(begin, std::min(kPlacedAtOnce, bytes.size() - begin));
            loading_.copy_in(placed_.back().get() + begin, piece.size(), piece.data(), piece.size(), piece.size(), 1);
        }
        loading_.synchronize();  // before another stream reads them
        return placed;
    }

private:
    int device_;
    std::string name_;
    Workspaces workspaces_;
    Stream loading_;
    std::vector<Memory> placed_;
};

}  // namespace

}  // namespace cuda

std::unique_ptr<Backend> make_cuda_backend(int device, int64_t needed_bytes) {
    const cuda::DeviceInfo info = cuda::device_info(device);
    const int64_t needed = needed_bytes + cuda::kReserve;
    if (needed > info.free_bytes) {
        throw AllocationError("device cuda:" + std::to_string(device) + " (" + info.name + "): the model needs " +
                              cuda::megabytes(needed) + " of its memory, " + cuda::megabytes(info.free_bytes) + " of " +
                              cuda::megabytes(info.total_bytes) + " are free; a smaller n_ctx needs less");
    }
    return std::make_unique<cuda::CudaBackend>(device, info);
}

int choose_cuda_device(int64_t needed_bytes) {
    try {
        const int count = cuda::device_count();
        for (int device = 0; device < count; ++device) {
            const cuda::DeviceInfo info = cuda::device_info(device);
            if (info.emulated || needed_bytes + cuda::kReserve > info.free_bytes) continue;
            return device;
        }
    } catch (const DeviceError&) {
        // No driver or no card that can be used: nobody asked for one.
    }
    return -1;
}

}  // namespace yivl
