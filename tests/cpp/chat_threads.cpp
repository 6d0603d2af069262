// Four threads chat on one Model and must reply as one after another does. Built with -fsanitize=thread in CI.
//
// usage: chat_threads MODEL.gguf

#include <cstdio>
#include <exception>
#include <string>
#include <thread>
#include <vector>

#include "model.h"

namespace {

using namespace yivl;

constexpr int kCallers = 4;

// A picture that differs from one caller to the next.
Pixels picture(const Model& model, int caller, Control& control) {
    const int64_t side = 40 + 10 * caller;
    Image image{side, side, {}};
    for (int64_t i = 0; i < side * side * 3; ++i) image.data.push_back(static_cast<uint8_t>(i * (caller + 3)));
    return std::make_shared<const std::vector<float>>(preprocess(image.view(), model.config().preprocess, control));
}

std::string chat(const std::shared_ptr<const Model>& model, int caller) {
    Session session(model, 512);
    Control control;
    const Pixels pixels = picture(*model, caller, control);
    std::vector<Message> messages;
    std::string all;
    for (const char* question : {"Describe the picture.", "为什么？"}) {
        messages.push_back({Role::user, question});
        const std::vector<int32_t> ids =
            prompt_ids(build_prompt(model->config().prompt, messages, true), model->tokenizer());
        GenerateOptions options;
        options.max_tokens = 8;
        options.sampling.temperature = 1.0F;
        options.sampling.seed = static_cast<uint64_t>(caller);
        session.begin(ids, pixels, options);
        while (session.next(control)) {
        }
        messages.push_back({Role::assistant, session.text()});
        all += session.text() + "\n";
    }
    return all;
}

}  // namespace

int main(int argc, char** argv) try {
    if (argc != 2) {
        std::fprintf(stderr, "usage: %s MODEL.gguf\n", argv[0]);
        return 2;
    }
    Control control;
    const std::shared_ptr<const Model> model = Model::open({argv[1], "", 2}, control);
    std::vector<std::string> alone(kCallers);
    std::vector<std::string> together(kCallers);
    for (int i = 0; i < kCallers; ++i) alone[i] = chat(model, i);
    {
        std::vector<std::jthread> threads;
        for (int i = 0; i < kCallers; ++i) threads.emplace_back([&, i] { together[i] = chat(model, i); });
    }
    for (int i = 0; i < kCallers; ++i) {
        if (alone[i] != together[i]) {
            std::fprintf(stderr, "caller %d: alone '%s', together '%s'\n", i, alone[i].c_str(), together[i].c_str());
            return 1;
        }
    }
    std::printf("%d callers, same replies alone and together\n", kCallers);
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "chat_threads: %s\n", error.what());
    return 1;
}
