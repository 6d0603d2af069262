#include "quant_blocks.h"

#include <array>
#include <cassert>

namespace yivl {

namespace {

constexpr std::array<TypeInfo, 15> kTypes{{
    {WeightType::F32, "F32", 1, 4},
    {WeightType::F16, "F16", 1, 2},
    {WeightType::BF16, "BF16", 1, 2},
    {WeightType::Q4_0, "Q4_0", kBlock, sizeof(BlockQ4_0)},
    {WeightType::Q4_1, "Q4_1", kBlock, sizeof(BlockQ4_1)},
    {WeightType::Q5_0, "Q5_0", kBlock, sizeof(BlockQ5_0)},
    {WeightType::Q5_1, "Q5_1", kBlock, sizeof(BlockQ5_1)},
    {WeightType::Q8_0, "Q8_0", kBlock, sizeof(BlockQ8_0)},
    {WeightType::Q2_K, "Q2_K", kSuperBlock, sizeof(BlockQ2_K)},
    {WeightType::Q3_K, "Q3_K", kSuperBlock, sizeof(BlockQ3_K)},
    {WeightType::Q4_K, "Q4_K", kSuperBlock, sizeof(BlockQ4_K)},
    {WeightType::Q5_K, "Q5_K", kSuperBlock, sizeof(BlockQ5_K)},
    {WeightType::Q6_K, "Q6_K", kSuperBlock, sizeof(BlockQ6_K)},
    {WeightType::IQ4_NL, "IQ4_NL", kBlock, sizeof(BlockIQ4_NL)},
    {WeightType::IQ4_XS, "IQ4_XS", kSuperBlock, sizeof(BlockIQ4_XS)},
}};

}  // namespace

std::span<const TypeInfo> weight_types() { return kTypes; }

const TypeInfo* find_type(uint32_t number) {
    for (const TypeInfo& info : kTypes) {
        if (static_cast<uint32_t>(info.type) == number) return &info;
    }
    return nullptr;
}

const TypeInfo* find_type(std::string_view name) {
    for (const TypeInfo& info : kTypes) {
        if (info.name == name) return &info;
    }
    return nullptr;
}

const TypeInfo& type_info(WeightType type) {
    const TypeInfo* info = find_type(static_cast<uint32_t>(type));
    assert(info != nullptr);
    return *info;
}

}  // namespace yivl
