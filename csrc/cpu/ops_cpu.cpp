// The operations of the seam on a CPU: how each is cut into pieces for the threads. The arithmetic is in the kernels.
#include "cpu/ops_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "cpu/isa.h"
#include "cpu/threads.h"

namespace yivl {

namespace {

// Rows of weights that are widened at a time, and rows of x that use them. A slab of both then fits the second-level
// cache, and widening costs little beside its use.
constexpr int64_t kRowBlock = 64;
constexpr int64_t kTokenBlock = 256;
// With few rows of x the widened weights are used only once: keep them in the first-level cache.
constexpr int64_t kFewTokens = 4;
constexpr int64_t kFewRowBlock = 8;
// The same for products in bfloat16: sums of so many rows and tokens wait in the second-level cache.
constexpr int64_t kBfloatRowBlock = 256;
constexpr int64_t kBfloatTokenBlock = 1152;
constexpr int64_t kBfloatTokens = 16;  // that are packed together
// Rows of one piece, at least.
constexpr int64_t kBfloatRows = 32;
// Query rows that share a packed block of keys.
constexpr int64_t kQueryRows = 128;

// Work in multiply-adds, or what takes as long: less than this does not repay waking another thread, and a piece handed
// to a thread should not be smaller.
constexpr int64_t kInlineWork = 1 << 16;
constexpr int64_t kPieceWork = 1 << 17;
// Multiply-adds in bfloat16 that take as long as one in float32.
constexpr int64_t kBfloatSpeed = 16;
// Multiply-adds that take as long as one transcendental function, or as one value read and written.
constexpr int64_t kFunctionWork = 16;
constexpr int64_t kCopyWork = 2;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One thread's memory: allocated at first use, kept, aligned to cache lines.
class Scratch {
public:
    float* floats(int64_t n) {
        if (n > size_) {
            data_.reset(static_cast<float*>(::operator new(static_cast<size_t>(n) * sizeof(float), kAlignment)));
            size_ = n;
        }
        return data_.get();
    }
    std::byte* bytes(int64_t n) {
        return reinterpret_cast<std::byte*>(floats(divide_up(n, static_cast<int64_t>(sizeof(float)))));
    }

private:
    static constexpr std::align_val_t kAlignment{64};
    struct Free {
        void operator()(float* p) const { ::operator delete(p, kAlignment); }
    };
    std::unique_ptr<float, Free> data_;
    int64_t size_ = 0;
};

struct CpuState {
    CpuState(int n_threads, const Kernels& kernels) : kernels(kernels), pool(n_threads), scratch(n_threads) {}
    const Kernels& kernels;
    ThreadPool pool;
    std::vector<Scratch> scratch;  // of each thread of the pool
};

class CpuOps final : public Ops {
public:
    CpuOps(CpuState& state, Control& control) : state_(state), kernels_(state.kernels), control_(control) {}

    void linear(Mat y, ConstMat x, const Weight& w, Vec bias) override {
        assert(x.cols == w.cols && y.cols == w.rows && y.rows == x.rows);
        assert(bias.empty() || static_cast<int64_t>(bias.size()) == w.rows);
        if (kernels_.bfloat != nullptr && w.type != WeightType::F32) {
            for (int64_t token = 0; token < x.rows; token += kBfloatTokenBlock) {
                const int64_t n = std::min(kBfloatTokenBlock, x.rows - token);
                linear_bfloat(*kernels_.bfloat, y.row_range(token, n), x.row_range(token, n), w, bias);
            }
            return;
        }
        if (x.rows <= kFewTokens) {
            linear_block(y, Slabs{x.data, x.stride, kSlab}, x.rows, w, bias, kFewRowBlock);
            return;
        }
        for (int64_t token = 0; token < x.rows; token += kTokenBlock) {
            const int64_t n = std::min(kTokenBlock, x.rows - token);
            linear_block(y.row_range(token, n), packed(x.row_range(token, n)), n, w, bias, kRowBlock);
        }
    }

    void layer_norm(Mat y, ConstMat x, Vec weight, Vec bias, float eps) override {
        assert(y.rows == x.rows && y.cols == x.cols);
        assert(static_cast<int64_t>(weight.size()) == x.cols && weight.size() == bias.size());
        each_row(x, kCopyWork * 3, [&](int64_t i) {
            kernels_.layer_norm(y.row(i).data(), x.row(i).data(), weight.data(), bias.data(), eps, x.cols);
        });
    }

