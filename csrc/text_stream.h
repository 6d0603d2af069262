// From the raw bytes of generated ids to the text of a reply, piece by piece.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace yivl {

// The text of a reply is defined on all bytes pushed, however they were cut:
//   decoded  the bytes as UTF-8, U+FFFD for what is invalid (as Python's errors="replace"), without an incomplete
//            character at the very end;
//   cut      at the earliest place where one of the stop texts begins, if any does;
//   stripped of whitespace at both ends, as Python's str.strip().
// Stop texts are searched before stripping: "\nHuman:" ends a reply at its very beginning too, where stripping alone
// would take the line break away and leave "Human:".
class TextStream {
public:
    // Throws std::invalid_argument for a stop text that is empty or not UTF-8.
    explicit TextStream(std::vector<std::string> stops);

    // The text that is now certain. Held back are an incomplete character, what may become a stop, and whitespace that
    // may be the reply's last. Once a stop was found, further bytes are ignored.
    std::string push(std::string_view bytes);
    // No more bytes come: the rest of the text.
    std::string finish();

    // A stop was found. It can be finish() that finds it: "bc" in "abc", where "abcd" would have begun earlier.
    bool stopped() const { return stopped_; }
    // All text returned so far.
    const std::string& text() const { return text_; }

private:
    void decode(std::string_view bytes);
    std::string take(bool last);

    std::vector<std::string> stops_;
    std::string undecoded_;    // an incomplete character, at most 3 bytes
    std::string held_;         // decoded, not returned
    size_t searched_ = 0;      // no stop begins in held_[0, searched_)
    size_t last_visible_ = 0;  // held_[last_visible_, searched_) is whitespace
    std::string text_;
    bool stopped_ = false;
    bool finished_ = false;
};

}  // namespace yivl
