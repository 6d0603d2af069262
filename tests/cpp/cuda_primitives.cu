// The wrappers of csrc/cuda/device.h against plain loops, on a card or emulated: one case for each. Under the emulator
// also kernels with faults, which it must find.
//
//   cuda_primitives           lists the cases
//   cuda_primitives CASE      runs one: exit code 0, or 1 with the reason on stderr
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/tile.cuh"
#include "half.h"

namespace yivl::cuda {

namespace {

// An array on the device.
template <class T>
class Array {
public:
    Array(Stream& stream, const std::vector<T>& values)
        : stream_(stream),
          size_(values.size()),
          data_(reinterpret_cast<T*>(allocate(stream.device(), values.size() * sizeof(T)))) {
        stream_.copy_in(data_, 0, values.data(), 0, size_ * sizeof(T), 1);
    }
    ~Array() { release(stream_.device(), reinterpret_cast<std::byte*>(data_)); }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;

    T* data() const { return data_; }
    std::vector<T> values() const {
        std::vector<T> values(size_);
        stream_.copy_out(values.data(), 0, data_, 0, size_ * sizeof(T), 1);
        return values;
    }

private:
    Stream& stream_;
    size_t size_;
    T* data_;
};

void expect(bool good, const char* what, int i) {
    if (!good) throw std::runtime_error(std::string(what) + " at " + std::to_string(i));
}

// Different small numbers, exact in half precision.
float small(int i) { return static_cast<float>(i * 37 % 61 - 30) / 4.0f; }

// ---- indices and reductions ----

__global__ void indices_kernel(int* out) {
    wait_for_earlier_kernels();
    const int block = (block_z() * 2 + block_y()) * grid_x() + block_x();
    out[block * block_threads() + thread_id()] = block * 1000 + warp_id() * 100 + lane_id();
}

void indices(Stream& stream) {
    Array<int> out(stream, std::vector<int>(3 * 2 * 2 * 64));
    launch(stream, "indices", indices_kernel, {3, 2, 2}, 64, 0, out.data());
    const std::vector<int> found = out.values();
    for (int i = 0; i < static_cast<int>(found.size()); ++i) {
        expect(found[i] == i / 64 * 1000 + i / 32 % 2 * 100 + i % 32, "index", i);
    }
}

__global__ void lanes_kernel(int* out) {
    wait_for_earlier_kernels();
    const int i = thread_id();
    out[i] = shuffle(i * 3, 31 - lane_id());
    out[64 + i] = shuffle_xor(i * 5, 8);
    out[128 + i] = static_cast<int>(ballot(i % 3 == 0));
    out[192 + i] = static_cast<int>(reduce_block<Sum>(static_cast<float>(i)));
    out[256 + i] = static_cast<int>(reduce_block<Max>(static_cast<float>(i * 7 % 64)));
}

void lanes(Stream& stream) {
    Array<int> out(stream, std::vector<int>(320));
    launch(stream, "lanes", lanes_kernel, {1}, 64, 0, out.data());
    const std::vector<int> found = out.values();
    for (int i = 0; i < 64; ++i) {
        unsigned bits = 0;
        for (int lane = 0; lane < 32; ++lane) bits |= unsigned{(i / 32 * 32 + lane) % 3 == 0} << lane;
        expect(found[i] == (i / 32 * 32 + 31 - i % 32) * 3, "shuffle", i);
        expect(found[64 + i] == (i ^ 8) * 5, "shuffle_xor", i);
        expect(static_cast<unsigned>(found[128 + i]) == bits, "ballot", i);
        expect(found[192 + i] == 63 * 32, "sum of the block", i);
        expect(found[256 + i] == 63, "maximum of the block", i);
    }
}

__global__ void atomics_kernel(int* count, int* before) {
    wait_for_earlier_kernels();
    before[block_x() * block_threads() + thread_id()] = atomic_add(count, 1);
}

void atomics(Stream& stream) {
    const Array<int> count(stream, {0}), before(stream, std::vector<int>(20 * 96));
    launch(stream, "atomics", atomics_kernel, {20}, 96, 0, count.data(), before.data());
    expect(count.values()[0] == 20 * 96, "sum", 0);
    std::vector<int> found = before.values();
    std::sort(found.begin(), found.end());
    for (int i = 0; i < 20 * 96; ++i) expect(found[i] == i, "what was there before", i);
}

// ---- memory ----

// Bytes of row i that are copied: of the last four only some.
__host__ __device__ int copied_bytes(int i) { return i < 60 ? 16 : (i - 60) * 4; }

// Turns 64 rows of 16 bytes round through shared memory.
__global__ void copies_kernel(Words* out, const Words* in) {
    wait_for_earlier_kernels();
    struct Rows {
        Words row[64];
    };
    Rows& rows = shared<Rows>();
    auto* extra = reinterpret_cast<Words*>(dynamic_shared());
    const int i = thread_id();
    copy_async(&rows.row[i], in + i, copied_bytes(i));
    commit_copies();
    copy_async(&extra[i], in + i, copied_bytes(i));
    commit_copies();
    wait_copies<1>();
    sync_block();
    out[i] = rows.row[63 - i];
    wait_copies<0>();
    sync_block();
    out[64 + i] = extra[63 - i];
    out[128 + i] = load_words(in + i);
}

void copies(Stream& stream) {
    std::vector<Words> values(64);
    for (uint32_t i = 0; i < 64; ++i) values[i] = {{i, i + 100, i + 200, i + 300}};
    const Array<Words> in(stream, values), out(stream, std::vector<Words>(192));
    launch(stream, "copies", copies_kernel, {1}, 64, 64 * sizeof(Words), out.data(), in.data());
    const std::vector<Words> found = out.values();
    for (uint32_t i = 0; i < 64; ++i) {
        const uint32_t row = 63 - i;
        for (uint32_t j = 0; j < 4; ++j) {
            const uint32_t expected = static_cast<int>(4 * j) < copied_bytes(row) ? row + 100 * j : 0;
            expect(found[i].word[j] == expected && found[64 + i].word[j] == expected, "copy_async", i);
            expect(found[128 + i].word[j] == i + 100 * j, "load_words", i);
        }
    }
}

// ---- kernels that overlap ----

// to = from + what, where `what` is known before the kernels that begin with it.
__global__ void sum_kernel(int* to, const int* from, const Words* what) {
    const Words before = load_constant_words(what);
    wait_for_earlier_kernels();
    const int i = block_x() * block_threads() + thread_id();
    to[i] = from[i] + static_cast<int>(before.word[i % 4]);
}

void overlap(Stream& stream) {
    constexpr int kSteps = 12;
    const Array<Words> what(stream, {Words{{1, 2, 3, 4}}});
    const Array<int> zeros(stream, std::vector<int>(64));
    const Array<int> sums[2] = {{stream, std::vector<int>(64)}, {stream, std::vector<int>(64)}};
    for (int i = 0; i < kSteps; ++i) {
        const Array<int>& from = i == 0 ? zeros : sums[1 - i % 2];
        launch(stream, "sum", sum_kernel, {1}, 64, 0, sums[i % 2].data(), from.data(), what.data());
    }
    const std::vector<int> found = sums[1 - kSteps % 2].values();
    for (int i = 0; i < 64; ++i) expect(found[i] == kSteps * (1 + i % 4), "sum", i);
}

// A copy comes after the kernels before it and before those that follow, recorded or not.
void copies_between(Stream& stream) {
    constexpr int kRounds = 100, kBlocks = 4, kSize = kBlocks * 64;
    const Array<Words> what(stream, {Words{{1, 2, 3, 4}}});
    const Array<int> from(stream, std::vector<int>(kSize)), to(stream, std::vector<int>(kSize));
    const auto round = [&] {
        for (int i = 0; i < 2; ++i) {
            launch(stream, "sum", sum_kernel, {kBlocks}, 64, 0, to.data(), from.data(), what.data());
            stream.copy(from.data(), 0, to.data(), 0, kSize * sizeof(int), 1);
        }
    };
    for (int i = 0; i < kRounds; ++i) round();
    Graph graph(stream.device());
    graph.record(stream, round);
    for (int i = 0; i < kRounds; ++i) graph.start(stream);
    const std::vector<int> found = from.values();
    for (int i = 0; i < kSize; ++i) expect(found[i] == 4 * kRounds * (1 + i % 4), "sum with copies between", i);
}

// ---- recorded work ----

__global__ void add_kernel(int* to, const int* what) {
    wait_for_earlier_kernels();
    to[thread_id()] += what[thread_id()];
}

void graph(Stream& stream) {
    const Array<int> sums(stream, std::vector<int>(kWarp)), what(stream, std::vector<int>(kWarp, 1));
    const Array<int> copy(stream, std::vector<int>(kWarp));
    Graph graph(stream.device());
    graph.record(stream, [&] {
        launch(stream, "add", add_kernel, {1}, kWarp, 0, sums.data(), what.data());
        stream.copy(copy.data(), 0, sums.data(), 0, kWarp * sizeof(int), 1);
    });
    expect(sums.values()[0] == 0, "done while recorded", 0);
    // What it reads is what is there when it starts.
    for (const int n : {2, 5}) {
        const std::vector<int> now(kWarp, n);
        stream.copy_in(what.data(), 0, now.data(), 0, kWarp * sizeof(int), 1);
        graph.start(stream);
    }
    for (int i = 0; i < kWarp; ++i) expect(copy.values()[i] == 7, "sum", i);

    Graph stopped(stream.device());
    bool caught = false;
    try {
        stopped.record(stream, [&] { throw std::runtime_error("stopped"); });
    } catch (const std::runtime_error&) {
        caught = true;
    }
    expect(caught, "no exception", 0);
    launch(stream, "add", add_kernel, {1}, kWarp, 0, sums.data(), what.data());
    expect(sums.values()[0] == 12, "sum after a recording that failed", 0);
}

// ---- numbers ----

__global__ void numbers_kernel(float* out, int* dots, const float* in, int n) {
    wait_for_earlier_kernels();
    for (int i = thread_id(); i < n; i += block_threads()) {
        out[i] = to_float(to_half(in[i]));
        out[n + i] = to_float(Bfloat{static_cast<uint16_t>(bits_of_float(in[i]) >> 16)});
        out[2 * n + i] = fast_exp2(in[i]);
        const uint32_t halves = pack_halves(in[i], 2.0f);
        out[3 * n + i] =
            to_float(Half{static_cast<uint16_t>(halves)}) * to_float(Half{static_cast<uint16_t>(halves >> 16)});
        dots[i] = dp4a(0x7f80ff01 + i, 0x8001fe03 - i, 1000) + 7 * dp4a_unsigned(0x7f80ff01 + i, 0x8001fe03 - i, 1);
    }
}

// To the nearest multiple of 2^(exponent - bits), ties to even; exact in double.
double rounded(float x, int bits) {
    int exponent;
    std::frexp(x, &exponent);
    const double unit = std::ldexp(1.0, exponent - bits);
    return std::nearbyint(x / unit) * unit;
}

void numbers(Stream& stream) {
    std::vector<float> values;
    for (int i = -400; i <= 400; ++i) values.push_back(static_cast<float>(i) / 61.0f);
    values.push_back(1.0f + std::ldexp(1.0f, -11));  // halfway between two halves: the even one
    values.push_back(1.0f + std::ldexp(3.0f, -11));
    const int n = static_cast<int>(values.size());
    const Array<float> in(stream, values), out(stream, std::vector<float>(4 * values.size()));
    const Array<int> dots(stream, std::vector<int>(values.size()));
    launch(stream, "numbers", numbers_kernel, {1}, 128, 0, out.data(), dots.data(), in.data(), n);
    const std::vector<float> found = out.values();
    const std::vector<int> found_dots = dots.values();
    for (int i = 0; i < n; ++i) {
        expect(found[i] == rounded(values[i], 11), "half", i);
        const uint32_t upper = std::bit_cast<uint32_t>(values[i]) & 0xffff0000;
        expect(found[n + i] == std::bit_cast<float>(upper), "bfloat16", i);
        expect(found[3 * n + i] == 2.0f * found[i], "two halves", i);
        // What device.h says of it.
        const double power = std::exp2(double{values[i]});
        expect(std::fabs(found[2 * n + i] - power) <= std::ldexp(power, -22), "fast_exp2", i);
        int sum = 1000 + 7;
        const uint32_t a = 0x7f80ff01u + static_cast<uint32_t>(i), b = 0x8001fe03u - static_cast<uint32_t>(i);
        for (int byte = 0; byte < 4; ++byte) {
            const int of_b = static_cast<int8_t>(b >> 8 * byte);
            sum += static_cast<int8_t>(a >> 8 * byte) * of_b + 7 * static_cast<uint8_t>(a >> 8 * byte) * of_b;
        }
        expect(found_dots[i] == sum, "dp4a", i);
    }
}

__global__ void halves_kernel(uint32_t* out, const uint32_t* in, int n) {
    wait_for_earlier_kernels();
    for (int i = thread_id(); i < n; i += block_threads()) {
        const uint32_t a = in[i], b = in[(i + 1) % n], c = in[(i + 2) % n];
        out[i] = add_halves(a, b);
        out[n + i] = fma_halves(a, b, c);
        out[2 * n + i] = permute_bytes(a, b, 0xf148);
    }
}

void halves(Stream& stream) {
    // Pairs of halves from 0.01 to 100, with all bits of the fraction in use.
    const auto value = [](int i) {
        const auto x = static_cast<float>((i % 3 - 1.5) * std::exp(i % 19 - 9.0) * (1.0 + i % 53 / 53.0));
        return static_cast<float>(rounded(x, 11));
    };
    const int n = 400;
    std::vector<uint32_t> pairs(n);
    const auto pair = [](float low, float high) {
        return uint32_t{half_from_float(low)} | half_from_float(high) << 16;
    };
    for (int i = 0; i < n; ++i) pairs[i] = pair(value(2 * i), value(2 * i + 1));
    const Array<uint32_t> in(stream, pairs), out(stream, std::vector<uint32_t>(3 * n));
    launch(stream, "halves", halves_kernel, {1}, 64, 0, out.data(), in.data(), n);
    const std::vector<uint32_t> found = out.values();
    for (int i = 0; i < n; ++i) {
        for (int part = 0; part < 2; ++part) {
            const auto of = [&](uint32_t p) { return double{half_to_float(static_cast<uint16_t>(p >> 16 * part))}; };
            const double a = of(pairs[i]), b = of(pairs[(i + 1) % n]), c = of(pairs[(i + 2) % n]);
            const auto expect_half = [&](uint32_t p, double exact, const char* what) {
                // To nearest: 11 bits, fewer below 2^-14, where the last is 2^-24.
                const double unit = std::ldexp(1.0, std::max(std::ilogb(std::max(std::fabs(exact), 1e-9)) - 10, -24));
                expect(std::fabs(of(p) - exact) <= unit / 2 || std::fabs(exact) > 65504.0, what, i);
            };
            expect_half(found[i], a + b, "add_halves");
            expect_half(found[n + i], a * b + c, "fma_halves");
        }
        const uint32_t a = pairs[i], b = pairs[(i + 1) % n];
        expect(found[2 * n + i] == ((a & 0xff) | (b & 0xff) << 8 | (a >> 8 & 0xff) << 16 | (b >> 24) << 24),
               "permute_bytes", i);
    }
}

// ---- matrices ----

// d = c + a b twice over: a (16, 16) and b (16, 8) row by row in shared memory, taken into registers by load_matrices.
__global__ void mma_kernel(float* out, const float* a_in, const float* b_in, const float* c_in) {
    wait_for_earlier_kernels();
    struct Operands {
        alignas(16) uint16_t a[16][16];
        alignas(16) uint16_t b[16][8];
    };
    Operands& s = shared<Operands>();
    const int lane = lane_id(), g = lane / 4, t = lane % 4;
    for (int i = lane; i < 256; i += kWarp) s.a[i / 16][i % 16] = to_half(a_in[i]).bits;
    for (int i = lane; i < 128; i += kWarp) s.b[i / 8][i % 8] = to_half(b_in[i]).bits;
    sync_warp();
    // The four matrices of a: rows 0 to 7, 8 to 15, then the same of columns 8 to 15.
    uint32_t a[4], rows_of_b[4];
    load_matrices(a, &s.a[lane % 16][lane / 16 * 8]);
    load_matrices_transposed(rows_of_b, &s.b[lane % 16][0]);
    const uint32_t b[2] = {rows_of_b[0], rows_of_b[1]};
    float d[4];
    for (int r = 0; r < 4; ++r) d[r] = c_in[(g + r / 2 * 8) * 8 + 2 * t + r % 2];
    for (int twice = 0; twice < 2; ++twice) mma_half(d, a, b);
    for (int r = 0; r < 4; ++r) out[(g + r / 2 * 8) * 8 + 2 * t + r % 2] = d[r];
}

std::vector<float> run_mma(Stream& stream, const std::vector<float>& a, const std::vector<float>& b,
                           const std::vector<float>& c) {
    const Array<float> a_in(stream, a), b_in(stream, b), c_in(stream, c), out(stream, c);
    launch(stream, "mma", mma_kernel, {1}, 32, 0, out.data(), a_in.data(), b_in.data(), c_in.data());
    return out.values();
}

void mma(Stream& stream) {
    std::vector<float> a(256), b(128), c(128);
    for (int i = 0; i < 256; ++i) a[i] = small(i);
    for (int i = 0; i < 128; ++i) b[i] = small(i + 5), c[i] = small(3 * i);
    const std::vector<float> found = run_mma(stream, a, b, c);
    for (int i = 0; i < 128; ++i) {
        float expected = c[i];  // multiples of 1/16 that float32 adds exactly
        for (int k = 0; k < 16; ++k) expected += 2.0f * a[i / 8 * 16 + k] * b[k * 8 + i % 8];
        expect(found[i] == expected, "product", i);
    }
}

// No card's sums are less exact than the emulator's: four products at a time, each and the sum so far cut off after 24
// bits of the largest, and so is their sum.
void mma_sums(Stream& stream) {
    std::vector<float> a(256), b(128), c(128);
    for (int i = 0; i < 256; ++i) a[i] = std::ldexp(small(i) + 0.3f, -(i * 7 % 12));
    for (int i = 0; i < 128; ++i) b[i] = std::ldexp(small(i + 5) + 0.7f, -(i * 5 % 12)), c[i] = small(3 * i) + 0.1f;
    for (std::vector<float>* halves : {&a, &b}) {
        for (float& x : *halves) x = half_to_float(half_from_float(x));
    }
    const std::vector<float> found = run_mma(stream, a, b, c);
    for (int i = 0; i < 128; ++i) {
        double exact = c[i], size = std::fabs(c[i]);
        for (int k = 0; k < 16; ++k) {
            const double product = 2.0 * a[i / 8 * 16 + k] * b[k * 8 + i % 8];
            exact += product;
            size += std::fabs(product);
        }
        constexpr int kSums = 2 * 16 / 4, kCuts = 4 + 1 + 1;
        expect(std::fabs(found[i] - exact) <= kSums * kCuts * std::ldexp(size, -23), "sum", i);
    }
#ifndef __CUDACC__
    for (const float sign : {1.0f, -1.0f}) {
        const std::vector<float> ones(128, sign);
        const std::vector<float> too_small = run_mma(stream, std::vector<float>(256, std::ldexp(sign, -12)),
                                                     std::vector<float>(128, std::ldexp(1.0f, -13)), ones);
        expect(too_small == ones, "cut off", 0);
    }
#endif
}

// Columns of 64 halves, as multiply_async takes them: in shared memory when it returns.
#ifdef YIVL_WARPGROUPS
using AsyncTile = Tile<kAsyncColumns, 8>;
__device__ AsyncTile& load_columns(const Half* b) {
    AsyncTile& tile = *reinterpret_cast<AsyncTile*>(dynamic_shared());
    for (int i = thread_id(); i < kAsyncColumns * 8; i += block_threads()) {
        copy_async(&tile.chunk(i / 8, i % 8), b + i * kChunkElements);
    }
    commit_copies();
    wait_copies<0>();
    return tile;
}
#endif

// d = a b twice over: a (64, 64), and the columns of b (64, kAsyncColumns) one after the other.
__global__ void async_kernel([[maybe_unused]] float* out, [[maybe_unused]] const Half* a_in,
                             [[maybe_unused]] const Half* b_in) {
#ifdef YIVL_WARPGROUPS
    wait_for_earlier_kernels();
    AsyncTile& tile = load_columns(b_in);
    publish_shared();
    sync_block();
    const int g = lane_id() / 4, t = lane_id() % 4, row = warp_id() * 16 + g;
    AsyncSums d{};
    for (int twice = 0; twice < 2; ++twice) {
        uint32_t a[4][4];
        YIVL_UNROLL
        for (int k = 0; k < 4; ++k) {
            YIVL_UNROLL
            for (int r = 0; r < 4; ++r) {
                const Half* pair = a_in + (row + r % 2 * 8) * 64 + k * 16 + r / 2 * 8 + 2 * t;
                a[k][r] = pair[0].bits | static_cast<uint32_t>(pair[1].bits) << 16;
            }
        }
        begin_products(d, a);
        YIVL_UNROLL
        for (int k = 0; k < 4; ++k) multiply_async(d, a[k], &tile.chunk(0, 2 * k));
        commit_products();
        wait_products<0>();
        finish_products(d);
    }
    YIVL_UNROLL
    for (int j = 0; j < kAsyncColumns / 8; ++j) {
        YIVL_UNROLL
        for (int r = 0; r < 4; ++r) out[(row + r / 2 * 8) * kAsyncColumns + j * 8 + 2 * t + r % 2] = d[j][r];
    }
#else
    stop_without_warpgroups();
#endif
}

void async(Stream& stream) {
    if (!stream.has_warpgroups()) return;
    std::vector<Half> a(64 * 64), b(64 * kAsyncColumns);
    for (size_t i = 0; i < a.size(); ++i) a[i] = {half_from_float(small(static_cast<int>(i)))};
    for (size_t i = 0; i < b.size(); ++i) b[i] = {half_from_float(small(static_cast<int>(i) * 3 + 5))};
    const Array<Half> a_in(stream, a), b_in(stream, b);
    const Array<float> out(stream, std::vector<float>(64 * kAsyncColumns));
    launch(stream, "async", async_kernel, {1}, 128, b.size() * sizeof(Half), out.data(), a_in.data(), b_in.data());
    const std::vector<float> found = out.values();
    for (int i = 0; i < 64 * kAsyncColumns; ++i) {
        float expected = 0;  // multiples of 1/16 that float32 adds exactly
        for (int k = 0; k < 64; ++k) {
            expected += 2.0f * half_to_float(a[i / kAsyncColumns * 64 + k].bits) *
                        half_to_float(b[i % kAsyncColumns * 64 + k].bits);
        }
        expect(found[i] == expected, "product", i);
    }
}

#ifndef __CUDACC__

// ---- faults that the emulator must find ----

__global__ void absent_kernel() {
    wait_for_earlier_kernels();
    if (thread_id() != 40) sync_block();
}
__global__ void two_places_kernel() {
    wait_for_earlier_kernels();
    if (warp_id() == 0) {
        sync_block();
    } else {
        sync_block();
    }
}
__global__ void absent_lane_kernel(int* out) {
    wait_for_earlier_kernels();
    if (lane_id() > 3) out[lane_id()] = shuffle(1, 0);
}
__global__ void overrun_kernel(int* out) {
    wait_for_earlier_kernels();
    struct Small {
        int value[8];
    };
    Small& s = shared<Small>();
    s.value[thread_id() % 8] = 1;
    s.value[out[0]] = 2;
}
__global__ void dynamic_overrun_kernel() {
    wait_for_earlier_kernels();
    dynamic_shared()[64 + thread_id()] = std::byte{1};
}

struct Exchange {
    int value[64];
};
__global__ void unsynchronised_kernel(int* out) {
    wait_for_earlier_kernels();
    Exchange& s = shared<Exchange>();
    s.value[thread_id()] = thread_id();
    out[thread_id()] = s.value[(thread_id() + 32) % 64];
}
__global__ void unwaited_kernel(Words* out, const Words* in) {
    wait_for_earlier_kernels();
    struct Rows {
        Words row[32];
    };
    Rows& rows = shared<Rows>();
    copy_async(&rows.row[thread_id()], in + thread_id());
    commit_copies();
    wait_copies<1>();
    out[thread_id()] = rows.row[thread_id()];
}
__global__ void too_much_kernel() {
    wait_for_earlier_kernels();
    struct Large {
        int value[13000];
    };
    shared<Large>().value[thread_id()] = 1;
}

__global__ void early_kernel(int* to, const int* from) {
    const int read = from[thread_id()];
    wait_for_earlier_kernels();
    to[thread_id()] = read;
}
__global__ void unpublished_kernel(const Half* b) {
    wait_for_earlier_kernels();
    AsyncTile& tile = load_columns(b);
    sync_block();
    AsyncSums d{};
    uint32_t a[1][4] = {};
    begin_products(d, a);
    multiply_async(d, a[0], &tile.chunk(0, 0));
}
__global__ void changed_kernel(const Half* b) {
    wait_for_earlier_kernels();
    AsyncTile& tile = load_columns(b);
    publish_shared();
    sync_block();
    AsyncSums d{};
    uint32_t a[1][4] = {};
    begin_products(d, a);
    multiply_async(d, a[0], &tile.chunk(0, 0));
    tile.chunk(thread_id(), 1) = {};
    commit_products();
    wait_products<0>();
}
__global__ void never_waits_kernel() {
    if (thread_id() != 7) wait_for_earlier_kernels();
}

void absent(Stream& stream) {
    launch(stream, "absent", absent_kernel, {1}, 64, 0);
    stream.synchronize();
}
void two_places(Stream& stream) {
    launch(stream, "two_places", two_places_kernel, {1}, 64, 0);
    stream.synchronize();
}
void absent_lane(Stream& stream) {
    const Array<int> out(stream, std::vector<int>(32));
    launch(stream, "absent_lane", absent_lane_kernel, {1}, 32, 0, out.data());
    stream.synchronize();
}
void overrun(Stream& stream) {
    const Array<int> out(stream, {8});
    launch(stream, "overrun", overrun_kernel, {1}, 32, 0, out.data());
    stream.synchronize();
}
void dynamic_overrun(Stream& stream) {
    launch(stream, "dynamic_overrun", dynamic_overrun_kernel, {1}, 32, 64);
    stream.synchronize();
}
void unsynchronised(Stream& stream) {
    const Array<int> out(stream, std::vector<int>(64));
    launch(stream, "unsynchronised", unsynchronised_kernel, {1}, 64, 0, out.data());
    const std::vector<int> found = out.values();
    for (int i = 0; i < 64; ++i) expect(found[i] == (i + 32) % 64, "read too early", i);
}
void unwaited(Stream& stream) {
    const Array<Words> in(stream, std::vector<Words>(32)), out(stream, std::vector<Words>(32));
    launch(stream, "unwaited", unwaited_kernel, {1}, 32, 0, out.data(), in.data());
    expect(out.values()[0].word[0] == 0, "read too early", 0);
}
void too_much_shared(Stream& stream) {
    launch(stream, "too_much_shared", too_much_kernel, {1}, 32, 0);
    stream.synchronize();
}
void early(Stream& stream) {
    const Array<int> zeros(stream, std::vector<int>(32)), twos(stream, std::vector<int>(32, 2));
    const Array<int> sums(stream, std::vector<int>(32)), out(stream, std::vector<int>(32));
    launch(stream, "add", add_kernel, {1}, 32, 0, sums.data(), twos.data());
    launch(stream, "early", early_kernel, {1}, 32, 0, out.data(), sums.data());
    expect(out.values()[0] == 2, "read too early", 0);
}
void start_async_fault(Stream& stream, const char* name, void (*kernel)(const Half*)) {
    const Array<Half> b(stream, std::vector<Half>(64 * kAsyncColumns, Half{0x3c00}));
    launch(stream, name, kernel, {1}, 128, 64 * kAsyncColumns * sizeof(Half), b.data());
    stream.synchronize();
}
void unpublished(Stream& stream) { start_async_fault(stream, "unpublished", unpublished_kernel); }
void changed(Stream& stream) { start_async_fault(stream, "changed", changed_kernel); }
void never_waits(Stream& stream) {
    launch(stream, "never_waits", never_waits_kernel, {1}, 32, 0);
    stream.synchronize();
}
void odd_threads(Stream& stream) { launch(stream, "odd_threads", absent_kernel, {1}, 33, 0); }
void host_address(Stream& stream) {
    int on_host = 0;
    launch(stream, "host_address", overrun_kernel, {1}, 32, 0, &on_host);
}
void recorded_copy(Stream& stream) {
    const Array<int> values(stream, {1});
    Graph(stream.device()).record(stream, [&] { values.values(); });
}

#endif

const std::map<std::string, void (*)(Stream&)> kCases{
    {"indices", indices},
    {"lanes", lanes},
    {"atomics", atomics},
    {"copies", copies},
    {"overlap", overlap},
    {"copies-between", copies_between},
    {"graph", graph},
    {"numbers", numbers},
    {"halves", halves},
    {"mma_half", mma},
    {"mma_half-sums", mma_sums},
    {"multiply_async", async},
#ifndef __CUDACC__
    {"fault-absent", absent},
    {"fault-two-places", two_places},
    {"fault-lane", absent_lane},
    {"fault-overrun", overrun},
    {"fault-dynamic-overrun", dynamic_overrun},
    {"fault-unsynchronised", unsynchronised},
    {"fault-unwaited", unwaited},
    {"fault-early", early},
    {"fault-never-waits", never_waits},
    {"fault-unpublished", unpublished},
    {"fault-changed", changed},
    {"fault-too-much-shared", too_much_shared},
    {"fault-threads", odd_threads},
    {"fault-host-address", host_address},
    {"fault-recorded-copy", recorded_copy},
#endif
};

}  // namespace

}  // namespace yivl::cuda

int main(int argc, char** argv) {
    using namespace yivl::cuda;
    if (argc < 2) {
        for (const auto& [name, run] : kCases) std::puts(name.c_str());
        return 0;
    }
    try {
        Stream stream(0);
        kCases.at(argv[1])(stream);
    } catch (const std::exception& e) {
        std::fprintf(stderr, "%s\n", e.what());
        return 1;
    }
    return 0;
}