    void rms_norm(Mat y, ConstMat x, Vec weight, float eps) override {
        assert(y.rows == x.rows && y.cols == x.cols && static_cast<int64_t>(weight.size()) == x.cols);
        each_row(x, kCopyWork * 2,
                 [&](int64_t i) { kernels_.rms_norm(y.row(i).data(), x.row(i).data(), weight.data(), eps, x.cols); });
    }

    void gelu(Mat x) override {
        each_row(x, kFunctionWork, [&](int64_t i) { kernels_.gelu(x.row(i).data(), x.cols); });
    }

    void swiglu(Mat gate, ConstMat up) override {
        assert(gate.rows == up.rows && gate.cols == up.cols);
        each_row(up, kFunctionWork, [&](int64_t i) { kernels_.swiglu(gate.row(i).data(), up.row(i).data(), up.cols); });
    }

    void add(Mat y, ConstMat x) override {
        assert(y.rows == x.rows && y.cols == x.cols);
        each_row(x, kCopyWork, [&](int64_t i) { kernels_.add(y.row(i).data(), x.row(i).data(), x.cols); });
    }

    void rope(Mat x, int64_t head_dim, int64_t first, float theta) override {
        assert(head_dim > 0 && head_dim % 2 == 0 && x.cols % head_dim == 0);
        rotations_.prepare(head_dim, first, x.rows, theta);
        each_row(x, kCopyWork * 2, [&](int64_t i) {
            for (int64_t head = 0; head < x.cols; head += head_dim) {
                kernels_.rotate(x.row(i).data() + head, rotations_.of(first + i), head_dim);
            }
        });
    }

    void attention(Mat out, ConstMat q, ConstMat k, ConstMat v, const AttentionShape& shape) override {
        assert(shape.n_kv_heads > 0 && shape.n_heads % shape.n_kv_heads == 0);
        assert(q.cols == shape.n_heads * shape.head_dim && k.cols == shape.n_kv_heads * shape.head_dim);
        assert(out.rows == q.rows && out.cols == q.cols && v.rows == k.rows && v.cols == k.cols);
        assert(k.rows >= 1 && (!shape.causal || k.rows >= q.rows));
        const int64_t group = shape.n_heads / shape.n_kv_heads;
        const int64_t rows = q.rows * group;
        const int64_t blocks = divide_up(rows, kQueryRows);
        const int64_t block = divide_up(rows, std::max<int64_t>(blocks, 1));
        const int64_t scratch_floats = kernels_.attention_scratch(block, shape.head_dim);
        // Packing a key costs about as much as using it four times.
        const int64_t work = k.rows * shape.head_dim * 2 * (block + 4);
        run(blocks * shape.n_kv_heads, work, [&](int64_t item, Scratch& scratch) {
            const int64_t head = item % shape.n_kv_heads;
            // The last rows see the most keys, and so take the longest: first come the longest.
            const int64_t row = (blocks - 1 - item / shape.n_kv_heads) * block;
            const AttentionPiece piece{
                .q = q.data + head * group * shape.head_dim,
                .q_stride = q.stride,
                .out = out.data + head * group * shape.head_dim,
                .out_stride = out.stride,
                .k = k.data + head * shape.head_dim,
                .k_stride = k.stride,
                .v = v.data + head * shape.head_dim,
                .v_stride = v.stride,
                .head_dim = shape.head_dim,
                .group = group,
                .n_keys = k.rows,
                .first_limit = k.rows - q.rows + 1,
                .causal = shape.causal,
                .row_begin = row,
                .row_end = std::min(row + block, rows),
            };
            const auto cancelled = [](const void* control) {
                return static_cast<const Control*>(control)->cancelled();
            };
            kernels_.attention(piece, scratch.floats(scratch_floats), cancelled, &control_);
        });
    }

