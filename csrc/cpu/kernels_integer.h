// Products of weights that a file holds as small integers, with x rounded to 15-bit integers: a common scale for every
// 32 columns of a row of x, a relative error of about 5e-5. The products of 32 columns are summed exactly, whatever the
// order, and these sums are scaled and added in float32 in order of the columns. So one token alone, whose weights go
// from memory to the sum without a stop, gets the same values as one among many, for which they are unpacked once.
//
// Lanes are rows of the weights: four bytes of each of kLanes rows are brought together, from which come the
// integers of pairs of columns. Columns are paired as bytes 0 and 2, 1 and 3.
//
// Included as kernels_body.h is, after it, and needs besides the names listed there:
//
//   I                              a vector of kLanes int32, or of 2 * kLanes int16
//   kIntegerTokens                 tokens of a tile, which is two vectors of rows high
//   kSumsOfPairs                   whether many tokens are multiplied as sums: see multiplied_as_sums
//   load_integers(p) store_integers(p, v) integers(n) no_integers() add_integers(a, b) times_integers(a, b)
//   negative(v)                    of int32
//   up32<n>(v) down32<n>(v) to_floats(v)    of int32: shifts (down32 with the sign)
//   pair(p)                        the two int16 at p, in every lane
//   multiply_pairs(sums, a, b)     sums + a[2l] * b[2l] + a[2l + 1] * b[2l + 1] in every lane l
//   kFours                         whether one token is multiplied by bytes, each with the high and the low byte of x
//   multiply_at(sums, a, p)        multiply_pairs(sums, a, pair(p)); with kFours sums + the products of the four bytes
//                                  of each lane of a, without a sign, with the four at p, with a sign
//   low_bits(v, n) flip_bits(v, n) any_bits(a, b) down<n>(v) up<n>(v)    of int16: v & n, v ^ n, a | b, shifts,
//   signed_down<n>(v) less(v, n) plus(a, b) times(a, b)    of int16: shift, v - n, a + b, the low half of a product
//   byte<n>(v)                     byte n of each lane, as int32
//   signed_byte<n>(v)              byte n of each lane with its sign, as int32
//   spread_byte<n>(v)              the same as two int16
//   half_of_lane<n>(v)             half n of each lane, a half-precision number, as a float
//   lanes_swapped(v), sum_of_lanes(v, bits)    with kSumsOfPairs: each two lanes in the other order; the sum of some
//   low_and_high(a, b)             the low half of each lane of a, the high one of b
//   shuffle_eights(v)              with kFours: bytes 0, 4, 2, 6, 1, 5, 3, 7 of each eight
//   dwords(p, stride, out)         out[j] = bytes [4j, 4j + 4) at p + l * stride in lane l, j in [0, 4)
//   halves(p, stride)              the half-precision number at p + l * stride in lane l, as a float
//   largest_magnitude(x)           of 32 numbers; a NaN is larger than all
//   round_block(x, factor, dst, sums)   32 numbers times `factor`, to the nearest integers, their columns paired, and
//                                  the sums of the first 16 and of the others

namespace {

constexpr int kPairs = kBlock / 2;  // of columns in a block
constexpr int kSlabBlocks = kSuperBlock / kBlock;
// Both operands are cut into slabs of this many columns.
constexpr int64_t kSlabCols = kSuperBlock;
// Tokens whose x is packed as one piece of work.
constexpr int64_t kTokensOfGroup = 16;
// Sixteen bits less two: 32 products of a row of Q6_K, integers up to 32 * 128, must not overflow 32 bits.
constexpr float kLargestInteger = 16383.0f;
// Of an integer in two bytes, without a sign in the low one.
constexpr int kLowBits = 7;

// Orders of the columns of x. In those of a type the last two of each 16 columns come first in every other block.
constexpr int kPlainOrder = 0, kOrderQ4_0 = 1, kOrderQ8_0 = 2;

// Half of the multiplications, and additions in their place (Winograd, "A New Algorithm for Inner Product", 1968):
// (w0 + x1) (w1 + x0) = w0 x0 + w1 x1 + w0 w1 + x0 x1. The last two depend on one operand only, and the sums begin
// without them. All is exact modulo 2^32. Of every four steps, four columns of a block each, one is left as it is: a
// CPU with two units that multiply and add, and two more that add, is then busy in all.
constexpr bool multiplied_as_sums(int step) { return step % 4 != 3; }
// The first of the two pairs of each such step, bits of kLanes pairs from `pair`.
constexpr uint32_t lanes_multiplied_as_sums(int pair) {
    uint32_t lanes = 0;
    for (int lane = 0; lane < kLanes; lane += 2) {
        if (multiplied_as_sums((pair + lane) / 2)) lanes |= 1u << lane;
    }
    return lanes;
}

// A slab of one row of x.
struct alignas(64) InputSlab {
    int16_t integers[kSlabBlocks][kBlock];  // with kFours and one token: bytes, as cut_in_bytes leaves them
    float scale[kSlabBlocks];
    float minus_sum[kSlabBlocks];  // of the rounded values
    int32_t sums[kSlabBlocks][2];  // of the integers of half a block
    // For one token, and with kSumsOfPairs: what has to be added to the sum of a block, modulo 2^32. What the integers
    // of the order's type are too large by, and the products of columns that are multiplied as sums.
    int32_t missing[kSlabBlocks];
};

}  // namespace

