// The seam between the forward path and a backend: the operations that a stage may ask for, and nothing else.
//
// Letters: N patches, T tokens, D width, H heads, K KV heads, hd head dim, F MLP width, V vocabulary.
// In products alone: T rows of x, I columns of x (inputs), O rows of W (outputs).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "control.h"
#include "draw.h"
#include "tensor.h"

namespace yivl {

// Memory that a backend computes in. On the CPU that is the host's, and stages could read it; elsewhere it is out of
// reach but for the copies below, so they never do. Given back when the last owner goes.
using Memory = std::shared_ptr<std::byte>;

// One token of a reply on its way through the decoder.
struct Step {
    int32_t id;
    int64_t position;
    int64_t n_ctx;  // positions that there can be
};
// What a backend keeps of a step for the next one of the same session; made by it, and gone before its memory.
class StepRecord {
public:
    virtual ~StepRecord() = default;
};

// Operations on float32 activations in the backend's memory. One object serves one caller at a time and throws
// Cancelled when its Control says so. Each output value is computed in an order that depends neither on the number of
// threads nor on how many rows stand beside it, so that replies do not change with either; but a GPU and AMX have one
// way for few rows and another for many.
class Ops {
public:
    virtual ~Ops() = default;

    // y = x, of the same shape: from the host's memory into the backend's, back, and within it. The host's memory is
    // free, or filled, when the call returns.
    virtual void upload(Mat y, ConstMat host) = 0;
    virtual void download(Mat host, ConstMat x) = 0;
    virtual void copy(Mat y, ConstMat x) = 0;

    // Products of one x, which none of them may overwrite.
    virtual void linear(const Input& x, std::span<const Product> products) = 0;
    void linear(const Input& x, std::initializer_list<Product> products) {
        linear(x, std::span(products.begin(), products.size()));
    }
    // y (T, F) = silu(x Wg^T) * (x Wu^T), silu(v) = v / (1 + exp(-v))
    virtual void gated_linear(Mat y, const Input& x, const Weight& gate, const Weight& up) = 0;
    // y = norm(x); y may be x.
    virtual void norm(Mat y, ConstMat x, const Norm& norm) = 0;
    // x = x/2 * (1 + erf(x / sqrt(2)))
    virtual void gelu(Mat x) = 0;
    // y += x
    virtual void add(Mat y, ConstMat x) = 0;
    // Rotates adjacent pairs (2j, 2j+1) of every head of x (T, H*hd) by position * theta^(-2j/hd); row i is at position
    // `first` + i.
    virtual void rope(Mat x, int64_t head_dim, int64_t first, float theta) = 0;
    // out (T, H*hd) = softmax(q k^T / sqrt(hd)) v with q (T, H*hd), k and v (S, K*hd); query head h reads KV head
    // h / (H/K).
    virtual void attention(Mat out, ConstMat q, ConstHeads k, ConstHeads v, const AttentionShape& shape) = 0;
    // y (T, D) = rows `ids` of the table (V, D).
    virtual void embed(Mat y, const Weight& table, std::span<const int32_t> ids) = 0;
    // The id that Sampler::choose takes of the logits x (1, V), without a change to them; -1 for logits that it
    // refuses, and where reading x is just as good.
    virtual int32_t draw(ConstMat x, std::span<const int32_t> previous_ids, const Draw& draw) = 0;

    // Runs `forward`, which asks for the operations of one step: at every call with the same `record`, at first null,
    // the same ones on the same memory. All that may differ is the id that it embeds, and what follows from the
    // position: rows of products that are not the first, rotations, and how many rows of k and v attention sees. So a
    // backend need not ask it every time.
    virtual void step(const Step&, std::unique_ptr<StepRecord>&, const std::function<void()>& forward) { forward(); }
};

// What the kernels of one name did, altogether; bytes and operations are 0 where nobody counts them.
struct KernelTime {
    std::string name;
    int64_t calls = 0;
    double seconds = 0;
    int64_t bytes = 0;  // read and written of memory, each once
    int64_t flop = 0;
};

// What a benchmark compares with.
enum class Unit {
    memory,  // copied within it: bytes, read and written
    float32,
    half,  // matrices of half precision, summed in float32
};

// What a device offers: where weights live and how to compute there. Shared by all sessions of a model.
class Backend {
public:
    virtual ~Backend() = default;
    // The name of the instruction set or device in use, e.g. "avx512".
    virtual const char* name() const = 0;
    virtual int n_threads() const = 0;
    virtual std::unique_ptr<Ops> ops(Control& control) = 0;
    // Not initialised, aligned to 64 bytes or more. Throws AllocationError.
    virtual Memory allocate(size_t bytes) = 0;
    // Bytes of a mapped file where operations can read them: the same ones, or a copy that lives as long as the
    // backend.
    virtual const std::byte* place(std::span<const std::byte> bytes, Control& control) = 0;
    // Whether a KV cache has the tokens of a head side by side, or else the heads of a token.
    virtual bool cache_by_head() const { return false; }

    // Keeps a unit as busy as it gets; how many operations, or bytes, that was. 0: this backend has no way to.
    virtual int64_t exert(Unit, int64_t /*rounds*/) { return 0; }
    // From the first call on, the kernels of Ops made later are timed one by one, which makes them slower. Returns
    // those since the last call, the longest first; a backend without kernels of its own has none.
    virtual std::vector<KernelTime> profile() { return {}; }
};

// n_threads 0 means one per physical core. Throws std::invalid_argument when YIVL_ISA names an instruction set that is
// unknown or that this CPU lacks.
std::unique_ptr<Backend> make_cpu_backend(int n_threads);

struct DeviceMemory {
    std::string name;
    int64_t total_bytes;
    int64_t free_bytes;
    bool emulated;  // for tests: nobody gets it who did not ask for it
};
// What a device needs beside what a model counts: the kernels' code, streams, results between the kernels of an
// operation, whole pages for every allocation.
inline constexpr int64_t kDeviceReserve = 256 << 20;
// What a tensor takes among others that are placed.
constexpr int64_t placed_bytes(size_t tensor_bytes) {
    constexpr size_t kAlignment = 256;
    return static_cast<int64_t>((tensor_bytes + kAlignment - 1) / kAlignment * kAlignment);
}

// All three throw DeviceError naming what is missing: CUDA in this build, a driver, a card, a new enough one.
int cuda_device_count();
DeviceMemory cuda_memory(int device);
// Takes `weight_bytes` at once, for what is placed first; more is allocated as it comes. Throws AllocationError.
std::unique_ptr<Backend> make_cuda_backend(int device, int64_t weight_bytes);

}  // namespace yivl
