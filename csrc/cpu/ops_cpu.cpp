// The operations of the seam on a CPU: how each is cut into pieces for the threads. The arithmetic is in the kernels.
#include "cpu/ops_cpu.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/threads.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace yivl {

namespace {

// Rows of x that are multiplied at a time.
constexpr int64_t kTokenBlock = 1152;
// Rows of the weights in one piece of a product: a multiple of kRowStep, unless there are no more. For one token a
// piece keeps nothing for the next, and threads that wait for the last one leave memory idle.
constexpr int64_t kRowBlock = 256;
constexpr int64_t kRowBlockOfOne = 64;
constexpr int64_t kRowStep = 32;
// Query rows that share a packed block of keys, at most; whole tiles of every instruction set, if there are so many.
constexpr int64_t kQueryTiles = 96;
constexpr int64_t kQueryRows = 3 * kQueryTiles;

// Work in multiply-adds, or what takes as long: less than this does not repay waking another thread, and a piece handed
// to a thread should not be smaller.
constexpr int64_t kInlineWork = 1 << 16;
constexpr int64_t kPieceWork = 1 << 17;
// Multiply-adds of other kernels that take as long as one in float32.
constexpr int64_t kPackedSpeed = 4;
// Multiply-adds that take as long as one transcendental function, or as one value read and written.
constexpr int64_t kFunctionWork = 16;
constexpr int64_t kCopyWork = 2;
constexpr int64_t kNormWork = 3 * kCopyWork;

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

    void upload(Mat y, ConstMat host) override { copy(y, host); }
    void download(Mat host, ConstMat x) override { copy(host, x); }
    void copy(Mat y, ConstMat x) override {
        assert(y.rows == x.rows && y.cols == x.cols);
        each_row(x, kCopyWork, [&](int64_t i) { std::ranges::copy(x.row(i), y.row(i).begin()); });
    }

    void linear(const Input& input, std::span<const Product> products) override {
        const ConstMat x = input.x;
        for (int64_t token = 0; token < x.rows; token += kTokenBlock) {
            const int64_t n = std::min(kTokenBlock, x.rows - token);
            linear_block(input.row_range(token, n), products, token);
        }
        for (const Product& p : products) {
            const Rotation& r = p.rotation;
            const Heads y = p.y.row_range(p.row, x.rows);
            for (int64_t i = 0; r.head_dim > 0 && i < y.n_heads; ++i) rope(y.head(i), r.head_dim, r.first, r.theta);
        }
    }

    void gated_linear(Mat y, const Input& input, const Weight& gate, const Weight& up) override {
        const ConstMat x = input.x;
        for (int64_t token = 0; token < x.rows; token += kTokenBlock) {
            const int64_t n = std::min(kTokenBlock, x.rows - token);
            gated_linear_block(y.row_range(token, n), input.row_range(token, n), gate, up);
        }
    }

    void norm(Mat y, ConstMat x, const Norm& norm) override {
        assert(y.rows == x.rows && y.cols == x.cols);
        each_row(x, kNormWork, [&](int64_t i) { norm_row(y.row(i), x.row(i), norm); });
    }

