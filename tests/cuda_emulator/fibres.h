// Fibres, which take turns on one thread of the operating system, and their stacks.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace yivl::cuda::emulator {

inline constexpr size_t kStack = 64 << 10;
// Stacks a power of two apart would compete for the same cache lines.
inline constexpr size_t kStagger = 192;

#if defined(__x86_64__)

// Keeps what a called function must keep and goes on where `to` was kept.
extern "C" void yivl_switch_fibre(void** from, void* to);
asm(R"(
.text
.type yivl_switch_fibre, @function
yivl_switch_fibre:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size yivl_switch_fibre, .-yivl_switch_fibre
)");

class Fibre {
public:
    void prepare(std::byte* stack_end, void (*entry)()) {
        // Six registers, where to return to, and what would be the return address of `entry`, at whose entry the stack
        // is 8 bytes off a multiple of 16.
        auto** top = reinterpret_cast<void**>(stack_end) - 8;
        std::fill_n(top, 8, nullptr);
        top[6] = reinterpret_cast<void*>(entry);
        stack_ = top;
    }
    static void change(Fibre& from, Fibre& to) { yivl_switch_fibre(&from.stack_, to.stack_); }

private:
    void* stack_ = nullptr;
};

#else

class Fibre {
public:
    void prepare(std::byte* stack_end, void (*entry)()) {
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack_end - (kStack / 2);
        context_.uc_stack.ss_size = kStack / 2;
        makecontext(&context_, entry, 0);
    }
    static void change(Fibre& from, Fibre& to) { swapcontext(&from.context_, &to.context_); }

private:
    ucontext_t context_;
};

#endif

// The stacks of so many fibres. Below each lies a page that may not be touched.
class Stacks {
public:
    explicit Stacks(int n) : n_(n) {
        const size_t bytes = n_ * kStack;
        void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        memory_ = static_cast<std::byte*>(memory);
        for (int i = 0; i < n_; ++i) mprotect(memory_ + i * kStack, getpagesize(), PROT_NONE);
    }
    ~Stacks() { munmap(memory_, n_ * kStack); }
    Stacks(const Stacks&) = delete;
    Stacks& operator=(const Stacks&) = delete;

    std::byte* end_of(int i) const { return memory_ + (i + 1) * kStack - i % 32 * kStagger; }

private:
    int n_;
    std::byte* memory_;
};

}  // namespace yivl::cuda::emulator
