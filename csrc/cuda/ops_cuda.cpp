// The operations of the seam on a GPU: where its memory comes from, and the order of its work. The arithmetic is in the
// kernels.
#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/profile.h"
#include "cuda/runtime.h"
#include "errors.h"
#include "ops.h"

namespace yivl {

namespace cuda {

namespace {

// The host runs ahead of the device by at most two windows of so many operations: a cancel waits for no more.
constexpr int kWindow = 16;
// Of x, or of q: so few are taken by kernels that read weights, or keys and values, as fast as memory allows, and
// results are rounded ahead for them. More go to tensor cores.
constexpr int64_t kFewRows = 8;
// Weights are copied in pieces, so that a cancel waits for no more than one.
constexpr size_t kPlacedAtOnce = 16 << 20;
// More than any cache holds: what is copied to see how fast memory is. An eighth of it where a model fills the card.
constexpr size_t kCopied = 256 << 20;
constexpr size_t kEmulatedCopy = 1 << 20;
constexpr size_t kLeastPart = 8;

Memory allocate_shared(int device, size_t bytes) {
    return {allocate(device, bytes), [device](std::byte* memory) { release(device, memory); }};
}

// Runs at the end of its scope.
template <class Fn>
struct Cleanup {
    Fn fn;
    ~Cleanup() { fn(); }
};

enum class Fill { nothing, zeros };

// Memory that grows when more is asked for, and then holds nothing, or zeros. To twice its size at least, so that what
// is longer with every token is seldom allocated.
template <class T>
class Scratch {
public:
    T* at_least(Stream& stream, int64_t n, Fill fill = Fill::nothing) {
        if (n > size_) {
            stream.synchronize();  // work may still use the old one
            memory_.reset();
            const int64_t size = std::max(n, 2 * std::exchange(size_, 0));
            const size_t bytes = static_cast<size_t>(size) * sizeof(T);
            memory_ = allocate_shared(stream.device(), bytes);
            if (fill == Fill::zeros) {
                const std::vector<std::byte> zeros(bytes);
                stream.copy_in(memory_.get(), bytes, zeros.data(), bytes, bytes, 1);
            }
            size_ = size;
        }
        return reinterpret_cast<T*>(memory_.get());
    }

private:
    Memory memory_;
    int64_t size_ = 0;
};

// Intermediate results between the kernels of an operation, or of one and the next.
struct Intermediates {
    Scratch<int32_t> ids;
    Scratch<int32_t> drawn;
    Scratch<std::byte> drawing;
    // Two, since an operation can read one and write another.
    std::array<Scratch<std::byte>, 2> rounded;
    Scratch<std::byte> halves;
    Scratch<std::byte> kv_in_halves;
    Scratch<int32_t> counts;
    Scratch<float> partials;
    // cos and sin of every pair of a head at a range of positions: the same for all layers.
    Scratch<float> rotations;
    int64_t rotations_head_dim = 0, rotations_first = 0, rotations_rows = 0;
    float rotations_theta = 0.0f;
};

// What one caller needs at a time; kept for the next.
struct Workspace {
    explicit Workspace(int device) : stream(device), windows{Event(device), Event(device)} {
        if (const char* names = std::getenv("YIVL_CUDA_WITHOUT")) stream.leave_out(names);
    }

    Stream stream;
    std::array<Event, 2> windows;
    Intermediates intermediates;
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

// A step as the card knows it, where the kernels of a recorded one look.
struct StepOnDevice {
    int32_t id;
    int32_t position;
};

// A session's step: the first is done operation by operation, which finds out how much memory it takes; the second is
// recorded.
class CudaStepRecord final : public StepRecord {
public:
    CudaStepRecord(int device, int64_t n_ctx)
        : graph(device), n_ctx(n_ctx), memory_(allocate_shared(device, sizeof(StepOnDevice))) {}

    StepOnDevice* on_device() const { return reinterpret_cast<StepOnDevice*>(memory_.get()); }

    Intermediates intermediates;
    Graph graph;
    const int64_t n_ctx;
    enum { none, tried, recorded } state = none;

private:
    Memory memory_;
};

class CudaOps final : public Ops {
public:
    CudaOps(Workspaces& workspaces, Profile* profile, Control& control)
        : workspaces_(workspaces), control_(control), workspace_(workspaces.take()), stream_(workspace_->stream) {
        stream_.profile = profile;
    }

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