    void gelu(Mat x) override {
        each_row(x, kFunctionWork, [&](int64_t i) { kernels_.gelu(x.row(i).data(), x.cols); });
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

    void attention(Mat out, ConstMat q, ConstHeads k, ConstHeads v, const AttentionShape& shape) override {
        assert(shape.n_kv_heads > 0 && shape.n_heads % shape.n_kv_heads == 0);
        assert(q.cols == shape.n_heads * shape.head_dim && out.rows == q.rows && out.cols == q.cols);
        assert(k.n_heads == shape.n_kv_heads && k.head_dim == shape.head_dim);
        assert(v.n_heads == k.n_heads && v.head_dim == k.head_dim && v.rows == k.rows);
        assert(q.rows >= 1 && k.rows >= 1 && (!shape.causal || k.rows >= q.rows));
        const int64_t group = shape.n_heads / shape.n_kv_heads;
        const int64_t rows = q.rows * group;
        const int64_t share = divide_up(rows, divide_up(rows, kQueryRows));
        const int64_t block = std::min(divide_up(share, kQueryTiles) * kQueryTiles, rows);
        const int64_t blocks = divide_up(rows, block);
        const auto all_rows = [&](int64_t head) {
            return AttentionPiece{
                .q = q.data + head * group * shape.head_dim,
                .q_stride = q.stride,
                .out = out.data + head * group * shape.head_dim,
                .out_stride = out.stride,
                .k = k.head(head).data,
                .k_stride = k.stride,
                .v = v.head(head).data,
                .v_stride = v.stride,
                .head_dim = shape.head_dim,
                .group = group,
                .n_keys = k.rows,
                .first_limit = k.rows - q.rows + 1,
                .causal = shape.causal,
                .row_begin = 0,
                .row_end = rows,
            };
        };
        // fn(piece, head, scratch) for all pieces. The last rows see the most keys, and so take the longest: first come
        // the longest.
        const auto each_piece = [&](int64_t work, auto&& fn) {
            run(blocks * shape.n_kv_heads, work, [&](int64_t item, Scratch& scratch) {
                AttentionPiece piece = all_rows(item % shape.n_kv_heads);
                piece.row_begin = (blocks - 1 - item / shape.n_kv_heads) * block;
                piece.row_end = std::min(piece.row_begin + block, rows);
                fn(piece, item % shape.n_kv_heads, scratch);
            });
        };
        const int64_t work = k.rows * shape.head_dim * 2 * block;
        const PackedAttention* const packed = kernels_.packed_attention;
        if (shape.rounded && packed != nullptr && q.rows >= kernels_.packed->least_tokens) {
            const int64_t head_bytes = packed->packed_bytes(k.rows, shape.head_dim);
            const int64_t key_blocks = divide_up(k.rows, packed->key_block);
            std::byte* const keys = packed_keys_.bytes(head_bytes * shape.n_kv_heads);
            run(key_blocks * shape.n_kv_heads, packed->key_block * shape.head_dim * 2 * kCopyWork,
                [&](int64_t item, Scratch&) {
                    const int64_t i = item / key_blocks;
                    packed->pack(keys + i * head_bytes, all_rows(i), item % key_blocks);
                });
            const int64_t bytes = packed->scratch_bytes(shape.head_dim);
            each_piece(work / kPackedSpeed, [&](const AttentionPiece& piece, int64_t i, Scratch& scratch) {
                packed->attention(piece, keys + i * head_bytes, scratch.bytes(bytes), ends, this);
            });
            return;
        }
        const int64_t floats = kernels_.attention_scratch(block, shape.head_dim);
        // Packing a key costs about as much as using it four times.
        each_piece(work + k.rows * shape.head_dim * 8, [&](const AttentionPiece& piece, int64_t, Scratch& scratch) {
            kernels_.attention(piece, scratch.floats(floats), ends, this);
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

    int32_t draw(ConstMat, std::span<const int32_t>, const Draw&) override { return -1; }

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

    // What kernels poll.
    static bool ends(const void* ops) { return static_cast<const CpuOps*>(ops)->control_.ends(); }

    // fn(item, scratch) for every item of [0, n), on the pool if the work repays it.
    template <class Fn>
    void run(int64_t n, int64_t work_per_item, Fn&& fn) {
        work_per_item = std::max<int64_t>(work_per_item, 1);
        if (n * work_per_item <= kInlineWork) {
            control_.check();
            for (int64_t i = 0; i < n; ++i) fn(i, scratch_);
            control_.check();  // a kernel that was to end left the rest undone
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

    // How x is packed for some weights.
    struct Form {
        const PackedKernels& kernels;
        int order;
        int slot;  // of Forms
    };
    static constexpr int kForms = PackedKernels::kOrders + 1;

    // An input in the forms that some weights want; all are for one number of tokens, so that those of `packed` and of
    // `few` never meet.
    struct Forms {
        const Input& input;
        const std::byte* packed[kForms] = {};
    };

    Form form_for(const Weight& w, int64_t n_tokens) const {
        const bool few = kernels_.few != nullptr && n_tokens < kernels_.packed->least_tokens;
        if (const PackedKernels* const packed = few ? kernels_.few : kernels_.packed; packed != nullptr) {
            if (const int order = packed->order(w.type); order >= 0) return {*packed, order, order};
        }
        return {*kernels_.floats, kernels_.floats->order(w.type), PackedKernels::kOrders};
    }

    void norm_row(std::span<float> y, std::span<const float> x, const Norm& n) {
        const auto size = static_cast<int64_t>(x.size());
        assert(n.weight.size() == x.size() && (n.bias.empty() || n.bias.size() == x.size()));
        if (n.bias.empty()) {
            kernels_.rms_norm(y.data(), x.data(), n.weight.data(), n.eps, size);
        } else {
            kernels_.layer_norm(y.data(), x.data(), n.weight.data(), n.bias.data(), n.eps, size);
        }
    }

    // Packs the input for w, unless it is already. What is normalised goes from one cache line to the next: it takes no
    // room in memory.
    void prepare(Forms& forms, const Weight& w) {
        const Input& input = forms.input;
        const ConstMat x = input.x;
        const Form form = form_for(w, x.rows);
        if (forms.packed[form.slot] != nullptr) return;
        const int64_t tokens = std::min(form.kernels.tokens, x.rows);
        std::byte* const to = packed_[form.slot].bytes(form.kernels.packed_bytes(x.rows, x.cols));
        run(divide_up(x.rows, tokens), tokens * x.cols * (input.norm ? kNormWork + kCopyWork : kCopyWork),
            [&](int64_t group, Scratch& scratch) {
                const int64_t first = group * tokens;
                ConstMat from = x.row_range(first, std::min(tokens, x.rows - first));
                if (input.norm) {
                    const Mat normal(scratch.floats(from.rows * from.cols), from.rows, from.cols);
                    for (int64_t i = 0; i < from.rows; ++i) norm_row(normal.row(i), from.row(i), *input.norm);
                    from = normal;
                }
                form.kernels.pack(to, {from.data, from.stride, x.rows, x.cols, form.order}, group);
            });
        forms.packed[form.slot] = to;
    }

    // Rows of one piece: several pieces for each thread, so that all end at about the same time.
    int64_t row_block(const Weight& w, int64_t n_tokens) const {
        const int64_t share = divide_up(w.rows, 8 * state_.pool.n_threads());
        return std::clamp(divide_up(share, kRowStep) * kRowStep, kRowStep, n_tokens == 1 ? kRowBlockOfOne : kRowBlock);
    }

    int64_t piece_work(const Weight& w, int64_t n_tokens) const {
        const int64_t uses = &form_for(w, n_tokens).kernels == kernels_.floats ? n_tokens : n_tokens / kPackedSpeed;
        return row_block(w, n_tokens) * w.cols * (kCopyWork + uses);
    }

    int64_t scratch_bytes(const Weight& w, int64_t n_tokens) const {
        return form_for(w, n_tokens).kernels.scratch_bytes(n_tokens, row_block(w, n_tokens), w.cols);
    }

    void linear_block(const Input& input, std::span<const Product> products, int64_t first_token) {
        const ConstMat x = input.x;
        Forms forms{input};
        pieces_.clear();
        int64_t work = 0;
        int64_t scratch_size = 0;
        for (const Product& p : products) {
            assert(x.cols == p.w.cols && p.y.cols() == p.w.rows && p.row + first_token + x.rows <= p.y.rows);
            assert(p.bias.empty() || static_cast<int64_t>(p.bias.size()) == p.w.rows);
            prepare(forms, p.w);
            const int64_t block = row_block(p.w, x.rows);
            // A piece has its results side by side.
            const int64_t side = p.y.side_by_side() ? p.w.rows : p.y.head_dim;
            for (int64_t row = 0, n = 0; row < p.w.rows; row += n) {
                n = std::min(block, side - row % side);
                pieces_.push_back({&p, row, n});
            }
            work = std::max(work, piece_work(p.w, x.rows));
            scratch_size = std::max(scratch_size, scratch_bytes(p.w, x.rows));
        }
        run(static_cast<int64_t>(pieces_.size()), work, [&](int64_t item, Scratch& scratch) {
            const Piece& piece = pieces_[static_cast<size_t>(item)];
            const Product& p = *piece.product;
            const Mat y = p.y.row_range(p.row + first_token, x.rows).col_range(piece.row, piece.n_rows);
            const auto gelu = [&](int64_t t, int64_t first, int64_t n) { kernels_.gelu(y.row(t).data() + first, n); };
            linear_rows(y, forms, p.w, piece.row, p.bias, p.then == Then::add, scratch.bytes(scratch_size),
                        p.then == Then::gelu ? &gelu : nullptr);
        });
    }

    void gated_linear_block(Mat y, const Input& input, const Weight& gate, const Weight& up) {
        const ConstMat x = input.x;
        assert(x.cols == gate.cols && x.cols == up.cols && y.cols == gate.rows && y.cols == up.rows);
        Forms forms{input};
        prepare(forms, gate);
        prepare(forms, up);
        const int64_t block = std::min(row_block(gate, x.rows), row_block(up, x.rows));
        const int64_t up_bytes = block * x.rows * static_cast<int64_t>(sizeof(float));
        const int64_t scratch_size = std::max(scratch_bytes(gate, x.rows), scratch_bytes(up, x.rows));
        run(divide_up(gate.rows, block), piece_work(gate, x.rows) + piece_work(up, x.rows),
            [&](int64_t item, Scratch& scratch) {
                const int64_t row = item * block;
                const int64_t n_rows = std::min(block, gate.rows - row);
                std::byte* const memory = scratch.bytes(divide_up(up_bytes, 64) * 64 + scratch_size);
                const Mat gates = y.col_range(row, n_rows);
                const Mat ups(reinterpret_cast<float*>(memory + scratch_size), x.rows, n_rows);
                const auto swiglu = [&](int64_t t, int64_t first, int64_t n) {
                    kernels_.swiglu(gates.row(t).data() + first, ups.row(t).data() + first, n);
                };
                linear_rows(gates, forms, gate, row, {}, false, memory);
                linear_rows(ups, forms, up, row, {}, false, memory, &swiglu);
            });
    }

    struct Nothing {
        void operator()(int64_t, int64_t, int64_t) const {}
    };

    // y (T, n) = or += the outputs [row, row + n) of a product; finish(token, first, n) when n of them are complete.
    template <class Finish = Nothing>
    void linear_rows(Mat y, const Forms& forms, const Weight& w, int64_t row, Vec bias, bool add, std::byte* scratch,
                     const Finish* finish = nullptr) {
        const auto call = [](const void* arg, int64_t token, int64_t first, int64_t n) {
            (*static_cast<const Finish*>(arg))(token, first, n);
        };
        const Form form = form_for(w, y.rows);
        const PackedPiece piece{
            .y = y.data,
            .y_stride = y.stride,
            .add = add,
            .x = forms.packed[form.slot],
            .n_tokens = y.rows,
            .type = w.type,
            .w = w.data + row * w.row_bytes(),
            .row_bytes = w.row_bytes(),
            .n_rows = y.cols,
            .cols = w.cols,
            .bias = bias.empty() ? nullptr : bias.data() + row,
            .finish = finish == nullptr ? nullptr : +call,
            .finish_arg = finish,
        };
        form.kernels.linear(piece, scratch, ends, this);
    }

    // Some outputs of a product.
    struct Piece {
        const Product* product;
        int64_t row, n_rows;
    };

    CpuState& state_;
    const Kernels& kernels_;
    Control& control_;
    Scratch scratch_;  // for work too small for the pool, whose scratch belongs to whoever has the turn
    Scratch packed_[kForms];
    Scratch packed_keys_;  // and values, of attention on a matrix unit
    std::vector<Piece> pieces_;
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
    Memory allocate(size_t bytes) override {
        constexpr size_t kLine = 64;  // of the cache, and the widest vector
        constexpr size_t kHugePage = 1 << 21;
        const size_t alignment = bytes >= kHugePage ? kHugePage : kLine;
        const size_t rounded = std::max((bytes + alignment - 1) / alignment * alignment, alignment);
        void* memory = std::aligned_alloc(alignment, rounded);
        if (memory == nullptr) {
            throw AllocationError("cannot allocate " + std::to_string(bytes) +
                                  " bytes of activations or KV cache; a smaller n_ctx needs less");
        }
#if defined(__linux__)
        // Attention goes through keys that lie far apart: with small pages it waits for their addresses. Only a hint.
        if (alignment == kHugePage) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
        return {static_cast<std::byte*>(memory), std::free};
    }
    const std::byte* place(std::span<const std::byte> bytes, Control&) override { return bytes.data(); }
    // One token's attention reads it all, head by head, and memory is quick in its own order.
    bool cache_by_head() const override { return true; }

private:
    CpuState state_;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(int n_threads, const Kernels& kernels) {
    return std::make_unique<CpuBackend>(n_threads, kernels);
}

std::unique_ptr<Backend> make_cpu_backend(int n_threads) { return make_cpu_backend(n_threads, default_kernels()); }

}  // namespace yivl