    void embed(Mat y, const Weight& table, std::span<const int32_t> ids) override {
        assert(y.rows == static_cast<int64_t>(ids.size()) && y.cols == table.cols);
        each_row(y, kCopyWork, [&](int64_t i) {
            const int32_t id = ids[static_cast<size_t>(i)];
            assert(id >= 0 && id < table.rows);
            kernels_.dequantize(table.type, table.data + id * table.row_bytes(), y.row(i).data(), y.cols);
        });
    }

private:
    // cos and sin of every pair of a head at a range of positions, kept from one layer to the next. float32 steps as in
    // the reference: inv_freq = 1 / theta^(2j/hd), angle = position * inv_freq.
    class Rotations {
    public:
        void prepare(int64_t head_dim, int64_t first, int64_t rows, float theta) {
            if (head_dim == head_dim_ && theta == theta_ && first >= first_ && first + rows <= first_ + rows_) return;
            head_dim_ = head_dim;
            first_ = first;
            rows_ = rows;
            theta_ = theta;
            cos_sin_.resize(static_cast<size_t>(rows * head_dim));
            for (int64_t j = 0; j < head_dim / 2; ++j) {
                const float exponent = static_cast<float>(2 * j) / static_cast<float>(head_dim);
                const float inv_freq = 1.0f / static_cast<float>(std::pow(double{theta}, double{exponent}));
                for (int64_t i = 0; i < rows; ++i) {
                    const float angle = static_cast<float>(first + i) * inv_freq;
                    float* to = &cos_sin_[static_cast<size_t>(i * head_dim + 2 * j)];
                    to[0] = static_cast<float>(std::cos(double{angle}));
                    to[1] = static_cast<float>(std::sin(double{angle}));
                }
            }
        }
        const float* of(int64_t position) const {
            return &cos_sin_[static_cast<size_t>((position - first_) * head_dim_)];
        }

    private:
        int64_t head_dim_ = 0, first_ = 0, rows_ = 0;
        float theta_ = 0.0f;
        std::vector<float> cos_sin_;  // (rows, head_dim)
    };

    // fn(item, scratch) for every item of [0, n), on the pool if the work repays it.
    template <class Fn>
    void run(int64_t n, int64_t work_per_item, Fn&& fn) {
        work_per_item = std::max<int64_t>(work_per_item, 1);
        if (n * work_per_item <= kInlineWork) {
            control_.check();
            for (int64_t i = 0; i < n; ++i) fn(i, scratch_);
            return;
        }
        const int64_t grain = std::max<int64_t>(kPieceWork / work_per_item, 1);
        state_.pool.parallel_for(control_, n, grain, [&](int64_t begin, int64_t end, int thread) {
            Scratch& scratch = state_.scratch[static_cast<size_t>(thread)];
            for (int64_t i = begin; i < end; ++i) fn(i, scratch);
        });
    }

    template <class Fn>
    void each_row(ConstMat shape, int64_t work_per_value, Fn&& fn) {
        run(shape.rows, shape.cols * work_per_value, [&](int64_t i, Scratch&) { fn(i); });
    }

    // Rows of x cut into slabs of columns: slab s of row t begins at data + s * slab_step + t * stride.
    struct Slabs {
        const float* data;
        int64_t stride;
        int64_t slab_step;
    };

    // x with each slab's rows side by side: rows that lie a power of two apart would compete for the same cache lines.
    Slabs packed(ConstMat x) {
        const int64_t slab_step = x.rows * kSlab;
        float* to = packed_.floats(slab_step * divide_up(x.cols, kSlab));
        run(x.rows, x.cols * kCopyWork, [&](int64_t t, Scratch&) {
            for (int64_t col = 0; col < x.cols; col += kSlab) {
                const size_t n = static_cast<size_t>(std::min(kSlab, x.cols - col));
                std::memcpy(to + col / kSlab * slab_step + t * kSlab, x.row(t).data() + col, n * sizeof(float));
            }
        });
        return {to, kSlab, slab_step};
    }

    void linear_bfloat(const BfloatKernels& kernels, Mat y, ConstMat x, const Weight& w, Vec bias) {
        const BfloatPack from{x.data, x.stride, x.rows, x.cols, w.type};
        std::byte* packed = packed_.bytes(kernels.packed_bytes(x.rows, x.cols));
        run(divide_up(x.rows, kBfloatTokens), kBfloatTokens * x.cols * kCopyWork,
            [&](int64_t group, Scratch&) { kernels.pack(packed, from, group); });

        // Several pieces for each thread, so that all end at about the same time.
        const int64_t share = divide_up(w.rows, 8 * state_.pool.n_threads());
        const int64_t row_block = std::min(divide_up(share, kBfloatRows) * kBfloatRows, kBfloatRowBlock);
        const int64_t scratch_bytes = kernels.scratch_bytes(x.rows, row_block, w.cols);
        const auto cancelled = [](const void* control) { return static_cast<const Control*>(control)->cancelled(); };
        run(divide_up(w.rows, std::max<int64_t>(row_block, 1)),
            row_block * w.cols * (kCopyWork + x.rows / kBfloatSpeed), [&](int64_t item, Scratch& scratch) {
                const int64_t row = item * row_block;
                const BfloatPiece piece{
                    .y = y.data + row,
                    .y_stride = y.stride,
                    .x = packed,
                    .n_tokens = x.rows,
                    .type = w.type,
                    .w = w.data + row * w.row_bytes(),
                    .row_bytes = w.row_bytes(),
                    .n_rows = std::min(row_block, w.rows - row),
                    .cols = w.cols,
                    .bias = bias.empty() ? nullptr : bias.data() + row,
                };
                kernels.linear(piece, scratch.bytes(scratch_bytes), cancelled, &control_);
            });
    }