    void linear(const Input& input, std::span<const Product> products) override {
        const ConstMat x = normalised(input);
        next();
        std::vector<FinishedProduct> finished;
        for (const Product& p : products) {
            const Mat y = p.y.matrix();
            assert(p.row + x.rows <= y.rows && y.cols == p.w.rows && p.w.cols == x.cols);
            // In a step, a row that is not the first is that of the position.
            const bool moves = step_ != nullptr && p.row > 0;
            finished.push_back({y.row_range(moves ? 0 : p.row, x.rows), p.w, p.bias, finish_of(p.then),
                                moves ? &step_->on_device()->position : nullptr, turns(p.rotation, x.rows)});
        }
        multiply(x, finished);
    }
    void gated_linear(Mat y, const Input& input, const Weight& gate, const Weight& up) override {
        const ConstMat x = normalised(input);
        assert(y.rows == x.rows && y.cols == gate.rows && gate.cols == x.cols);
        assert(up.rows == gate.rows && up.cols == gate.cols);
        next();
        if (gate.type == up.type && gate.type != WeightType::F32) {
            if (x.rows > kFewRows) return cuda::gated_gemm(stream_, y, halves(x), gate, up);
            const RoundedInput in = takes_rounded(gate.type) ? rounded(x) : RoundedInput{};
            cuda::gated_matvec(stream_, y, x, in, gate, up, round_ahead(y));
            return;
        }
        const FinishedProduct products[] = {{.y = y, .w = gate, .finish = Finish::silu},
                                            {.y = y, .w = up, .finish = Finish::times}};
        multiply(x, products);
    }
    void norm(Mat y, ConstMat x, const Norm& norm) override {
        assert(y.rows == x.rows && y.cols == x.cols && static_cast<int64_t>(norm.weight.size()) == x.cols);
        next();
        if (norm.bias.empty()) {
            cuda::rms_norm(stream_, y, x, norm.weight, norm.eps, round_ahead(y));
        } else {
            assert(norm.weight.size() == norm.bias.size());
            cuda::layer_norm(stream_, y, x, norm.weight, norm.bias, norm.eps);
        }
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
        cuda::rotate(stream_, x, turns({.head_dim = head_dim, .first = first, .theta = theta}, x.rows), nullptr);
    }
    void attention(Mat out, ConstMat q, ConstHeads keys, ConstHeads values, const AttentionShape& shape) override {
        ConstMat k = keys.matrix(), v = values.matrix();
        assert(shape.n_kv_heads > 0 && shape.n_heads % shape.n_kv_heads == 0);
        assert(q.cols == shape.n_heads * shape.head_dim && k.cols == shape.n_kv_heads * shape.head_dim);
        assert(out.rows == q.rows && out.cols == q.cols && v.rows == k.rows && v.cols == k.cols);
        assert(k.rows >= 1 && (!shape.causal || k.rows >= q.rows));
        if (shape.head_dim > kMaxHeadDim) {
            throw DeviceError("CUDA: expected heads of at most " + std::to_string(kMaxHeadDim) + " values, found " +
                              std::to_string(shape.head_dim));
        }
        next();
        const Work work = work_of(q, k, shape);
        if (step_ != nullptr) k.rows = v.rows = step_->n_ctx;
        if (q.rows <= kFewRows && has_split_attention(q, k, v, shape)) {
            const int64_t n_counts = split_counts(q.rows, shape);
            const SplitMemory memory{
                .counts = intermediates_->counts.at_least(stream_, n_counts, Fill::zeros),
                .partials = intermediates_->partials.at_least(stream_, split_partials(q.rows, shape)),
            };
            const RoundedInput ahead = shape.head_dim % kBlock == 0 ? round_ahead(out) : RoundedInput{};
            stream_.expect(work);
            cuda::split_attention(stream_, out, q, k, v, shape, position(), memory, ahead);
        } else if (q.rows > 1 && shape.head_dim <= kMaxFlashHeadDim) {
            const auto needed = static_cast<int64_t>(keys_in_halves_bytes(k.rows, shape));
            std::byte* memory = intermediates_->kv_in_halves.at_least(stream_, needed);
            cuda::keys_in_halves(stream_, k, v, shape, memory);
            stream_.expect(work);
            cuda::flash_attention(stream_, out, q, k.rows, shape, memory);
        } else {
            stream_.expect(work);
            cuda::attention(stream_, out, q, k, v, shape, position());
        }
    }
    void embed(Mat y, const Weight& table, std::span<const int32_t> ids) override {
        assert(y.rows == static_cast<int64_t>(ids.size()) && y.cols == table.cols);
        next();
        if (step_ != nullptr) {
            cuda::embed(stream_, y, table, &step_->on_device()->id);
            return;
        }
        int32_t* on_device = intermediates_->ids.at_least(stream_, y.rows);
        stream_.copy_in(on_device, ids.size_bytes(), ids.data(), ids.size_bytes(), ids.size_bytes(), 1);
        cuda::embed(stream_, y, table, on_device);
    }
    int32_t draw(ConstMat x, std::span<const int32_t> previous_ids, const Draw& draw) override {
        assert(x.rows == 1);
        next();
        Intermediates& w = *intermediates_;
        if (draw.options.repetition_penalty == 1) previous_ids = {};
        const auto n_ids = static_cast<int64_t>(previous_ids.size());
        int32_t* ids = w.ids.at_least(stream_, n_ids);
        if (n_ids > 0) stream_.copy_in(ids, bytes(n_ids), previous_ids.data(), bytes(n_ids), bytes(n_ids), 1);
        int32_t* id = w.drawn.at_least(stream_, 1);
        std::byte* memory = w.drawing.at_least(stream_, static_cast<int64_t>(draw_bytes(x.cols)));
        cuda::draw(stream_, id, {x.data, static_cast<size_t>(x.cols)}, {ids, previous_ids.size()}, draw, memory);
        int32_t result = -1;
        stream_.copy_out(&result, sizeof(result), id, sizeof(result), sizeof(result), 1);
        return result;
    }

