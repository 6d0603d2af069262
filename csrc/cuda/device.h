// What a kernel may use of the card. Natively these are intrinsics and PTX; a test build that has no nvcc takes the
// same names from tests/cuda_emulator. A kernel uses nothing else of CUDA but __global__, __device__, __host__,
// __forceinline__, __launch_bounds__ and the functions of <math.h>.
//
// A block is one-dimensional and a whole number of warps. What is said to be of the warp must be called by all its
// lanes together.
#pragma once

#include <cstddef>
#include <cstdint>

namespace yivl::cuda {

inline constexpr int kWarp = 32;

// IEEE half precision and bfloat16 as memory holds them.
struct Half {
    uint16_t bits;
};
struct Bfloat {
    uint16_t bits;
};

// 16 bytes that move at once.
struct alignas(16) Words {
    uint32_t word[4];
};

}  // namespace yivl::cuda

#ifndef __CUDACC__
#include "cuda_emulator.h"
#else

// Before a loop over values in registers, whose indices must be known.
#define YIVL_UNROLL _Pragma("unroll")

namespace yivl::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;

// ---- where ----

__device__ __forceinline__ int thread_id() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int block_threads() { return static_cast<int>(blockDim.x); }
__device__ __forceinline__ int lane_id() { return thread_id() % kWarp; }
__device__ __forceinline__ int warp_id() { return thread_id() / kWarp; }
__device__ __forceinline__ int block_x() { return static_cast<int>(blockIdx.x); }
__device__ __forceinline__ int block_y() { return static_cast<int>(blockIdx.y); }
__device__ __forceinline__ int block_z() { return static_cast<int>(blockIdx.z); }
__device__ __forceinline__ int grid_x() { return static_cast<int>(gridDim.x); }

// ---- together ----

// Waits for every thread of the block; all must come, and to the same place.
__device__ __forceinline__ void sync_block() { __syncthreads(); }
// Waits for every lane of the warp, which then sees what the others wrote before.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// The value of another lane of the warp. T: int, unsigned, uint64_t or float.
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
    return __shfl_sync(kAllLanes, value, lane);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(kAllLanes, value, mask);
}
// warp_id(), of the warp, in a form that the compiler knows to be one for all its lanes. What depends on it then keeps
// the lanes together, for which there are cheaper instructions.
__device__ __forceinline__ int uniform_warp_id() { return shuffle(warp_id(), 0); }
// Bit i: what lane i of the warp says.
__device__ __forceinline__ unsigned ballot(bool value) { return __ballot_sync(kAllLanes, value); }

// ---- shared memory ----

// The block's one object of type T, a struct of arrays, not initialised. At most 48 KiB for all of a kernel's.
template <class T>
__device__ __forceinline__ T& shared() {
    __shared__ T object;
    return object;
}
// The bytes that the launch asked for, aligned to 1024.
__device__ __forceinline__ std::byte* dynamic_shared() {
    extern __shared__ __align__(1024) Words dynamic_shared_words[];
    return reinterpret_cast<std::byte*>(dynamic_shared_words);
}

// ---- memory ----

// Until this returns a kernel may write nothing, and read only what no kernel writes: it may have begun while those
// before it on the stream are still at work. To be called by every thread; again it does nothing. Then the next kernel
// may begin.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 16 bytes, aligned.
__device__ __forceinline__ Words load_words(const void* from) {
    const uint4 v = *static_cast<const uint4*>(from);
    return {{v.x, v.y, v.z, v.w}};
}
// The same, of memory that no kernel writes.
__device__ __forceinline__ Words load_constant_words(const void* from) {
    const uint4 v = __ldg(static_cast<const uint4*>(from));
    return {{v.x, v.y, v.z, v.w}};
}

// Begins to bring the line of an address to the second-level cache, for a kernel that waits for earlier ones. Where
// kernels do not overlap it does nothing.
inline constexpr int kLine = 128;
__device__ __forceinline__ void prefetch_line([[maybe_unused]] const void* from) {
#if __CUDA_ARCH__ >= 900
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(from)));
#endif
}

// Begins to copy 16 bytes from global to shared memory, both aligned to 16: the first `bytes` of `from`, an even
// number, and zeros for the rest, which is not read. They are there after wait_copies in the same thread (and a sync
// for the others).
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes = 16) {
#if __CUDA_ARCH__ >= 800
    const auto shared_address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes)
                 : "memory");
#else
    if (bytes == 16) {
        *static_cast<Words*>(to) = load_words(from);
        return;
    }
    Words words{};
    for (int i = 0; i < 8; ++i) {
        if (2 * i < bytes) words.word[i / 2] |= uint32_t{static_cast<const uint16_t*>(from)[i]} << i % 2 * 16;
    }
    *static_cast<Words*>(to) = words;
#endif
}
// Makes one group of the copies that this thread began since the last group.
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most kPending of this thread's latest groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Returns what was there before.
__device__ __forceinline__ int atomic_add(int* at, int value) { return atomicAdd(at, value); }
// What this thread wrote before, or saw written before a sync, is seen by whoever sees what it writes after.
__device__ __forceinline__ void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// ---- arithmetic ----

// sum + the products of the four signed bytes of a with those of b.
__device__ __forceinline__ int dp4a(int a, int b, int sum) { return __dp4a(a, b, sum); }
// The same with bytes of a that have no sign.
__device__ __forceinline__ int dp4a_unsigned(uint32_t a, int b, int sum) {
    int result;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
    return result;
}

