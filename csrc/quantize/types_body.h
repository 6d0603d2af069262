// Each weight type: how its indices and scales become bytes (dequant.cpp has the layouts) and what its search tries; a
// part of quantizers_body.h. kStarts are, for a scale alone, where the value of largest magnitude may come to lie;
// kReach says how many levels to each side are tried, kLowReach the same of minima, and kRefits how often the block's
// scale is fitted again.

namespace {

// Low halves of 32 indices, two to a byte: i and i + 16.
inline void pack_nibbles(uint8_t* qs, const uint8_t* q) {
    for (int i = 0; i < 16; ++i) qs[i] = static_cast<uint8_t>((q[i] & 15) | q[i + 16] << 4);
}
inline void pack_fifth_bits(uint8_t* qh, const uint8_t* q) {
    for (int i = 0; i < 4; ++i) qh[i] = 0;
    for (int i = 0; i < 32; ++i) qh[i / 8] = static_cast<uint8_t>(qh[i / 8] | (q[i] >> 4 & 1) << i % 8);
}

struct Q4_0 {
    using Block = BlockQ4_0;
    using Grid = Uniform<-8, 7>;
    static constexpr float kStarts[] = {-8, -7.5, -8.5, -7, -8.25, -7.75, -9, -10, -12, -14, 7, 7.5, 8, 6.5, 9, 11};
    static void pack(Block& b, const uint8_t* q) { pack_nibbles(b.qs, q); }
};

struct Q5_0 {
    using Block = BlockQ5_0;
    using Grid = Uniform<-16, 15>;
    static constexpr float kStarts[] = {-16, -15.75, -16.25, -15.5, -16.5, -15, -17, -18, -20, -23,
                                        15,  15.25,  15.5,   15.75, 14.5,  16,  17,  18,  19,  22};
    static void pack(Block& b, const uint8_t* q) {
        pack_nibbles(b.qs, q);
        pack_fifth_bits(b.qh, q);
    }
};

struct IQ4_NL {
    using Block = BlockIQ4_NL;
    using Grid = NonLinear;
    static constexpr float kStarts[] = {-127, -120, -113, -134, -141, -106, -155, -180,
                                        113,  106,  100,  120,  127,  134,  148,  165};
    static void pack(Block& b, const uint8_t* q) { pack_nibbles(b.qs, q); }
};

// Steps of the range that are cut off at its ends.
struct Cut {
    float below_low, above_high;
};
// Where levels are tried later, a good neighbourhood is enough; where the result is final, more is tried.
constexpr Cut kCuts[] = {{0, 0}, {0.4, 0.4}, {-0.3, -0.3}, {0.8, 0.8}, {1, 0},
                         {0, 1}, {1.5, 1.5}, {2.5, 2.5},   {2, 0.5},   {0.5, 2}};
constexpr Cut kFineCuts[] = {{0, 0},        {0.25, 0.25},  {0.5, 0.5},   {-0.25, -0.25}, {0.75, 0.75}, {0.5, 0},
                             {0, 0.5},      {1, 0},        {0, 1},       {1, 1},         {0.25, 0},    {0, 0.25},
                             {-0.25, 0.25}, {0.25, -0.25}, {0.75, 0.25}, {0.25, 0.75},   {1.5, 0.5},   {0.5, 1.5},
                             {1.5, 1.5},    {2.5, 2.5},    {3, 1},       {1, 3},         {-0.25, 0},   {0, -0.25}};

struct Q4_1 {
    using Block = BlockQ4_1;
    static constexpr int kTop = 15;
    static constexpr bool kSigned = true;
    static constexpr const auto& kStarts = kFineCuts;
    static void pack(Block& b, const uint8_t* q) { pack_nibbles(b.qs, q); }
};

struct Q5_1 {
    using Block = BlockQ5_1;
    static constexpr int kTop = 31;
    static constexpr bool kSigned = true;
    static constexpr const auto& kStarts = kFineCuts;
    static void pack(Block& b, const uint8_t* q) {
        pack_nibbles(b.qs, q);
        pack_fifth_bits(b.qh, q);
    }
};

struct Q3_K {
    using Block = BlockQ3_K;
    using Grid = Uniform<-4, 3>;
    static constexpr int kGroup = 16, kReach = 3, kRefits = 2;
    static constexpr float kLowLevel = -32, kHighLevel = 31;
    static constexpr float kStarts[] = {-4, -3.75, -4.25, -3.5, -4.5, -3.25, -3, -5,  -5.5, -6,
                                        -8, 3,     3.25,  3.5,  2.75, 2.5,   4,  4.5, 5,    7};
    static void pack(Block& b, const int* levels, const uint8_t* q) {
        for (int i = 0; i < 12; ++i) b.scales[i] = 0;
        for (int i = 0; i < 16; ++i) {
            const int level = levels[i] + 32;
            b.scales[i % 8] = static_cast<uint8_t>(b.scales[i % 8] | (level & 15) << i / 8 * 4);
            b.scales[8 + i % 4] = static_cast<uint8_t>(b.scales[8 + i % 4] | level >> 4 << i / 4 * 2);
        }
        for (int i = 0; i < 32; ++i) {
            int high = 0;
            for (int j = 0; j < 8; ++j) high |= q[j * 32 + i] >> 2 << j;
            b.hmask[i] = static_cast<uint8_t>(high);
        }
        for (int i = 0; i < 64; ++i) {
            const uint8_t* p = q + i / 32 * 128 + i % 32;
            b.qs[i] = static_cast<uint8_t>((p[0] & 3) | (p[32] & 3) << 2 | (p[64] & 3) << 4 | (p[96] & 3) << 6);
        }
    }
};

struct Q6_K {
    using Block = BlockQ6_K;
    using Grid = Uniform<-32, 31>;
    static constexpr int kGroup = 16, kReach = 8, kRefits = 1;
    static constexpr float kLowLevel = -128, kHighLevel = 127;
    static constexpr float kStarts[] = {-32, -31.5, -31,  -32.5, -33, -34, -35, -36, -37, -38,
                                        -40, 31,    30.5, 31.5,  32,  33,  34,  35,  37,  39};
    static void pack(Block& b, const int* levels, const uint8_t* q) {
        for (int i = 0; i < 16; ++i) b.scales[i] = static_cast<int8_t>(levels[i]);
        for (int half = 0; half < 2; ++half) {
            const uint8_t* p = q + half * 128;
            for (int i = 0; i < 64; ++i)
                b.ql[half * 64 + i] = static_cast<uint8_t>((p[i] & 15) | (p[i + 64] & 15) << 4);
            for (int i = 0; i < 32; ++i) {
                b.qh[half * 32 + i] =
                    static_cast<uint8_t>(p[i] >> 4 | p[i + 32] >> 4 << 2 | p[i + 64] >> 4 << 4 | p[i + 96] >> 4 << 6);
            }
        }
    }
};

struct IQ4_XS {
    using Block = BlockIQ4_XS;
    using Grid = NonLinear;
    static constexpr int kGroup = 32, kReach = 3, kRefits = 2;
    static constexpr float kLowLevel = -32, kHighLevel = 31;
    static constexpr float kStarts[] = {-127, -120, -113, -134, -141, -106, -155, -180, 113, 106, 120, 127, 134, 148};
    static void pack(Block& b, const int* levels, const uint8_t* q) {
        int high = 0;
        for (int i = 0; i < 4; ++i) b.scales_l[i] = 0;
        for (int i = 0; i < 8; ++i) {
            const int level = levels[i] + 32;
            b.scales_l[i / 2] = static_cast<uint8_t>(b.scales_l[i / 2] | (level & 15) << i % 2 * 4);
            high |= level >> 4 << i * 2;
            pack_nibbles(b.qs + i * 16, q + i * 32);
        }
        b.scales_h = static_cast<uint16_t>(high);
    }
};

struct Q2_K {
    using Block = BlockQ2_K;
    static constexpr int kGroup = 16, kTop = 3, kReach = 4, kLowReach = 3, kRefits = 2;
    static constexpr bool kSigned = false;
    static constexpr float kTopLevel = 15;
    static constexpr Cut kStarts[] = {{0, 0},   {0.25, 0.25}, {0.5, 0.5}, {-0.25, -0.25}, {0.5, 0},
                                      {0, 0.5}, {1, 1},       {1, 0.3},   {0.3, 1},       {2, 2}};
    static void pack(Block& b, const uint8_t* levels, const uint8_t* low_levels, const uint8_t* q) {
        for (int i = 0; i < 16; ++i) b.scales[i] = static_cast<uint8_t>(levels[i] | low_levels[i] << 4);
        for (int i = 0; i < 64; ++i) {
            const uint8_t* p = q + i / 32 * 128 + i % 32;
            b.qs[i] = static_cast<uint8_t>(p[0] | p[32] << 2 | p[64] << 4 | p[96] << 6);
        }
    }
};

// Eight scales and eight minima of six bits.
inline void pack_levels(uint8_t* scales, const uint8_t* levels, const uint8_t* low_levels) {
    for (int i = 0; i < 4; ++i) {
        scales[i] = static_cast<uint8_t>(levels[i] | levels[i + 4] >> 4 << 6);
        scales[i + 4] = static_cast<uint8_t>(low_levels[i] | low_levels[i + 4] >> 4 << 6);
        scales[i + 8] = static_cast<uint8_t>((levels[i + 4] & 15) | (low_levels[i + 4] & 15) << 4);
    }
}
// Low halves of 256 indices, two to a byte: i and i + 32 of each 64.
inline void pack_super_nibbles(uint8_t* qs, const uint8_t* q) {
    for (int p = 0; p < 4; ++p) {
        for (int i = 0; i < 32; ++i) {
            qs[p * 32 + i] = static_cast<uint8_t>((q[p * 64 + i] & 15) | q[p * 64 + i + 32] << 4);
        }
    }
}

// What Q4_K and Q5_K share.
template <class BlockType, int Top>
struct SixBitLevels {
    using Block = BlockType;
    static constexpr int kGroup = 32, kTop = Top, kReach = 5, kLowReach = 2, kRefits = 1;
    static constexpr bool kSigned = false;
    static constexpr float kTopLevel = 63;
    static constexpr const auto& kStarts = kCuts;
};

struct Q4_K : SixBitLevels<BlockQ4_K, 15> {
    static void pack(Block& b, const uint8_t* levels, const uint8_t* low_levels, const uint8_t* q) {
        pack_levels(b.scales, levels, low_levels);
        pack_super_nibbles(b.qs, q);
    }
};

struct Q5_K : SixBitLevels<BlockQ5_K, 31> {
    static void pack(Block& b, const uint8_t* levels, const uint8_t* low_levels, const uint8_t* q) {
        pack_levels(b.scales, levels, low_levels);
        pack_super_nibbles(b.qs, q);
        for (int i = 0; i < 32; ++i) {
            int high = 0;
            for (int j = 0; j < 8; ++j) high |= q[j * 32 + i] >> 4 << j;
            b.qh[i] = static_cast<uint8_t>(high);
        }
    }
};

}  // namespace