    void step(const Step& step, std::unique_ptr<StepRecord>& record, const std::function<void()>& forward) override {
        next();
        if (record == nullptr) record = std::make_unique<CudaStepRecord>(stream_.device(), step.n_ctx);
        auto& r = static_cast<CudaStepRecord&>(*record);
        const StepOnDevice values{step.id, static_cast<int32_t>(step.position)};
        stream_.copy_in(r.on_device(), sizeof(values), &values, sizeof(values), sizeof(values), 1);
        const auto in_step = [&] {
            step_ = &r;
            intermediates_ = &r.intermediates;
            const Cleanup cleanup{[this] {
                step_ = nullptr;
                intermediates_ = &workspace_->intermediates;
                just_rounded_ = {};
            }};
            forward();
        };
        if (r.state == CudaStepRecord::none || !stream_.records_steps() || stream_.profile != nullptr) {
            in_step();
            r.state = CudaStepRecord::tried;
            return;
        }
        if (r.state == CudaStepRecord::tried) {
            r.graph.record(stream_, in_step);
            r.state = CudaStepRecord::recorded;
        }
        r.graph.start(stream_);
    }

private:
    static size_t bytes(int64_t n) { return static_cast<size_t>(n) * sizeof(float); }

    // Before every operation.
    void next() {
        control_.check();
        was_rounded_ = std::exchange(just_rounded_, {});
        // What is recorded is not done now, and cannot be waited for.
        if (step_ != nullptr || ++count_ % kWindow != 0) return;
        Event& window = workspace_->windows[count_ / kWindow % 2];
        window.wait();
        window.record(stream_);
    }

    static Work work_of(ConstMat q, ConstMat k, const AttentionShape& shape) {
        // Of the keys, those that a row sees.
        const int64_t pairs = q.rows * k.rows - (shape.causal ? q.rows * (q.rows - 1) / 2 : 0);
        return {.bytes = static_cast<int64_t>(bytes(2 * (k.rows * k.cols + q.rows * q.cols))),
                .flop = 4 * pairs * q.cols};
    }

    ConstMat normalised(const Input& input) {
        if (!input.norm) return input.x;
        norm(input.room, input.x, *input.norm);
        return input.room;
    }

