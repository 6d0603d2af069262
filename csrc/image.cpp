#include "image.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace yivl {
namespace {

using Color = std::array<uint8_t, 3>;

// Fixed point of the coefficients: 8 bits of sample and 2 of headroom (the negative lobes of the kernel) leave 22.
constexpr int kPrecisionBits = 32 - 8 - 2;
constexpr int32_t kHalf = 1 << (kPrecisionBits - 1);
constexpr double kSupport = 2.0;  // half the width of the cubic kernel

// No side may be longer, so that no product of two sides and a few channels leaves int64.
constexpr int64_t kMaxSide = int64_t{1} << 30;

// Keys' cubic with a = -0.5, grouped as Pillow groups it: the last bit of a coefficient depends on it.
double bicubic(double x) {
    constexpr double a = -0.5;
    x = std::abs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

uint8_t clip8(int32_t sum) { return static_cast<uint8_t>(std::clamp(sum >> kPrecisionBits, 0, 255)); }

// One axis of a resize: `padded` samples become `resized` samples, of which [begin, begin + count) are wanted. The
// picture's own samples are [offset, offset + length) of the padded ones; the padding exists only as a colour.
struct Axis {
    int64_t length;
    int64_t offset;
    int64_t padded;
    int64_t resized;
    int64_t begin;
    int64_t count;
};

// What one output sample is made of: coefficients of the picture's samples [first, end), and the sum of those that fall
// on padding.
class Taps {
public:
    int64_t first = 0;
    int64_t end = 0;
    std::vector<int32_t> coefficients;  // (end - first)
    int32_t on_padding = 0;
    int32_t total = 0;  // on_padding and all coefficients

    // Which samples of the picture contribute to output i: `first` and `end` only. Both never decrease with i.
    void locate(const Axis& axis, int64_t i) {
        const double scale = static_cast<double>(axis.padded) / static_cast<double>(axis.resized);
        stretch_ = std::max(scale, 1.0);
        center_ = (static_cast<double>(axis.begin + i) + 0.5) * scale;
        const double support = kSupport * stretch_;
        padded_first_ = std::max<int64_t>(static_cast<int64_t>(center_ - support + 0.5), 0);
        padded_end_ = std::min(static_cast<int64_t>(center_ + support + 0.5), axis.padded);
        first = std::clamp<int64_t>(padded_first_ - axis.offset, 0, axis.length);
        end = std::clamp<int64_t>(padded_end_ - axis.offset, 0, axis.length);
    }

    void compute(const Axis& axis, int64_t i) {
        locate(axis, i);
        const auto n = static_cast<size_t>(padded_end_ - padded_first_);
        weights_.resize(n);
        const double shrink = 1.0 / stretch_;
        double sum = 0.0;
        for (size_t j = 0; j < n; ++j) {
            const double sample = static_cast<double>(padded_first_ + static_cast<int64_t>(j));
            weights_[j] = bicubic((sample - center_ + 0.5) * shrink);
            sum += weights_[j];
        }
        coefficients.clear();
        on_padding = total = 0;
        for (size_t j = 0; j < n; ++j) {
            const double scaled = weights_[j] / sum * (1 << kPrecisionBits);
            const auto fixed = static_cast<int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
            const int64_t sample = padded_first_ + static_cast<int64_t>(j) - axis.offset;
            total += fixed;
            if (sample >= first && sample < end) {
                coefficients.push_back(fixed);
            } else {
                on_padding += fixed;
            }
        }
    }

private:
    double stretch_ = 1.0;
    double center_ = 0.0;
    int64_t padded_first_ = 0;
    int64_t padded_end_ = 0;
    std::vector<double> weights_;
};

// The coefficients of some neighbouring output columns, laid out for `dot`.
//
// A 32-bit multiplication has no vector instruction on baseline x86-64, but a sum of products of 16-bit numbers has one
// everywhere. So a coefficient is split into low + 2^15 * high, and both sums are taken. They wrap modulo 2^32, which
// the total does not: it fits.
struct ColumnBlock {
    static constexpr int64_t kLanes = 8;  // coefficients per column are filled up with zeros to a multiple
    static constexpr size_t kMaxCoefficients = size_t{1} << 18;  // 1 MiB; a single column may have more

    struct Column {
        int64_t first;  // in the picture
        int64_t n;      // a multiple of kLanes
        size_t at;      // in low and high
        int32_t on_padding;
    };
    std::vector<Column> columns;
    std::vector<int16_t> low, high;
    int64_t first = 0, end = 0;  // samples of the picture that the columns read, zero coefficients aside

    bool full() const { return low.size() >= kMaxCoefficients; }

    void clear() {
        columns.clear();
        low.clear();
        high.clear();
    }

    void add(const Taps& taps) {
        const int64_t n = (taps.end - taps.first + kLanes - 1) / kLanes * kLanes;
        if (columns.empty()) first = taps.first;
        end = taps.end;
        columns.push_back({taps.first, n, low.size(), taps.on_padding});
        for (int32_t c : taps.coefficients) {
            low.push_back(static_cast<int16_t>(c & 0x7fff));
            high.push_back(static_cast<int16_t>(c >> 15));
        }
        low.resize(columns.back().at + static_cast<size_t>(n));
        high.resize(low.size());
    }
};

// value * alpha + under * (1 - alpha), rounded to nearest: Pillow's alpha_composite over an opaque picture.
int compose(int value, int under, int alpha) {
    const int t = value * alpha + under * (255 - alpha) + 128;
    return (t + (t >> 8)) >> 8;
}

// The samples [first, end) of one row, colour by colour: planes (3, stride).
void load_row(int16_t* planes, int64_t stride, const ImageView& picture, int64_t y, int64_t first, int64_t end,
              const Color& background) {
    const uint8_t* p = picture.data.data() + (y * picture.width + first) * picture.channels;
    int16_t* red = planes;
    int16_t* green = planes + stride;
    int16_t* blue = planes + 2 * stride;
    const int64_t n = end - first;
    if (picture.channels == 3) {
        for (int64_t x = 0; x < n; ++x) {
            red[x] = p[3 * x];
            green[x] = p[3 * x + 1];
            blue[x] = p[3 * x + 2];
        }
    } else {
        for (int64_t x = 0; x < n; ++x) {
            const int alpha = p[4 * x + 3];
            red[x] = static_cast<int16_t>(compose(p[4 * x], background[0], alpha));
            green[x] = static_cast<int16_t>(compose(p[4 * x + 1], background[1], alpha));
            blue[x] = static_cast<int16_t>(compose(p[4 * x + 2], background[2], alpha));
        }
    }
}

// First pass over one row: the block's columns of it, (columns, 3).
void filter_row(uint8_t* out, const int16_t* planes, int64_t stride, const ColumnBlock& block,
                const Color& background) {
    for (const ColumnBlock::Column& column : block.columns) {
        const int16_t* low = block.low.data() + column.at;
        const int16_t* high = block.high.data() + column.at;
        const int16_t* red = planes + (column.first - block.first);
        const int16_t* green = red + stride;
        const int16_t* blue = green + stride;
        uint32_t low_sum[3] = {};
        uint32_t high_sum[3] = {};
        for (int64_t j = 0; j < column.n; ++j) {
            low_sum[0] += static_cast<uint32_t>(red[j] * low[j]);
            high_sum[0] += static_cast<uint32_t>(red[j] * high[j]);
            low_sum[1] += static_cast<uint32_t>(green[j] * low[j]);
            high_sum[1] += static_cast<uint32_t>(green[j] * high[j]);
            low_sum[2] += static_cast<uint32_t>(blue[j] * low[j]);
            high_sum[2] += static_cast<uint32_t>(blue[j] * high[j]);
        }
        for (int c = 0; c < 3; ++c) {
            const int32_t fixed = kHalf + background[c] * column.on_padding;
            *out++ = clip8(static_cast<int32_t>(static_cast<uint32_t>(fixed) + low_sum[c] + (high_sum[c] << 15)));
        }
    }
}

// Resizes what Pillow would see if the picture were padded with `background`: columns first, rounded to 8 bits, then
// rows. Padding costs neither memory nor time: it enters each sum as one product. Besides the result, memory is taken
// for the picture's rows as the first pass leaves them, in those columns that the picture reaches: as many times the
// picture's size as it gets wider, and less than that size when it shrinks, unless it is a few pixels wide and a very
// tall picture that is padded: up to 5 times as much.
Image resample(const ImageView& picture, const Axis& across, const Axis& down, const Color& background,
               Control& control) {
    Image result{across.count, down.count, {}};
    result.data.resize(static_cast<size_t>(across.count * down.count * 3));

    Taps taps;
    taps.locate(down, 0);
    const int64_t top = taps.first;
    taps.locate(down, down.count - 1);
    const int64_t bottom = taps.end;
    int64_t left = 0;
    int64_t right = across.count;
    const auto reached = [&](int64_t x) {
        taps.locate(across, x);
        return taps.first < taps.end;
    };
    while (left < right && !reached(left)) ++left;
    while (left < right && !reached(right - 1)) --right;

    // First pass: the rows [top, bottom) of the picture, and a row of padding.
    const int64_t row_bytes = (right - left) * 3;
    std::vector<uint8_t> rows(static_cast<size_t>((bottom - top) * row_bytes));
    std::vector<uint8_t> padding_row(static_cast<size_t>(across.count * 3));
    std::vector<int16_t> planes;
    ColumnBlock block;
    for (int64_t x = 0; x < across.count; ++x) {
        taps.compute(across, x);
        for (int c = 0; c < 3; ++c) padding_row[x * 3 + c] = clip8(kHalf + background[c] * taps.total);
        if (x < left || x >= right) continue;
        block.add(taps);
        if (!block.full() && x + 1 < right) continue;
        const int64_t stride = block.end - block.first + ColumnBlock::kLanes;
        const int64_t block_left = x + 1 - static_cast<int64_t>(block.columns.size());
        planes.assign(static_cast<size_t>(3 * stride), 0);
        for (int64_t y = top; y < bottom; ++y) {
            control.check();
            load_row(planes.data(), stride, picture, y, block.first, block.end, background);
            uint8_t* out = rows.data() + (y - top) * row_bytes + (block_left - left) * 3;
            filter_row(out, planes.data(), stride, block, background);
        }
        block.clear();
    }

    // Second pass.
    std::vector<int32_t> sums(static_cast<size_t>(row_bytes));
    for (int64_t y = 0; y < down.count; ++y) {
        control.check();
        taps.compute(down, y);
        uint8_t* out = result.data.data() + y * across.count * 3;
        for (int64_t i = 0; i < across.count * 3; ++i) out[i] = clip8(kHalf + padding_row[i] * taps.total);
        for (int64_t i = 0; i < row_bytes; ++i) sums[i] = kHalf + padding_row[left * 3 + i] * taps.on_padding;
        for (int64_t row = taps.first; row < taps.end; ++row) {
            const uint8_t* samples = rows.data() + (row - top) * row_bytes;
            const int32_t coefficient = taps.coefficients[row - taps.first];
            for (int64_t i = 0; i < row_bytes; ++i) sums[i] += samples[i] * coefficient;
        }
        for (int64_t i = 0; i < row_bytes; ++i) out[left * 3 + i] = clip8(sums[i]);
    }
    return result;
}

std::string size_text(int64_t width, int64_t height) { return std::to_string(width) + " x " + std::to_string(height); }

void check(const ImageView& image) {
    if (image.width < 1 || image.height < 1 || image.width > kMaxSide || image.height > kMaxSide) {
        throw ImageError("expected a picture with sides from 1 to " + std::to_string(kMaxSide) + " pixels, found " +
                         size_text(image.width, image.height));
    }
    if (image.channels != 3 && image.channels != 4) {
        throw ImageError("expected 3 channels (RGB) or 4 (RGBA), found " + std::to_string(image.channels));
    }
    const auto expected = static_cast<size_t>(image.width * image.height * image.channels);
    if (image.data.size() != expected) {
        throw ImageError("expected " + std::to_string(expected) + " bytes for " + size_text(image.width, image.height) +
                         " pixels of " + std::to_string(image.channels) + " channels, found " +
                         std::to_string(image.data.size()));
    }
}

void check_output(int64_t width, int64_t height) {
    if (width < 1 || height < 1 || width > kMaxSide || height > kMaxSide) {
        throw ImageError("expected an output size from 1 to " + std::to_string(kMaxSide) + " pixels a side, found " +
                         size_text(width, height));
    }
}

}  // namespace

Image resize_bicubic(const ImageView& rgb, int64_t width, int64_t height, Control& control) {
    check(rgb);
    check_output(width, height);
    if (rgb.channels != 3) throw ImageError("expected 3 channels (RGB), found " + std::to_string(rgb.channels));
    const Axis across{rgb.width, 0, rgb.width, width, 0, width};
    const Axis down{rgb.height, 0, rgb.height, height, 0, height};
    return resample(rgb, across, down, Color{}, control);
}

Image fit(const ImageView& image, const PreprocessConfig& config, Control& control) {
    check(image);
    const int64_t size = config.image_size;
    check_output(size, size);
    const auto axis = [&](int64_t length, int64_t other) {
        if (config.pad) {
            const int64_t side = std::max(length, other);
            return Axis{length, (side - length) / 2, side, size, 0, size};
        }
        const int64_t resized = length <= other ? size : size * length / other;
        return Axis{length, 0, length, resized, (resized - size) / 2, size};
    };
    return resample(image, axis(image.width, image.height), axis(image.height, image.width), config.pad_color, control);
}

std::vector<float> preprocess(const ImageView& image, const PreprocessConfig& config, Control& control) {
    const Image fitted = fit(image, config, control);
    const size_t n = fitted.data.size() / 3;
    std::vector<float> pixels(3 * n);
    for (size_t c = 0; c < 3; ++c) {
        // The reference scales in double precision, rounds to float, and normalises in float.
        std::array<float, 256> value;
        for (int i = 0; i < 256; ++i) {
            value[i] = (static_cast<float>(i * (1.0 / 255.0)) - config.mean[c]) / config.std[c];
        }
        for (size_t i = 0; i < n; ++i) pixels[c * n + i] = value[fitted.data[3 * i + c]];
    }
    return pixels;
}

}  // namespace yivl