    void linear_block(Mat y, const Slabs& x, int64_t n_tokens, const Weight& w, Vec bias, int64_t row_block) {
        const int64_t blocks = divide_up(w.rows, row_block);
        run(blocks, row_block * w.cols * (n_tokens + kCopyWork), [&](int64_t item, Scratch& scratch) {
            const int64_t row = item * row_block;
            linear_rows(y, x, n_tokens, w, bias, row, std::min(row_block, w.rows - row), scratch);
        });
    }

    void linear_rows(Mat y, const Slabs& x, int64_t n_tokens, const Weight& w, Vec bias, int64_t row, int64_t n_rows,
                     Scratch& scratch) {
        const TypeInfo& info = type_info(w.type);
        const int64_t row_bytes = w.row_bytes();
        const std::byte* bytes = w.data + row * row_bytes;
        // Float32 in a mapped file needs no widening, but for many uses the copy is quicker than rows far apart.
        const bool in_place = w.type == WeightType::F32 && n_tokens <= kFewTokens &&
                              reinterpret_cast<uintptr_t>(bytes) % alignof(float) == 0;
        float* widened = in_place ? nullptr : scratch.floats(n_rows * kSlab);
        const Mat out = y.col_range(row, n_rows);
        if (n_tokens == 1 && kernels_.multiply(w.type, out.data, x.data, bytes, row_bytes, n_rows, w.cols)) {
            if (!bias.empty()) kernels_.add(out.data, bias.data() + row, n_rows);
            return;
        }
        for (int64_t col = 0; col < w.cols; col += kSlab) {
            if (control_.cancelled()) return;
            const int64_t n_cols = std::min(kSlab, w.cols - col);
            const float* weights = widened;
            int64_t stride = kSlab;
            if (in_place) {
                weights = reinterpret_cast<const float*>(bytes) + col;
                stride = w.cols;
            } else {
                for (int64_t r = 0; r < n_rows; ++r) {
                    const std::byte* from = bytes + r * row_bytes + col / info.block * info.bytes;
                    kernels_.dequantize(w.type, from, widened + r * kSlab, n_cols);
                }
            }
            kernels_.dot(out.data, out.stride, x.data + col / kSlab * x.slab_step, x.stride, n_tokens, weights, stride,
                         n_rows, n_cols, col > 0);
        }
        if (bias.empty()) return;
        for (int64_t t = 0; t < n_tokens; ++t) kernels_.add(out.row(t).data(), bias.data() + row, n_rows);
    }

    CpuState& state_;
    const Kernels& kernels_;
    Control& control_;
    Scratch scratch_;  // for work too small for the pool, whose scratch belongs to whoever has the turn
    Scratch packed_;
    Rotations rotations_;
};

class CpuBackend final : public Backend {
public:
    CpuBackend(int n_threads, const Kernels& kernels)
        : state_(n_threads == 0 ? default_thread_count() : n_threads, kernels) {}

    const char* name() const override { return state_.kernels.name; }
    int n_threads() const override { return state_.pool.n_threads(); }
    std::unique_ptr<Ops> ops(Control& control) override {
        state_.pool.check_process();
        return std::make_unique<CpuOps>(state_, control);
    }

private:
    CpuState state_;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(int n_threads, const Kernels& kernels) {
    return std::make_unique<CpuBackend>(n_threads, kernels);
}

std::unique_ptr<Backend> make_cpu_backend(int n_threads) { return make_cpu_backend(n_threads, default_kernels()); }

}  // namespace yivl