    RowNumber position() const { return step_ == nullptr ? nullptr : &step_->on_device()->position; }

    static Finish finish_of(Then then) {
        switch (then) {
            case Then::store: return Finish::store;
            case Then::add: return Finish::add;
            case Then::gelu: return Finish::gelu;
        }
        return Finish::store;
    }

    // x rounded: by the operation before, if x is its result, or now.
    RoundedInput rounded(ConstMat x) {
        const ConstMat& known = was_rounded_.x;
        if (x.data == known.data && x.rows == known.rows && x.cols == known.cols) return was_rounded_.rounded;
        const RoundedInput to = room_to_round(x);
        cuda::round_input(stream_, x, to);
        return to;
    }
    // Room for a result that an operation is to round as well, since the next is likely to need it so.
    RoundedInput round_ahead(ConstMat y) {
        if (y.rows > kFewRows || y.cols % kBlock != 0) return {};
        const RoundedInput to = room_to_round(y);
        just_rounded_ = {y, to};
        return to;
    }
    // Not what the operation before has filled.
    RoundedInput room_to_round(ConstMat x) {
        turn_ = 1 - turn_;
        const auto bytes = static_cast<int64_t>(rounded_bytes(x.rows, x.cols));
        return rounded_in(intermediates_->rounded[turn_].at_least(stream_, bytes), x.rows, x.cols);
    }

    HalfInput halves(ConstMat x) {
        const auto bytes = static_cast<int64_t>(half_bytes(x.rows, x.cols));
        const HalfInput to = halves_in(stream_, intermediates_->halves.at_least(stream_, bytes), x.rows, x.cols);
        cuda::to_halves(stream_, x, to);
        return to;
    }

    // In order; neighbours of one type are one launch.
    void multiply(ConstMat x, std::span<const FinishedProduct> products) {
        std::optional<RoundedInput> in_integers;
        std::optional<HalfInput> in_halves;
        while (!products.empty()) {
            const WeightType type = products[0].w.type;
            size_t n = 1;
            while (n < products.size() && n < kMostProducts && products[n].w.type == type) ++n;
            if (type != WeightType::F32 && x.rows <= kFewRows) {
                if (takes_rounded(type) && !in_integers) in_integers = rounded(x);
                cuda::matvec(stream_, x, in_integers.value_or(RoundedInput{}), products.first(n));
            } else {
                if (type != WeightType::F32) {
                    if (!in_halves) in_halves = halves(x);
                    cuda::gemm(stream_, *in_halves, products.first(n));
                } else {
                    n = 1;
                    cuda::linear(stream_, x, products[0]);
                }
                for (const FinishedProduct& p : products.first(n)) {
                    if (p.turns.cos_sin != nullptr) cuda::rotate(stream_, p.y, p.turns, p.row);
                }
            }
            products = products.subspan(n);
        }
    }

    Turns turns(const Rotation& r, int64_t rows) {
        if (r.head_dim == 0) return {};
        assert(r.head_dim > 0 && r.head_dim % 2 == 0);
        if (step_ == nullptr) return {rotations(r.head_dim, r.first, rows, r.theta), r.head_dim, nullptr};
        return {rotations(r.head_dim, 0, step_->n_ctx, r.theta), r.head_dim, position()};
    }

    // cos and sin (rows, hd) at positions from `first` on.
    const float* rotations(int64_t head_dim, int64_t first, int64_t rows, float theta) {
        Intermediates& w = *intermediates_;
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
        return w.rotations.at_least(stream_, 0) + (first - w.rotations_first) * head_dim;
    }

    struct Rounded {
        ConstMat x;
        RoundedInput rounded;
    };