// 2^x, the card's own instruction: 2 ulp.
__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t bits_of_float(float f) { return __float_as_uint(f); }
// Byte i of the result: the one of a's four bytes (0 to 3) or b's (4 to 7) that hexadecimal digit i of `order` names,
// of which the lower three bits count.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t order) {
    return __byte_perm(a, b, order);
}
__device__ __forceinline__ float to_float(Half h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits));
    return f;
}
__device__ __forceinline__ float to_float(Bfloat b) { return __uint_as_float(static_cast<uint32_t>(b.bits) << 16); }

// To nearest, ties to even; beyond the largest comes infinity.
__device__ __forceinline__ Half to_half(float f) {
    Half h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(f));
    return h;
}
// Two in one register, `low` in the lower half: an operand of mma.
__device__ __forceinline__ uint32_t pack_halves(float low, float high) {
    return to_half(low).bits | static_cast<uint32_t>(to_half(high).bits) << 16;
}

// Of the two halves in each register.
__device__ __forceinline__ uint32_t add_halves(uint32_t a, uint32_t b) {
    uint32_t sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}
// a * b + c, rounded once.
__device__ __forceinline__ uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t sum;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}

// ---- matrices in the registers of a warp ----
// With g = lane / 4 and t = lane % 4, two elements to a register, the first in its lower half:
//   a (16, 16)  a[0]: row g, columns 2t and 2t+1   a[1]: row g+8   a[2]: row g, columns 2t+8, 2t+9   a[3]: row g+8
//   b (16, 8)   b[0]: rows 2t and 2t+1, column g   b[1]: rows 2t+8 and 2t+9
//   d (16, 8)   d[0], d[1]: row g, columns 2t and 2t+1   d[2], d[3]: row g+8

// d += a b, of the warp.
__device__ __forceinline__ void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int half = 0; half < 2; ++half) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[half * 2]), "r"(a[half * 2 + 1]), "r"(b[half]));
    }
#endif
}

// Four 8 x 8 matrices of 16-bit elements from shared memory, of the warp: lane i gives the address, aligned to 16, of
// row i % 8 of matrix i / 8, and gets of each matrix elements 2t and 2t+1 of row g. The transposed one gets rows 2t
// and 2t+1 of column g.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// ---- matrices in the registers of a warpgroup ----
// Four warps, of which the first has a number that is a multiple of four, all lanes together. Only cards of compute
// capability 9.0 can: there YIVL_WARPGROUPS is defined.

// Columns of d and b, eight by eight.
inline constexpr int kAsyncColumns = 184;
using AsyncSums = float[kAsyncColumns / 8][4];

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define YIVL_WARPGROUPS

// The values are complete here: the compiler moves nothing that makes or uses them past it.
__device__ __forceinline__ void hold(AsyncSums& d) {
    YIVL_UNROLL
    for (auto& columns : d) {
        for (float& value : columns) asm volatile("" : "+f"(value)::"memory");
    }
}

// What this thread wrote to shared memory, also by copy_async, can be multiplied by all after a sync.
__device__ __forceinline__ void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first multiply_async of a group, with the operands that it multiplies.
template <int kN>
__device__ __forceinline__ void begin_products(AsyncSums& d, uint32_t (&a)[kN][4]) {
    hold(d);
    YIVL_UNROLL
    for (auto& operand : a) {
        for (uint32_t& pair : operand) asm volatile("" : "+r"(pair)::"memory");
    }
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Begins d += a b, of a (64, 16), each warp with 16 rows of a and d as mma_half has them, d[j] for columns from 8j on.
// b is in shared memory: a Tile with eight chunks at a multiple of 1024 bytes, whose rows are b's columns, and `b` the
// first of two chunks of its row 0. What is multiplied may not change until wait_products, nor d be used until
// finish_products.
__device__ __forceinline__ void multiply_async(AsyncSums& d, const uint32_t (&a)[4], const void* b) {
    // Of the descriptor: the address, eight rows 1024 bytes apart, chunks exchanged within 128 bytes.
    const uint64_t at = (__cvta_generic_to_shared(b) & 0x3ffff) >> 4;
    const uint64_t descriptor = at | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
#define YIVL_FOUR(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %97, 0;\nwgmma.mma_async.sync.aligned.m64n184k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
        "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, "
        "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, "
        "%72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, "
        "%90, %91}, "
        "{%92, %93, %94, %95}, %96, add, 1, 1, 0;\n}"
        : YIVL_FOUR(0), YIVL_FOUR(1), YIVL_FOUR(2), YIVL_FOUR(3), YIVL_FOUR(4), YIVL_FOUR(5), YIVL_FOUR(6),
          YIVL_FOUR(7), YIVL_FOUR(8), YIVL_FOUR(9), YIVL_FOUR(10), YIVL_FOUR(11), YIVL_FOUR(12), YIVL_FOUR(13),
          YIVL_FOUR(14), YIVL_FOUR(15), YIVL_FOUR(16), YIVL_FOUR(17), YIVL_FOUR(18), YIVL_FOUR(19), YIVL_FOUR(20),
          YIVL_FOUR(21), YIVL_FOUR(22)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(1));
#undef YIVL_FOUR
}
// Makes a group of what was begun.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending of the latest groups are at work.
template <int kPending>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// d can be used, once all groups are done.
__device__ __forceinline__ void finish_products(AsyncSums& d) { hold(d); }

#else
// In place of a kernel's code: it must not seem to have done its work.
__device__ __forceinline__ void stop_without_warpgroups() { __trap(); }
#endif

}  // namespace yivl::cuda

#endif
