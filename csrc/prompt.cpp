#include "prompt.h"

#include <stdexcept>

namespace yivl {

std::string Prompt::text() const { return has_image ? before + kImagePlaceholder + after : before; }

Prompt build_prompt(const PromptConfig& config, std::span<const Message> messages, bool with_image) {
    std::string system = config.system;
    if (!messages.empty() && messages.front().role == Role::system) {
        system = messages.front().text;
        messages = messages.subspan(1);
    }
    if (messages.empty() || messages.back().role != Role::user) {
        throw std::invalid_argument("expected the last message to be the user's, found " +
                                    std::string(messages.empty() ? "no message" : "another role"));
    }

    Prompt prompt;
    prompt.before = system + "\n\n### ";
    for (const Message& message : messages) {
        std::string& text = prompt.has_image ? prompt.after : prompt.before;
        switch (message.role) {
            case Role::system:
                throw std::invalid_argument("expected a system message only at the beginning, found one later");
            case Role::assistant: text += "Assistant: " + message.text + "\n### "; break;
            case Role::user:
                text += "Human: ";
                if (with_image && !prompt.has_image) {
                    prompt.has_image = true;
                    prompt.after = "\n" + message.text + "\n### ";
                } else {
                    text += message.text + "\n### ";
                }
                break;
        }
    }
    (prompt.has_image ? prompt.after : prompt.before) += "Assistant:";
    return prompt;
}

std::vector<int32_t> prompt_ids(const Prompt& prompt, const Tokenizer& tokenizer) {
    std::vector<int32_t> ids = tokenizer.encode(prompt.before);
    if (!prompt.has_image) return ids;
    const std::vector<int32_t> after = tokenizer.encode(prompt.after);
    ids.push_back(kImageId);
    // The reference drops the BOS that tokenising the second part adds again.
    ids.insert(ids.end(), after.begin() + (tokenizer.adds_bos() ? 1 : 0), after.end());
    return ids;
}

}  // namespace yivl
