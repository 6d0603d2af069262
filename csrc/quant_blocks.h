// The weight types of a GGUF file and the bytes of their blocks (the layout is ggml's; the numbers are the file's).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace yivl {

enum class WeightType : uint32_t {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    IQ4_NL = 20,
    IQ4_XS = 23,
    BF16 = 30,
};

struct TypeInfo {
    WeightType type;
    std::string_view name;  // as llama.cpp spells it, e.g. "Q4_K"
    int64_t block;          // weights per block; a row is a whole number of blocks
    int64_t bytes;          // bytes per block
};

std::span<const TypeInfo> weight_types();
// Null for a number or a name that is none of the types above.
const TypeInfo* find_type(uint32_t number);
const TypeInfo* find_type(std::string_view name);
const TypeInfo& type_info(WeightType type);

inline constexpr int kBlock = 32;        // weights in a block of the simple types
inline constexpr int kSuperBlock = 256;  // weights in a block of the K types

// Scales are IEEE half precision, held as their bits.
using half_bits = uint16_t;

struct BlockQ4_0 {
    half_bits d;
    uint8_t qs[kBlock / 2];
};
struct BlockQ4_1 {
    half_bits d, m;
    uint8_t qs[kBlock / 2];
};
struct BlockQ5_0 {
    half_bits d;
    uint8_t qh[4];
    uint8_t qs[kBlock / 2];
};
struct BlockQ5_1 {
    half_bits d, m;
    uint8_t qh[4];
    uint8_t qs[kBlock / 2];
};
struct BlockQ8_0 {
    half_bits d;
    int8_t qs[kBlock];
};
struct BlockQ2_K {
    uint8_t scales[kSuperBlock / 16];  // low nibble scale, high nibble minimum
    uint8_t qs[kSuperBlock / 4];
    half_bits d, dmin;
};
struct BlockQ3_K {
    uint8_t hmask[kSuperBlock / 8];
    uint8_t qs[kSuperBlock / 4];
    uint8_t scales[12];
    half_bits d;
};
struct BlockQ4_K {
    half_bits d, dmin;
    uint8_t scales[12];
    uint8_t qs[kSuperBlock / 2];
};
struct BlockQ5_K {
    half_bits d, dmin;
    uint8_t scales[12];
    uint8_t qh[kSuperBlock / 8];
    uint8_t qs[kSuperBlock / 2];
};
struct BlockQ6_K {
    uint8_t ql[kSuperBlock / 2];
    uint8_t qh[kSuperBlock / 4];
    int8_t scales[kSuperBlock / 16];
    half_bits d;
};
struct BlockIQ4_NL {
    half_bits d;
    uint8_t qs[kBlock / 2];
};
struct BlockIQ4_XS {
    half_bits d;
    uint16_t scales_h;
    uint8_t scales_l[kSuperBlock / 64];
    uint8_t qs[kSuperBlock / 2];
};

static_assert(sizeof(BlockQ4_0) == 18 && sizeof(BlockQ4_1) == 20);
static_assert(sizeof(BlockQ5_0) == 22 && sizeof(BlockQ5_1) == 24);
static_assert(sizeof(BlockQ8_0) == 34);
static_assert(sizeof(BlockQ2_K) == 84 && sizeof(BlockQ3_K) == 110);
static_assert(sizeof(BlockQ4_K) == 144 && sizeof(BlockQ5_K) == 176 && sizeof(BlockQ6_K) == 210);
static_assert(sizeof(BlockIQ4_NL) == 18 && sizeof(BlockIQ4_XS) == 136);

}  // namespace yivl
