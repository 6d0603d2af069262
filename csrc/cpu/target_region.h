// Code for one instruction set stands in a region of its source file, after all includes, and not in a file compiled
// with -m flags: an inline function of a standard header compiled with AVX-512 could be the copy that the linker keeps
// for everybody.
#pragma once

#define YIVL_PRAGMA(text) _Pragma(#text)

#if defined(__clang__)
#define YIVL_TARGET_BEGIN(isa) YIVL_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define YIVL_TARGET_END _Pragma("clang attribute pop")
#else
#define YIVL_TARGET_BEGIN(isa) _Pragma("GCC push_options") YIVL_PRAGMA(GCC target(isa))
#define YIVL_TARGET_END _Pragma("GCC pop_options")
#endif

// Loops over the registers of a tile, to be unrolled in full: left as loops, the tile lives in memory.
#if defined(__clang__)
#define YIVL_UNROLL _Pragma("unroll")
#else
#define YIVL_UNROLL _Pragma("GCC unroll 32")
#endif

// Pieces of a kernel whose accumulators must stay in registers.
#define YIVL_INLINE inline __attribute__((always_inline))

// A lambda takes the target that a region defines as YIVL_TARGET_LAMBDA; this one stays in registers, too.
#define YIVL_INLINE_LAMBDA YIVL_TARGET_LAMBDA __attribute__((always_inline))

// Scales that are broadcast one by one come from memory for nothing; from a register each takes a shuffle, and shuffles
// are what unpacking is short of. GCC would keep them in the register.
#define YIVL_IN_MEMORY(object) asm("" : "+m"(object))

// Sums of integers that grow one by one: GCC would add up products in another order, all at once, which takes more
// registers than there are.
#define YIVL_SUMMED(vector) asm("" : "+v"(vector))

// An address that is worked out here, from others: GCC would keep the offsets of all rows for the whole loop, in
// registers that it does not have.
#define YIVL_IN_REGISTER(pointer) asm("" : "+r"(pointer))

// What fetches a little between multiplications stays between them: to GCC it depends on nothing, and it would bring
// the fetches of a whole unrolled block together.
#define YIVL_STAYS_HERE() asm volatile("" : : : "memory")
