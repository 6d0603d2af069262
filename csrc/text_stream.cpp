#include "text_stream.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <utility>

#include "utf8.h"

namespace yivl {

namespace {

// Whether one UTF-8 character is whitespace to Python's str.isspace().
bool is_space(std::string_view character) {
    if (character.size() == 1) {
        const char c = character[0];
        return c == ' ' || (c >= '\t' && c <= '\r') || (c >= '\x1C' && c <= '\x1F');
    }
    static constexpr std::array<std::string_view, 19> wide = {
        "\u0085", "\u00A0", "\u1680", "\u2000", "\u2001", "\u2002", "\u2003", "\u2004", "\u2005", "\u2006",
        "\u2007", "\u2008", "\u2009", "\u200A", "\u2028", "\u2029", "\u202F", "\u205F", "\u3000"};
    return std::find(wide.begin(), wide.end(), character) != wide.end();
}

}  // namespace

TextStream::TextStream(std::vector<std::string> stops) : stops_(std::move(stops)) {
    for (const std::string& stop : stops_) {
        if (stop.empty()) throw std::invalid_argument("a stop text must not be empty");
        if (find_invalid_utf8(stop) != std::string::npos) throw std::invalid_argument("a stop text is not valid UTF-8");
    }
}

std::string TextStream::push(std::string_view bytes) {
    if (stopped_ || finished_) return {};
    decode(bytes);
    return take(false);
}

std::string TextStream::finish() {
    if (stopped_ || finished_) return {};
    finished_ = true;
    return take(true);
}

void TextStream::decode(std::string_view bytes) {
    undecoded_ += bytes;
    std::string_view rest = undecoded_;
    while (!rest.empty()) {
        const Utf8Step step = utf8_step(rest);
        if (step.kind == Utf8Step::incomplete) break;
        held_ += step.kind == Utf8Step::valid ? rest.substr(0, step.length) : replacement_character;
        rest.remove_prefix(step.length);
    }
    undecoded_.erase(0, undecoded_.size() - rest.size());
}

// Walks over the characters at which no stop begins, then returns the text up to the last one that is not whitespace.
std::string TextStream::take(bool last) {
    const std::string_view held = held_;
    while (searched_ < held.size()) {
        const std::string_view rest = held.substr(searched_);
        bool may_stop = false;
        for (const std::string& stop : stops_) {
            stopped_ = stopped_ || rest.starts_with(stop);
            may_stop = may_stop || (!last && std::string_view(stop).starts_with(rest));
        }
        if (stopped_ || may_stop) break;
        const size_t length = utf8_step(rest).length;
        searched_ += length;
        if (!is_space(rest.substr(0, length))) last_visible_ = searched_;
    }

    std::string_view shown = held.substr(0, last_visible_);
    while (text_.empty() && !shown.empty()) {
        const size_t length = utf8_step(shown).length;
        if (!is_space(shown.substr(0, length))) break;
        shown.remove_prefix(length);
    }
    std::string piece(shown);
    text_ += piece;
    held_.erase(0, last_visible_);
    searched_ -= last_visible_;
    last_visible_ = 0;
    return piece;
}

}  // namespace yivl
