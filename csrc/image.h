// From an 8-bit picture to the pixels that the ViT reads.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "control.h"
#include "errors.h"

namespace yivl {

// An 8-bit picture that somebody else owns, rows from the top, channels interleaved: (height, width, channels).
struct ImageView {
    int64_t width = 0;
    int64_t height = 0;
    int64_t channels = 3;  // 3: RGB, 4: RGBA, composed on the padding colour
    std::span<const uint8_t> data;
};

// An RGB picture of our own.
struct Image {
    int64_t width = 0;
    int64_t height = 0;
    std::vector<uint8_t> data;  // (height, width, 3)
    ImageView view() const { return {width, height, 3, data}; }
};

struct PreprocessConfig {
    int64_t image_size = 448;            // S
    bool pad = true;                     // image_aspect_ratio "pad"; otherwise see `fit`
    std::array<uint8_t, 3> pad_color{};  // int(mean * 255)
    std::array<float, 3> mean{};
    std::array<float, 3> std{};
};

// What stands between the decoded picture and the arithmetic: alpha composed, padded to a square (or, without `pad`,
// shortest edge resized and centre cropped, as CLIPImageProcessor does), resized to (S, S) with Pillow's bicubic. The
// padding is never stored: a picture of 20000 x 3 costs what 60000 pixels cost.
Image fit(const ImageView& image, const PreprocessConfig& config, Control& control);

// Pillow's Image.resize(BICUBIC), bit for bit: separable, a = -0.5, antialiased, 8 bits between the passes. Columns
// first, then rows, as every Pillow up to 12 does. From 13 on, Pillow takes rows first when the height shrinks much
// more than the width, and other values come out; squares, and so padded pictures, are the same in all of them.
Image resize_bicubic(const ImageView& rgb, int64_t width, int64_t height, Control& control);

// pixels (3, S, S) = ((fit(image) / 255) - mean) / std
std::vector<float> preprocess(const ImageView& image, const PreprocessConfig& config, Control& control);

}  // namespace yivl
