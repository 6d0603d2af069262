// The names of csrc/cuda/device.h for a machine without a card or its compiler: kernels become ordinary functions, the
// threads of a block fibres on one thread of the operating system. What each function does is said there.
#pragma once

#include <math.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>
#include <vector>

#include "half.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define YIVL_UNROLL
#define YIVL_WARPGROUPS

namespace yivl::cuda {

namespace emulator {

using Place = std::source_location;

struct Index {
    int x = 0, y = 0, z = 0;
};

// Where the fibre that runs is.
struct Position {
    int thread = 0;
    int block_threads = 0;
    Index block, grid;
};
// Of this thread of the operating system: an emulated thread never moves to another.
extern thread_local const Position* position __attribute__((tls_model("initial-exec")));

// A kernel with its arguments: body is called once for every thread of every block.
struct Kernel {
    const char* name;
    Index grid;
    int threads;
    size_t dynamic_shared;
    std::function<void()> body;
};
// Throws DeviceError if it asks for more than a card has. What is wrong inside of it (threads that do not meet, shared
// memory overrun, ...) shows as a DeviceError that names kernel and place, then or at a later call of the stream.
void start(void* stream, Kernel kernel);

void wait_for_earlier_kernels();

// Throws DeviceError unless an address that is handed to a kernel, by itself or as a matrix's, is the device's.
void check_address(const char* kernel, const void* address);
template <class T>
void check_argument(const char* kernel, const T& argument) {
    if constexpr (std::is_pointer_v<T>) {
        check_address(kernel, argument);
    } else if constexpr (requires { argument.data; }) {
        check_address(kernel, argument.data);
    }
}

// Ends the kernel with an error from inside it.
[[noreturn]] void fail(const char* what, const Place& place);

void sync_block(const Place& place);

// What one lane of the warp brings to an operation of all lanes, and takes from it.
struct Operand {
    const void* in;
    void* out;
};
// Waits for all lanes of the warp; the last to come computes the results of all 32.
void meet(const char* operation, Operand mine, void (*compute)(const Operand (&lanes)[kWarp]), const Place& place);

// The block's object of that key: poisoned when first asked for in a block.
std::byte* shared_object(const void* key, size_t bytes, size_t alignment);
std::byte* dynamic_shared_bytes();

// Copies wait in a queue, so that a kernel that does not wait for them finds poison.
void copy_async(void* to, const void* from, int bytes, const Place& place);
void commit_copies();
void wait_copies(int pending);

// What a thread has to do with an asynchronous product.
struct AsyncProduct {
    float (*d)[4];
    uint32_t a[4];
    const std::byte* b;
    std::vector<std::byte> was;  // b's rows when it began; of lane 0
    int group;
};
inline constexpr int kAsyncRowBytes = 128;
void publish_shared();
void multiply_async(AsyncProduct product, int columns, const Place& place);
void commit_products();
void wait_products(int pending, int columns, const Place& place);

template <class T>
inline constexpr char kSharedKey{};

}  // namespace emulator

inline int thread_id() { return emulator::position->thread; }
inline int block_threads() { return emulator::position->block_threads; }
inline int lane_id() { return thread_id() % kWarp; }
inline int warp_id() { return thread_id() / kWarp; }
inline int block_x() { return emulator::position->block.x; }
inline int block_y() { return emulator::position->block.y; }
inline int block_z() { return emulator::position->block.z; }
inline int grid_x() { return emulator::position->grid.x; }

inline void sync_block(const emulator::Place& place = emulator::Place::current()) { emulator::sync_block(place); }
inline void sync_warp(const emulator::Place& place = emulator::Place::current()) {
    emulator::meet("sync_warp", {}, [](const emulator::Operand(&)[kWarp]) {}, place);
}

template <class T>
T shuffle(T value, int lane, const emulator::Place& place = emulator::Place::current()) {
    struct In {
        T value;
        int lane;
    } in{value, lane};
    T out;
    emulator::meet(
        "shuffle", {&in, &out},
        [](const emulator::Operand(&lanes)[kWarp]) {
            for (const emulator::Operand& lane : lanes) {
                const int from = static_cast<const In*>(lane.in)->lane & (kWarp - 1);
                *static_cast<T*>(lane.out) = static_cast<const In*>(lanes[from].in)->value;
            }
        },
        place);
    return out;
}
template <class T>
T shuffle_xor(T value, int mask, const emulator::Place& place = emulator::Place::current()) {
    return cuda::shuffle(value, lane_id() ^ mask, place);
}
inline int uniform_warp_id(const emulator::Place& place = emulator::Place::current()) {
    return cuda::shuffle(warp_id(), 0, place);
}
inline unsigned ballot(bool value, const emulator::Place& place = emulator::Place::current()) {
    unsigned out;
    emulator::meet(
        "ballot", {&value, &out},
        [](const emulator::Operand(&lanes)[kWarp]) {
            unsigned bits = 0;
            for (int i = 0; i < kWarp; ++i) bits |= unsigned{*static_cast<const bool*>(lanes[i].in)} << i;
            for (const emulator::Operand& lane : lanes) *static_cast<unsigned*>(lane.out) = bits;
        },
        place);
    return out;
}

template <class T>
T& shared() {
    static_assert(std::is_trivially_default_constructible_v<T> && std::is_trivially_destructible_v<T>);
    return *reinterpret_cast<T*>(emulator::shared_object(&emulator::kSharedKey<T>, sizeof(T), alignof(T)));
}
inline std::byte* dynamic_shared() { return emulator::dynamic_shared_bytes(); }

inline void wait_for_earlier_kernels() { emulator::wait_for_earlier_kernels(); }

inline Words load_words(const void* from, const emulator::Place& place = emulator::Place::current()) {
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) emulator::fail("load_words: address not aligned to 16", place);
    Words words;
    std::memcpy(&words, from, sizeof(words));
    return words;
}
inline Words load_constant_words(const void* from, const emulator::Place& place = emulator::Place::current()) {
    return load_words(from, place);
}

