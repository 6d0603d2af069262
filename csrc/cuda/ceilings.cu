// Kernels that keep a unit as busy as it gets, for benchmarks to compare with.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/tile.cuh"

namespace yivl::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;  // of a multiprocessor
constexpr int kChains = 8;  // of operations that wait for each other, of a warp or a thread

// Nobody knows that the sum is never negative: what leads to it has to be computed.
__device__ __forceinline__ void use(float sum, float* sink) {
    if (sum < 0.0f) *sink = sum;
}

__global__ void half_kernel(float* sink, int64_t rounds) {
    wait_for_earlier_kernels();
    float d[kChains][4] = {};
    const uint32_t ones = pack_halves(1.0f, 1.0f);
    const uint32_t a[4] = {ones, ones, ones, ones}, b[2] = {ones, ones};
    for (int64_t i = 0; i < rounds; ++i) {
        YIVL_UNROLL
        for (auto& chain : d) mma_half(chain, a, b);
    }
    float sum = 0.0f;
    for (auto& chain : d) sum += chain[0] + chain[1] + chain[2] + chain[3];
    use(sum, sink);
}

// The same by four warps at once, where the card can.
constexpr int kAsyncThreads = 384;  // a block for each multiprocessor
constexpr int kAsyncProducts = 4;   // that wait for each other, of a warpgroup
using AsyncTile = Tile<kAsyncColumns, 8>;

__global__ void __launch_bounds__(kAsyncThreads, 1)
    async_half_kernel([[maybe_unused]] float* sink, [[maybe_unused]] int64_t rounds) {
#ifdef YIVL_WARPGROUPS
    wait_for_earlier_kernels();
    AsyncTile& tile = *reinterpret_cast<AsyncTile*>(dynamic_shared());
    const uint32_t ones = pack_halves(1.0f, 1.0f);
    for (int i = thread_id(); i < kAsyncColumns * 8; i += kAsyncThreads) {
        tile.chunk(i / 8, i % 8) = {{ones, ones, ones, ones}};
    }
    publish_shared();
    sync_block();
    uint32_t a[1][4] = {{ones, ones, ones, ones}};
    AsyncSums d{};
    for (int64_t i = 0; i < rounds; ++i) {
        begin_products(d, a);
        YIVL_UNROLL
        for (int j = 0; j < kAsyncProducts; ++j) multiply_async(d, a[0], &tile.chunk(0, j * 2));
        commit_products();
        wait_products<0>();
        finish_products(d);
    }
    float sum = 0.0f;
    YIVL_UNROLL
    for (auto& columns : d) sum += columns[0] + columns[1] + columns[2] + columns[3];
    use(sum, sink);
#else
    stop_without_warpgroups();
#endif
}

__global__ void float_kernel(float* sink, float factor, int64_t rounds) {
    wait_for_earlier_kernels();
    float x[kChains];
    for (int i = 0; i < kChains; ++i) x[i] = static_cast<float>(i);
    for (int64_t i = 0; i < rounds; ++i) {
        YIVL_UNROLL
        for (float& chain : x) chain = fmaf(chain, factor, 1.0f);
    }
    float sum = 0.0f;
    for (const float chain : x) sum += chain;
    use(sum, sink);
}

}  // namespace

int64_t exert_halves(Stream& stream, float* sink, int n_multiprocessors, int64_t rounds) {
    if (stream.has_warpgroups()) {
        launch(stream, "exert_halves", async_half_kernel, {n_multiprocessors}, kAsyncThreads, sizeof(AsyncTile), sink,
               rounds);
        return n_multiprocessors * (kAsyncThreads / (4 * kWarp)) * rounds * kAsyncProducts * 2 * 64 * kAsyncColumns *
               16;
    }
    const int64_t blocks = int64_t{n_multiprocessors} * kBlocks;
    launch(stream, "exert_halves", half_kernel, {blocks}, kThreads, 0, sink, rounds);
    return blocks * (kThreads / kWarp) * rounds * kChains * 2 * 16 * 8 * 16;
}

int64_t exert_floats(Stream& stream, float* sink, int n_multiprocessors, int64_t rounds) {
    const int64_t blocks = int64_t{n_multiprocessors} * kBlocks;
    launch(stream, "exert_floats", float_kernel, {blocks}, kThreads, 0, sink, 0.5f, rounds);
    return blocks * kThreads * rounds * kChains * 2;
}

}  // namespace yivl::cuda
