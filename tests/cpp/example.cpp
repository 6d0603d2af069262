// Asks a model about a picture. usage: example MODEL.gguf PICTURE.ppm QUESTION

#include <cstdio>
#include <exception>
#include <fstream>

#include "model.h"

// A binary PPM file of 8 bits, without comments.
static yivl::Image read_ppm(const char* path) {
    std::ifstream file(path, std::ios::binary);
    std::string magic;
    yivl::Image image;
    int64_t maximum = 0;
    file >> magic >> image.width >> image.height >> maximum;
    file.get();
    if (!file || magic != "P6" || maximum != 255) throw yivl::ImageError("expected a PPM file (P6) of 8 bits");
    image.data.resize(static_cast<size_t>(image.width * image.height * 3));
    file.read(reinterpret_cast<char*>(image.data.data()), static_cast<std::streamsize>(image.data.size()));
    if (!file) throw yivl::ImageError("the PPM file is incomplete");
    return image;
}

int main(int argc, char** argv) try {
    if (argc != 4) return 2;
    yivl::Control control;
    const auto model = yivl::Model::open({argv[1], "", 0}, control);
    const auto pixels = std::make_shared<const std::vector<float>>(
        yivl::preprocess(read_ppm(argv[2]).view(), model->config().preprocess, control));

    const std::vector<yivl::Message> messages{{yivl::Role::user, argv[3]}};
    const yivl::Prompt prompt = yivl::build_prompt(model->config().prompt, messages, true);

    yivl::GenerateOptions options;
    options.max_tokens = 256;
    yivl::Session session(model);
    session.begin(yivl::prompt_ids(prompt, model->tokenizer()), pixels, options);
    while (const std::optional<std::string> piece = session.next(control)) {
        std::fputs(piece->c_str(), stdout);
        std::fflush(stdout);
    }
    std::putchar('\n');
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
}