inline constexpr int kLine = 128;
inline void prefetch_line(const void*) {}

inline void copy_async(void* to, const void* from, int bytes = 16,
                       const emulator::Place& place = emulator::Place::current()) {
    emulator::copy_async(to, from, bytes, place);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int kPending>
void wait_copies() {
    emulator::wait_copies(kPending);
}

// Blocks run on several threads of the operating system.
inline int atomic_add(int* at, int value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
inline void fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

inline int dp4a(int a, int b, int sum) {
    for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
    return sum;
}
inline int dp4a_unsigned(uint32_t a, int b, int sum) {
    for (int i = 0; i < 32; i += 8) sum += static_cast<uint8_t>(a >> i) * static_cast<int8_t>(b >> i);
    return sum;
}

inline float fast_exp2(float x) { return std::exp2(x); }

inline float float_of_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t bits_of_float(float f) { return __builtin_bit_cast(uint32_t, f); }
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t order) {
    const uint64_t bytes = uint64_t{b} << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> (order >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}
inline float to_float(Half h) { return half_to_float(h.bits); }
inline float to_float(Bfloat b) { return __builtin_bit_cast(float, static_cast<uint32_t>(b.bits) << 16); }

inline Half to_half(float f) {
    if (f != f) return {0x7fff};
    constexpr float kRoundsToInfinity = 65520.0f;
    if (std::fabs(f) >= kRoundsToInfinity) return {static_cast<uint16_t>(std::signbit(f) ? 0xfc00 : 0x7c00)};
    return {half_from_float(f)};
}
inline uint32_t pack_halves(float low, float high) {
    return to_half(low).bits | static_cast<uint32_t>(to_half(high).bits) << 16;
}
// A product of halves is exact in float. Of a sum, double holds all but what is far below its last bit in half.
inline uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
    const auto part = [](uint32_t pair, int i) {
        return double{to_float(Half{static_cast<uint16_t>(pair >> 16 * i)})};
    };
    const auto sum = [&](int i) { return static_cast<float>(part(a, i) * part(b, i) + part(c, i)); };
    return pack_halves(sum(0), sum(1));
}
inline uint32_t add_halves(uint32_t a, uint32_t b) { return fma_halves(a, 0x3c003c00, b); }

namespace emulator {

struct MmaOperands {
    const uint32_t* a;
    const uint32_t* b;
};

// d[n] += the products of a with column n of b, as a tensor core adds them.
void add_products(float (&d)[8], const float (&a)[16], const float (&b)[16][8]);

// The fragments of csrc/cuda/device.h put together, multiplied, and d handed out again.
inline void multiply(const Operand (&lanes)[kWarp]) {
    float a[16][16], b[16][8], d[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
        const auto* in = static_cast<const MmaOperands*>(lanes[lane].in);
        const auto* sums = static_cast<const float*>(lanes[lane].out);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 2; ++i) {
            const auto element = [i](uint32_t pair) { return to_float(Half{static_cast<uint16_t>(pair >> 16 * i)}); };
            for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][2 * t + i + r / 2 * 8] = element(in->a[r]);
            for (int r = 0; r < 2; ++r) b[2 * t + i + r * 8][g] = element(in->b[r]);
        }
        for (int r = 0; r < 4; ++r) d[g + r / 2 * 8][2 * t + r % 2] = sums[r];
    }
    for (int row = 0; row < 16; ++row) add_products(d[row], a[row], b);
    for (int lane = 0; lane < kWarp; ++lane) {
        auto* sums = static_cast<float*>(lanes[lane].out);
        for (int r = 0; r < 4; ++r) sums[r] = d[lane / 4 + r / 2 * 8][2 * (lane % 4) + r % 2];
    }
}

