// UTF-8, one character at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace yivl {

// U+FFFD, which stands for bytes that are not UTF-8.
inline constexpr std::string_view replacement_character = "\xEF\xBF\xBD";

struct Utf8Step {
    enum Kind { valid, invalid, incomplete } kind;
    size_t length;  // bytes of the character; of an invalid or incomplete one, the bytes that one U+FFFD stands for
};

// The first character of `bytes`, which must not be empty. "incomplete": more bytes could still make it valid. The
// length of what is invalid follows the Unicode standard, section 3.9 ("maximal subparts"), as Python's decoder does.
inline Utf8Step utf8_step(std::string_view bytes) {
    const auto byte = [&](size_t i) { return static_cast<uint8_t>(bytes[i]); };
    const uint8_t lead = byte(0);
    if (lead < 0x80) return {Utf8Step::valid, 1};
    if (lead < 0xC2 || lead > 0xF4) return {Utf8Step::invalid, 1};
    const size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    // The second byte excludes overlong forms, surrogates and what lies above U+10FFFF.
    uint8_t lowest = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    uint8_t highest = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    for (size_t i = 1; i < length; ++i) {
        if (i == bytes.size()) return {Utf8Step::incomplete, i};
        if (byte(i) < lowest || byte(i) > highest) return {Utf8Step::invalid, i};
        lowest = 0x80;
        highest = 0xBF;
    }
    return {Utf8Step::valid, length};
}

// Where the first bytes that are not UTF-8 begin; npos if there are none.
inline size_t find_invalid_utf8(std::string_view bytes) {
    for (size_t at = 0; at < bytes.size();) {
        const Utf8Step step = utf8_step(bytes.substr(at));
        if (step.kind != Utf8Step::valid) return at;
        at += step.length;
    }
    return std::string_view::npos;
}

}  // namespace yivl
