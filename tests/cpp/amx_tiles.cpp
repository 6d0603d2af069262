// AMX tiles by themselves. "numbers" compares products bit by bit with their definition in scalar code, on the emulator
// or, in a native build, on a CPU that has them; the other cases use the emulator wrongly, which ends the program.
#include <bit>
#include <cmath>
#include <cstdio>
#include <random>
#include <string_view>

#include "cpu/tiles.h"

using namespace yivl::amx;

namespace {

struct Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tile 0: sums of m rows and n columns. Tiles 1 and 2: the operands, with k pairs.
Config config(int m, int n, int k) {
    Config c;
    const int row_bytes[] = {n * 4, k * 4, n * 4}, rows[] = {m, m, k};
    for (int i = 0; i < 3; ++i) {
        c.row_bytes[i] = static_cast<uint16_t>(row_bytes[i]);
        c.rows[i] = static_cast<uint8_t>(rows[i]);
    }
    return c;
}

float flushed(float v) { return std::fpclassify(v) == FP_SUBNORMAL ? std::copysign(0.0f, v) : v; }
// A bfloat16 number is the upper half of a float.
float lower(uint32_t pair) { return flushed(std::bit_cast<float>(pair << 16)); }
float upper(uint32_t pair) { return flushed(std::bit_cast<float>(pair & 0xffff0000)); }

// Numbers of all magnitudes, among them some too small and some that overflow together; now and then no number.
uint32_t any_float(std::mt19937& random) {
    const uint32_t range = random() % 4;
    const uint32_t exponent = range == 0   ? 127
                              : range == 1 ? random() % 256
                              : range == 2 ? random() % 4
                                           : 60 + random() % 8;
    return (random() & 0x807fffff) | exponent << 23;
}

bool numbers() {
    std::mt19937 random(1);
    for (int round = 0; round < 300; ++round) {
        const bool whole = round % 2 == 0;
        const int m = whole ? 16 : 1 + static_cast<int>(random() % 16),
                  n = whole ? 16 : 1 + static_cast<int>(random() % 16);
        const int k = whole ? 16 : 1 + static_cast<int>(random() % 16);
        uint32_t a[16][16], b[16][16], sums[16][16], found[16][16];
        for (int i = 0; i < 16; ++i) {
            for (int j = 0; j < 16; ++j) {
                a[i][j] = (any_float(random) & 0xffff0000) | any_float(random) >> 16;
                b[i][j] = (any_float(random) & 0xffff0000) | any_float(random) >> 16;
                found[i][j] = sums[i][j] = any_float(random);
            }
        }
        const Config c = config(m, n, k);
        configure_tiles(&c);
        load_tile<0>(sums, 64);
        load_tile<1>(a, 64);
        load_tile<2>(b, 64);
        multiply_tiles<0, 1, 2>();
        store_tile<0>(found, 64);
        release_tiles();
        for (int i = 0; i < 16; ++i) {
            for (int j = 0; j < 16; ++j) {
                float even = 0, odd = 0, sum = std::bit_cast<float>(sums[i][j]);
                for (int l = 0; l < k; ++l) {
                    even = flushed(std::fma(lower(a[i][l]), lower(b[l][j]), even));
                    odd = flushed(std::fma(upper(a[i][l]), upper(b[l][j]), odd));
                }
                if (i < m && j < n) sum = flushed(flushed(sum) + flushed(even + odd));
                const float got = std::bit_cast<float>(found[i][j]);
                if (std::isnan(sum) && std::isnan(got)) continue;
                if (std::bit_cast<uint32_t>(sum) != found[i][j]) {
                    std::printf("round %d, row %d, column %d: expected %a, found %a\n", round, i, j, sum, got);
                    return false;
                }
            }
        }
    }
    return true;
}

void misuse(std::string_view name) {
    alignas(64) std::byte memory[1024] = {};
    Config c = config(16, 16, 16);
    if (name == "unconfigured") load_tile<0>(memory, 64);
    if (name == "reserved") c.reserved[3] = 1;
    if (name == "rows") c.rows[1] = 17;
    if (name == "bytes") c.row_bytes[2] = 62;
    if (name == "shapes") c.rows[2] = 15;
    configure_tiles(&c);
    if (name == "unreleased") configure_tiles(&c);
    if (name == "unused") load_tile<3>(memory, 64);
    if (name == "unwritten") store_tile<0>(memory, 64);
    zero_tile<0>();
    load_tile<1>(memory, 64);
    if (name != "unread") load_tile<2>(memory, 64);
    multiply_tiles<0, 1, 2>();
    release_tiles();
    if (name == "released") store_tile<0>(memory, 64);
}

}  // namespace

int main(int, char** arguments) {
    if (!permitted()) {
        std::puts("this CPU has no AMX");
        return 1;
    }
    const std::string_view name = arguments[1];
    if (name == "numbers") return numbers() ? 0 : 1;
    misuse(name);
    return 0;
}