// In the order in which they use each other.
// clang-format off
#include "cpu/integer_weights.h"
#include "cpu/integer_one_token.h"
#include "cpu/integer_many_tokens.h"
// clang-format on

namespace {

// ---- the table ----

template <class Rows = PairRows>
int order_of_integers(WeightType type) {
    switch (type) {
        case WeightType::Q8_0: return Rows::Q8_0::kOrder;
        case WeightType::Q4_0: return Rows::Q4_0::kOrder;
        case WeightType::Q4_K: return Rows::Q4_K::kOrder;
        case WeightType::Q5_K: return Rows::Q5_K::kOrder;
        case WeightType::Q6_K: return Rows::Q6_K::kOrder;
        default: return -1;
    }
}

int64_t packed_integer_bytes(int64_t n_tokens, int64_t cols) {
    const int64_t slabs = n_tokens * ((cols + kSlabCols - 1) / kSlabCols);
    return (slabs + kIntegerTokens) * static_cast<int64_t>(sizeof(InputSlab));  // with room for the last tile
}

// Templates, so that only who calls them needs what they call.

// Paired columns, four by four: their high bytes, then their low bytes.
template <class Vector>
YIVL_INLINE void cut_in_bytes(Vector* x) {
    for (int i = 0; i < kPairs / kLanes; ++i) {
        const Vector high = low_bits(signed_down<kLowBits>(x[i]), 0xff), low = low_bits(x[i], (1 << kLowBits) - 1);
        store_integers(x + i, shuffle_eights(any_bits(high, up<8>(low))));
    }
}

// The products of columns that are multiplied as sums, modulo 2^32.
template <class Vector>
YIVL_INLINE uint32_t products_of_columns(const Vector* x) {
    uint32_t sum = 0;
    for (int i = 0; i < kPairs / kLanes; ++i) {
        // Of two neighbouring pairs, each twice.
        const Vector products = multiply_pairs(no_integers(), x[i], lanes_swapped(x[i]));
        sum += static_cast<uint32_t>(sum_of_lanes(products, lanes_multiplied_as_sums(i * kLanes)));
    }
    return sum;
}

template <auto round>
void pack_block(InputSlab& slab, int64_t b, const float* x, int order, bool fours) {
    const float most = largest_magnitude(x);
    if (!(most <= 3.4028234e38f)) {  // an infinity or no number: neither may get lost
        for (int16_t& n : slab.integers[b]) n = 0;
        slab.scale[b] = slab.minus_sum[b] = __builtin_nanf("");
        slab.sums[b][0] = slab.sums[b][1] = slab.missing[b] = 0;
        return;
    }
    // What is smaller has no reciprocal, and counts as nothing.
    const bool some = most > 1.0e-34f;
    const float scale = some ? most / kLargestInteger : 0.0f;
    const float factor = some ? kLargestInteger / most : 0.0f;
    round(x, factor, slab.integers[b], slab.sums[b]);
    slab.scale[b] = scale;
    const int32_t sum = slab.sums[b][0] + slab.sums[b][1];
    slab.minus_sum[b] = -scale * static_cast<float>(sum);
    slab.missing[b] = order == kOrderQ4_0 ? -8 * sum : order == kOrderQ8_0 && fours ? -128 * sum : 0;
    I* const vectors = reinterpret_cast<I*>(slab.integers[b]);
    if constexpr (kFours) {
        if (fours) return cut_in_bytes(vectors);
    }
    if constexpr (kSumsOfPairs) {
        const uint32_t missing = static_cast<uint32_t>(slab.missing[b]) - products_of_columns(vectors);
        slab.missing[b] = static_cast<int32_t>(missing);
    }
}

template <auto round = round_block>
void pack_integers(std::byte* dst, const PackedInput& p, int64_t group) {
    InputSlab* const slabs = reinterpret_cast<InputSlab*>(dst);
    const int64_t begin = group * kTokensOfGroup, end = min64(begin + kTokensOfGroup, p.n_tokens);
    for (int64_t t = begin; t < end; ++t) {
        for (int64_t col = 0; col < p.cols; col += kBlock) {
            const float* x = p.x + (t - begin) * p.x_stride + col;
            const int64_t b = col % kSlabCols / kBlock;
            float turned[kBlock];
            if (p.order != kPlainOrder && b % 2 == 0) {
                for (int i = 0; i < kBlock; ++i) turned[i] = x[i / 16 * 16 + (i + 14) % 16];
                x = turned;
            }
            pack_block<round>(slabs[col / kSlabCols * p.n_tokens + t], b, x, p.order, kFours && p.n_tokens == 1);
        }
    }
}

int64_t integer_scratch_bytes(int64_t n_tokens, int64_t n_rows, int64_t) {
    const int64_t tiles = ((n_rows + kSideRows - 1) / kSideRows) *
                          ((min64(n_tokens, kTokensAtOnce) + kIntegerTokens - 1) / kIntegerTokens);
    return kIntegerRows * static_cast<int64_t>(sizeof(WeightSlab)) +
           tiles * kTileSums * static_cast<int64_t>(sizeof(F));
}

// kManyLines: whether one token's lines all come to the first-level cache: see Ahead.
template <class Rows = PairRows, bool kManyLines = false>
void multiply_integers(const PackedPiece& piece, std::byte* scratch, bool (*stop)(const void*), const void* stop_arg) {
    const auto with = [&]<class Type>(Type) YIVL_TARGET_LAMBDA {
        if (piece.n_tokens == 1) {
            multiply_one<Type, kManyLines>(piece);
        } else {
            multiply_many<Type>(piece, scratch, stop, stop_arg);
        }
    };
    switch (piece.type) {
        case WeightType::Q8_0: return with(typename Rows::Q8_0());
        case WeightType::Q4_0: return with(typename Rows::Q4_0());
        case WeightType::Q4_K: return with(typename Rows::Q4_K());
        case WeightType::Q5_K: return with(typename Rows::Q5_K());
        case WeightType::Q6_K: return with(typename Rows::Q6_K());
        default: return;
    }
}

int64_t multiply_add_integers(int64_t rounds) {
    constexpr int kSums = 12;
    I acc[kSums];
    YIVL_UNROLL
    for (int i = 0; i < kSums; ++i) acc[i] = integers(i);
    const I one = integers(1);
    for (int64_t r = 0; r < rounds; ++r) {
        YIVL_UNROLL
        for (int i = 0; i < kSums; ++i) acc[i] = multiply_pairs(acc[i], acc[i], one);
    }
    for (int i = 1; i < kSums; ++i) acc[0] = add_integers(acc[0], acc[i]);
    asm volatile("" : : "m"(acc[0]));  // or the compiler would leave it all out
    return rounds * kSums * kLanes * 4;
}

constexpr PackedKernels integer_kernels(decltype(PackedKernels::linear) linear) {
    return {
        .tokens = kTokensOfGroup,
        .order = order_of_integers<>,
        .packed_bytes = packed_integer_bytes,
        .pack = pack_integers<>,
        .scratch_bytes = integer_scratch_bytes,
        .linear = linear,
        .multiply_add = multiply_add_integers,
    };
}

constexpr PackedKernels kIntegerKernels = integer_kernels(multiply_integers<>);

}  // namespace
