// The conversation as Yi-VL was trained to read it.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "config.h"
#include "tokenizer.h"

namespace yivl {

enum class Role { system, user, assistant };

struct Message {
    Role role;
    std::string text;
};

// Stands for the image in a list of ids, as in the reference.
inline constexpr int32_t kImageId = -200;
inline constexpr const char* kImagePlaceholder = "<image_placeholder>";

// The prompt around the image: what stands before it, and, with an image, what stands after it. Kept in two parts, so
// that the placeholder typed by a user stays text.
struct Prompt {
    std::string before;
    bool has_image = false;
    std::string after;

    // With the placeholder where the image goes.
    std::string text() const;
};

// System text, "\n\n### ", then "Human: ...\n### " or "Assistant: ...\n### " per message, at the end "Assistant:". A
// system message (only the first may be one) takes the place of the default. The image goes before the first human
// text. Throws std::invalid_argument when there is no user message or the last message is not one.
Prompt build_prompt(const PromptConfig& config, std::span<const Message> messages, bool with_image);

// Each part tokenised on its own, with kImageId between them.
std::vector<int32_t> prompt_ids(const Prompt& prompt, const Tokenizer& tokenizer);

}  // namespace yivl