    Workspaces& workspaces_;
    Control& control_;
    std::unique_ptr<Workspace> workspace_;
    Stream& stream_;
    Intermediates* intermediates_ = &workspace_->intermediates;
    CudaStepRecord* step_ = nullptr;      // while one is under way
    Rounded was_rounded_, just_rounded_;  // by the operation before this one, by this one
    size_t turn_ = 0;                     // of the two places for what is rounded
    int count_ = 0;
};

DeviceInfo usable_device(int device) {
    constexpr int kOldestCapability = 75;
    DeviceInfo info = device_info(device);
    if (info.capability >= kOldestCapability) return info;
    throw DeviceError("CUDA: expected compute capability 7.5 or newer, found " + std::to_string(info.capability / 10) +
                      "." + std::to_string(info.capability % 10) + " (" + info.name + ")");
}

class CudaBackend final : public Backend {
public:
    CudaBackend(int device, const DeviceInfo& info, size_t weight_bytes)
        : device_(device),
          name_("cuda:" + std::to_string(device) + " " + info.name),
          workspaces_(device),
          loading_(device),
          n_multiprocessors_(info.n_multiprocessors),
          copied_bytes_(info.emulated ? kEmulatedCopy : kCopied),
          room_left_(weight_bytes) {
        if (weight_bytes > 0) room_ = weights_.emplace_back(allocate_shared(device, weight_bytes)).get();
    }

    const char* name() const override { return name_.c_str(); }
    int n_threads() const override { return 1; }
    std::unique_ptr<Ops> ops(Control& control) override {
        return std::make_unique<CudaOps>(workspaces_, profiled_ ? &profile_ : nullptr, control);
    }
    Memory allocate(size_t bytes) override { return allocate_shared(device_, bytes); }

    const std::byte* place(std::span<const std::byte> bytes, Control& control) override {
        std::byte* const placed = room_for(bytes.size());
        for (size_t begin = 0; begin < bytes.size(); begin += kPlacedAtOnce) {
            control.check();
            const std::span<const std::byte> piece =
                bytes.subspan(begin, std::min(kPlacedAtOnce, bytes.size() - begin));
            loading_.copy_in(placed + begin, piece.size(), piece.data(), piece.size(), piece.size(), 1);
        }
        loading_.synchronize();  // before another stream reads them
        return placed;
    }

    int64_t exert(Unit unit, int64_t rounds) override {
        Stream stream(device_);
        int64_t done = 0;
        if (unit == Unit::memory) {
            const auto [from, to, size] = room_to_copy();
            for (int64_t i = 0; i < rounds; ++i) {
                stream.copy(to.get(), size, from.get(), size, size, 1);
                done += static_cast<int64_t>(2 * size);
            }
            stream.synchronize();
            return done;
        }
        const Memory sink = allocate(sizeof(float));
        auto* to = reinterpret_cast<float*>(sink.get());
        done = unit == Unit::half ? exert_halves(stream, to, n_multiprocessors_, rounds)
                                  : exert_floats(stream, to, n_multiprocessors_, rounds);
        stream.synchronize();
        return done;
    }
    std::vector<KernelTime> profile() override {
        profiled_ = true;
        return profile_.take();
    }

private:
    struct Copied {
        Memory from, to;
        size_t size;
    };
    Copied room_to_copy() {
        for (size_t size = copied_bytes_;; size /= 2) {
            try {
                return {allocate(size), allocate(size), size};
            } catch (const AllocationError&) {
                if (size <= copied_bytes_ / kLeastPart) throw;
            }
        }
    }

    // The runtime gives whole pages of 2 MiB: matrices share what was taken for all of them.
    std::byte* room_for(size_t bytes) {
        const auto taken = static_cast<size_t>(placed_bytes(bytes));
        if (taken > room_left_) return weights_.emplace_back(allocate_shared(device_, bytes)).get();
        room_left_ -= taken;
        return std::exchange(room_, room_ + taken);
    }

    int device_;
    std::string name_;
    Workspaces workspaces_;
    Stream loading_;
    std::atomic<bool> profiled_ = false;
    Profile profile_;
    int n_multiprocessors_;
    size_t copied_bytes_;
    std::vector<Memory> weights_;
    std::byte* room_ = nullptr;  // of the first of them, where nothing is yet
    size_t room_left_;
};

}  // namespace

}  // namespace cuda

int cuda_device_count() { return cuda::device_count(); }

DeviceMemory cuda_memory(int device) {
    const cuda::DeviceInfo info = cuda::usable_device(device);
    return {info.name, info.total_bytes, info.free_bytes, info.emulated};
}

std::unique_ptr<Backend> make_cuda_backend(int device, int64_t weight_bytes) {
    return std::make_unique<cuda::CudaBackend>(device, cuda::usable_device(device), static_cast<size_t>(weight_bytes));
}

}  // namespace yivl