template <bool kTransposed>
void hand_out_matrices(const Operand (&lanes)[kWarp]) {
    for (int lane = 0; lane < kWarp; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int m = 0; m < 4; ++m) {
            const auto element = [&](int row, int column) {
                uint16_t bits;
                std::memcpy(&bits, static_cast<const uint16_t*>(lanes[m * 8 + row].in) + column, sizeof(bits));
                return uint32_t{bits};
            };
            static_cast<uint32_t*>(lanes[lane].out)[m] = kTransposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                                                                     : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
        }
    }
}

inline void check_row(const void* row, const Place& place) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("load_matrices: row not aligned to 16", place);
}

}  // namespace emulator

inline void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const emulator::Place& place = emulator::Place::current()) {
    const emulator::MmaOperands in{a, b};
    emulator::meet("mma_half", {&in, d}, emulator::multiply, place);
}

inline void load_matrices(uint32_t (&r)[4], const void* row,
                          const emulator::Place& place = emulator::Place::current()) {
    emulator::check_row(row, place);
    emulator::meet("load_matrices", {row, r}, emulator::hand_out_matrices<false>, place);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row,
                                     const emulator::Place& place = emulator::Place::current()) {
    emulator::check_row(row, place);
    emulator::meet("load_matrices_transposed", {row, r}, emulator::hand_out_matrices<true>, place);
}

inline constexpr int kAsyncColumns = 184;
using AsyncSums = float[kAsyncColumns / 8][4];

inline void publish_shared() { emulator::publish_shared(); }
template <int kN>
void begin_products(AsyncSums&, uint32_t (&)[kN][4]) {}
inline void multiply_async(AsyncSums& d, const uint32_t (&a)[4], const void* b,
                           const emulator::Place& place = emulator::Place::current()) {
    emulator::multiply_async({d, {a[0], a[1], a[2], a[3]}, static_cast<const std::byte*>(b), {}, 0}, kAsyncColumns,
                             place);
}
inline void commit_products() { emulator::commit_products(); }
template <int kPending>
void wait_products(const emulator::Place& place = emulator::Place::current()) {
    emulator::wait_products(kPending, kAsyncColumns, place);
}
inline void finish_products(AsyncSums&) {}

}  // namespace yivl::cuda
