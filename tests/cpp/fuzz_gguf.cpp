// Damaged GGUF files against everything that reads one (parser, configuration, tokeniser, weights): each must be read
// whole or refused with a ModelFileError, and neither may cost more memory than the file's size justifies.
//
//   fuzz_gguf FOLDER [INPUTS]   damages the folder's files in INPUTS ways (200,000), the same ones in every run
//   fuzz_gguf FILE              reads one file
//
// Built with -fsanitize=address,undefined. An input that fails is kept as fuzz-failure.gguf. With clang's libFuzzer
// (-fsanitize=fuzzer, -DYIVL_LIBFUZZER) the same target runs under its engine.
#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "config.h"
#include "cpu/dequant.h"
#include "gguf.h"
#include "tokenizer.h"
#include "utf8.h"
#include "weights.h"

// GCC's AddressSanitizer has this function of sanitizer/allocator_interface.h but ships no header for it.
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*on_malloc)(const volatile void*, size_t),
                                                         void (*on_free)(const volatile void*));

using namespace yivl;

namespace {

using Bytes = std::vector<uint8_t>;

void expect(bool condition, const char* what) {
    if (!condition) throw std::logic_error(what);
}

// --- The target -----------------------------------------------------------------------------------------------------

// What the target has allocated since the last reset, freed or not.
size_t allocated = 0;
void on_malloc(const volatile void*, size_t size) { allocated += size; }
void on_free(const volatile void*) {}

Bytes read_bytes(const std::filesystem::path& path) {
    std::ifstream stream(path, std::ios::binary);
    if (!stream) throw std::runtime_error("cannot read " + path.string());
    return {std::istreambuf_iterator<char>(stream), {}};
}

volatile uint8_t sink;  // reads into it are not optimised away

void read_ends(const void* data, size_t size) {
    if (size == 0) return;
    sink = static_cast<const uint8_t*>(data)[0];
    sink = static_cast<const uint8_t*>(data)[size - 1];
}

void check_message(const std::string& message) {
    const bool plain = std::ranges::none_of(message, [](char c) { return static_cast<uint8_t>(c) < 0x20; });
    const bool named =
        message.starts_with("input: ") || message.starts_with("text: ") || message.starts_with("mmproj: ");
    if (!plain || !named || message.size() > 2000) throw std::logic_error("not a message for people: " + message);
}

// The value that `look_up` finds, or nothing if it throws the one error that it may throw.
template <class LookUp>
auto found(LookUp look_up) -> std::optional<decltype(look_up())> {
    try {
        return look_up();
    } catch (const ModelFileError& error) {
        check_message(error.what());
        return std::nullopt;
    }
}

// The look-ups that fit the value, and one of the seven in turn: an exception costs as much as a parse.
void look_up(const GgufFile& file, std::string_view key, const GgufValue& value, size_t turn) {
    const auto check = [&](size_t number, bool fits, auto read, auto use) {
        if (!fits && turn % 7 != number) return;
        const auto result = found(read);
        expect(fits || !result, "a value was read as another type");
        if (result) use(*result);
    };
    const auto nothing = [](auto) {};
    const auto ends = [](auto items) { read_ends(items.data(), items.size() * sizeof(*items.data())); };
    const auto text = [](std::string_view text) {
        expect(find_invalid_utf8(text) == std::string_view::npos, "a text is not UTF-8");
    };
    const bool integer = std::holds_alternative<uint64_t>(value) || std::holds_alternative<int64_t>(value);
    const bool array = std::holds_alternative<GgufArray>(value);
    check(0, integer, [&] { return file.integer(key); }, nothing);
    check(1, integer || std::holds_alternative<double>(value), [&] { return file.number(key); }, nothing);
    check(2, std::holds_alternative<bool>(value), [&] { return file.boolean(key); }, nothing);
    check(3, std::holds_alternative<std::string_view>(value), [&] { return file.string(key); }, text);
    check(4, array, [&] { return file.floats(key); }, ends);
    check(5, array, [&] { return file.integers(key); }, ends);
    check(6, array, [&] { return file.strings(key); }, [&](auto texts) { std::ranges::for_each(texts, text); });
}

void walk(const GgufFile& file) {
    size_t turn = 0;
    for (const auto& [key, value] : file.metadata()) {
        expect(find_invalid_utf8(key) == std::string_view::npos, "a key is not UTF-8");
        look_up(file, key, value, turn++);
    }
    expect(!found([&] { return file.string("no such key"); }), "a key that is not there was found");

    std::map<const std::byte*, const std::byte*> ranges;  // begin to end
    const std::byte* file_end = file.bytes().data() + file.bytes().size();
    for (const GgufTensor& tensor : file.tensors()) {
        const TypeInfo& type = type_info(tensor.type);
        int64_t blocks = tensor.shape.back() / type.block;
        for (size_t i = 0; i + 1 < tensor.shape.size(); ++i) blocks *= tensor.shape[i];
        expect(tensor.shape.back() % type.block == 0, "a tensor's rows are not whole blocks");
        expect(static_cast<size_t>(blocks * type.bytes) == tensor.data.size(), "a tensor's data do not fit its shape");
        expect(reinterpret_cast<uintptr_t>(tensor.data.data()) % 8 == 0, "a tensor's data are not aligned");
        expect(file.find_tensor(tensor.name) == &tensor, "a tensor is not found by its name");
        read_ends(tensor.data.data(), tensor.data.size());
        ranges.emplace(tensor.data.data(), tensor.data.data() + tensor.data.size());
    }
    expect(ranges.size() == file.tensors().size(), "two tensors begin at the same place");
    const std::byte* previous_end = file.bytes().data();
    for (const auto& [begin, end] : ranges) {
        expect(begin >= previous_end && end <= file_end, "a tensor's data lie outside the file or overlap");
        previous_end = end;
    }
}

// All that opening a model asks of a backend.
class Widen final : public Ops {
public:
    void embed(Mat y, const Weight& table, std::span<const int32_t> ids) override {
        for (int64_t i = 0; i < y.rows; ++i) {
            const std::byte* row = table.data + ids[static_cast<size_t>(i)] * table.row_bytes();
            dequantize_row(table.type, row, y.row(i).data(), y.cols);
        }
    }
    void upload(Mat, ConstMat) override { unused(); }
    void download(Mat, ConstMat) override { unused(); }
    void copy(Mat, ConstMat) override { unused(); }
    void linear(const Input&, std::span<const Product>) override { unused(); }
    void gated_linear(Mat, const Input&, const Weight&, const Weight&) override { unused(); }
    void norm(Mat, ConstMat, const Norm&) override { unused(); }
    void gelu(Mat) override { unused(); }
    void add(Mat, ConstMat) override { unused(); }
    void rope(Mat, int64_t, int64_t, float) override { unused(); }
    void attention(Mat, ConstMat, ConstHeads, ConstHeads, const AttentionShape&) override { unused(); }
    int32_t draw(ConstMat, std::span<const int32_t>, const Draw&) override { unused(); }

private:
    [[noreturn]] static void unused() { throw std::logic_error("opening a model computes nothing"); }
};

class WidenBackend final : public Backend {
public:
    const char* name() const override { return "widen"; }
    int n_threads() const override { return 1; }
    std::unique_ptr<Ops> ops(Control&) override { return std::make_unique<Widen>(); }
    Memory allocate(size_t bytes) override { return {new std::byte[bytes], std::default_delete<std::byte[]>()}; }
    const std::byte* place(std::span<const std::byte> bytes, Control&) override { return bytes.data(); }
};

void read_weight(const Weight& weight) {
    read_ends(weight.data, static_cast<size_t>(weight.rows * weight.row_bytes()));
}

void read_all(const Weights& weights) {
    for (const Buffer& values : weights.vectors) {
        read_ends(values.view().data, static_cast<size_t>(values.view().cols) * sizeof(float));
    }
    read_weight(weights.decoder.token_embedding);
    read_weight(weights.decoder.output);
    for (const DecoderLayerWeights& layer : weights.decoder.layers) {
        for (const Weight& w : {layer.q, layer.k, layer.v, layer.attn_output, layer.gate, layer.up, layer.down}) {
            read_weight(w);
        }
    }
    if (!weights.vit) return;
    read_weight(weights.vit->patch_embedding);
    for (const VitBlockWeights& block : weights.vit->blocks) {
        for (const LinearWeights* linear : {&block.q, &block.k, &block.v, &block.out, &block.fc1, &block.fc2}) {
            read_weight(linear->weight);
        }
    }
    read_weight(weights.projector->linear1.weight);
    read_weight(weights.projector->linear2.weight);
}

void use(const Tokenizer& tokenizer) {
    const std::vector<int32_t> ids = tokenizer.encode("ab <s> \n 7é你🙂");
    expect(tokenizer.decode(ids).size() <= 1000, "a short text became a long one");
    for (int32_t id = 0; id < std::min<int64_t>(tokenizer.vocab_size(), 300); ++id) {
        const std::string_view bytes = tokenizer.bytes(id);
        read_ends(bytes.data(), bytes.size());
    }
}

using File = std::shared_ptr<const GgufFile>;

// A valid pair, to stand beside a damaged half.
struct Companions {
    Bytes text_bytes = read_bytes(FUZZ_CORPUS "/text.gguf");
    Bytes mmproj_bytes = read_bytes(FUZZ_CORPUS "/mmproj.gguf");
    File text = GgufFile::parse(std::as_bytes(std::span(text_bytes)), "text");
    File mmproj = GgufFile::parse(std::as_bytes(std::span(mmproj_bytes)), "mmproj");
};

void bind_model(const File& text, const File& vision) {
    WidenBackend backend;
    Control control;
    read_all(bind_weights(text, vision, read_config(*text, vision.get()), {backend}, control));
}

// How far the inputs got; the run fails when the mutations are too wild or too tame to test anything.
struct Counts {
    size_t parsed = 0;
    size_t opened = 0;
    std::map<std::string, size_t> refusals;  // by error without its quoted text and numbers
};
Counts counts;

std::string kind_of(const std::string& message) {
    std::string kind;
    bool in_quotes = false;
    for (const char c : message) {
        if (c == '\'') in_quotes = !in_quotes;
        if (!in_quotes && !(c >= '0' && c <= '9')) kind += c;
    }
    return kind;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const int hooked = __sanitizer_install_malloc_and_free_hooks(on_malloc, on_free);
    static const Companions companions;
    expect(hooked > 0, "the allocator offers no hooks");
    // Whether `step` accepts the input.
    const auto accepted = [](size_t limit, const auto& step) {
        std::string refusal;
        allocated = 0;
        try {
            step();
        } catch (const ModelFileError& error) {
            refusal = error.what();
        }
        if (allocated > limit) {
            throw std::logic_error("allocated " + std::to_string(allocated) + " bytes; the input justifies " +
                                   std::to_string(limit));
        }
        if (refusal.empty()) return true;
        check_message(refusal);
        ++counts.refusals[kind_of(refusal)];
        return false;
    };
    // An 8-bit array item takes 8 bytes in memory, an entry of the smallest size about 10 times its own.
    File file;
    const auto parse = [&] { file = GgufFile::parse(std::as_bytes(std::span(data, size)), "input"); };
    if (!accepted(32 * size + (1 << 14), parse)) return 0;
    ++counts.parsed;
    walk(*file);

    const size_t limit = 64 * (size + companions.mmproj_bytes.size()) + (1 << 16);
    const bool single = file->has("clip.has_vision_encoder");
    const bool tokenises = accepted(limit, [&] { use(Tokenizer(Tokenizer::read_config(*file))); });
    counts.opened += accepted(limit, [&] { bind_model(file, single ? file : companions.mmproj); }) && tokenises;
    counts.opened += accepted(limit, [&] { bind_model(companions.text, file); });
    return 0;
}

#ifndef YIVL_LIBFUZZER

// Short stacks in reports of heap errors: to record long ones takes most of the run.
extern "C" const char* __asan_default_options() { return "malloc_context_size=2:quarantine_size_mb=16:handle_abort=1"; }

namespace {

// --- The corpus, taken apart
// ------------------------------------------------------------------------------------------

// The sequence depends on nothing but the seed (SplitMix64), unlike the standard library's distributions.
class Random {
public:
    explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15) {}
    uint64_t bits() {
        uint64_t z = state_ += 0x9E3779B97F4A7C15;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
        return z ^ (z >> 31);
    }
    size_t below(size_t n) { return static_cast<size_t>(bits() % n); }
    bool one_in(size_t n) { return below(n) == 0; }
    template <class T>
    auto& pick(T& items) {
        return items[below(items.size())];
    }

private:
    uint64_t state_;
};

// An integer or a float: a count, a length, a type, an offset, or something that the file is free to choose.
struct Field {
    size_t at;
    size_t width;
    bool free = false;  // a value of a key, the first letter of a text, a dimension: another one leaves the file whole
};

struct Entry {
    Bytes bytes;
    std::vector<Field> fields;
};

using Entries = std::vector<std::shared_ptr<const Entry>>;  // shared with the corpus until edited

struct Parts {
    uint32_t version;
    uint64_t alignment;
    Entries keys, tensors;
    Bytes data;
};

// Reads a valid file; the corpus is ours.
class Splitter {
public:
    explicit Splitter(const Bytes& file) : file_(file) {}

    Parts split() {
        Parts parts{};
        at_ = 4;
        parts.version = static_cast<uint32_t>(field(4));
        const uint64_t n_tensors = field(8);
        const uint64_t n_keys = field(8);
        for (uint64_t i = 0; i < n_keys; ++i) parts.keys.push_back(entry([&] { key(); }));
        for (uint64_t i = 0; i < n_tensors; ++i) parts.tensors.push_back(entry([&] { tensor(); }));
        parts.alignment = alignment_;
        const size_t data_start = (at_ + alignment_ - 1) / alignment_ * alignment_;
        if (data_start < file_.size())
            parts.data.assign(file_.begin() + static_cast<ptrdiff_t>(data_start), file_.end());
        return parts;
    }

private:
    uint64_t field(size_t width, bool free = false) {
        fields_.push_back({at_, width, free});
        uint64_t value = 0;
        expect(at_ + width <= file_.size(), "a file of the corpus is damaged");
        std::memcpy(&value, &file_[at_], width);
        at_ += width;
        return value;
    }

    std::string string() {
        const size_t length = field(8);
        expect(length <= file_.size() - at_, "a file of the corpus is damaged");
        if (length > 0) fields_.push_back({at_, 1, true});
        at_ += length;
        return {file_.begin() + static_cast<ptrdiff_t>(at_ - length), file_.begin() + static_cast<ptrdiff_t>(at_)};
    }

    uint64_t value(uint64_t type) {
        constexpr std::array<size_t, 13> kWidths{1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
        if (type == 8) return string().size();
        if (type != 9) return field(kWidths.at(type), true);
        const uint64_t item_type = field(4);
        const uint64_t length = field(8);
        for (uint64_t i = 0; i < length; ++i) value(item_type);
        return length;
    }

    void key() {
        const std::string name = string();
        const uint64_t number = value(field(4));
        if (name == "general.alignment") alignment_ = number;
    }

    void tensor() {
        string();
        const uint64_t rank = field(4);
        for (uint64_t i = 0; i < rank; ++i) field(8, true);
        field(4);
        field(8);
    }

    template <class Read>
    std::shared_ptr<const Entry> entry(Read read) {
        fields_.clear();
        const size_t start = at_;
        read();
        for (Field& f : fields_) f.at -= start;
        Bytes bytes(file_.begin() + static_cast<ptrdiff_t>(start), file_.begin() + static_cast<ptrdiff_t>(at_));
        return std::make_shared<const Entry>(Entry{std::move(bytes), fields_});
    }

    const Bytes& file_;
    size_t at_ = 0;
    uint64_t alignment_ = 32;
    std::vector<Field> fields_;
};

// --- Mutations
// --------------------------------------------------------------------------------------------------------

class Mutator {
public:
    Mutator(const std::vector<Parts>& corpus, uint64_t seed) : corpus_(corpus), random_(seed) {}

    // Few edits at a time: most files must stay good enough to get past the first check.
    Bytes file() {
        Parts parts = random_.pick(corpus_);
        const bool whole = random_.one_in(2);  // only edits that leave the file well-formed
        const size_t structure = random_.one_in(3) ? 1 + random_.below(3) : 0;
        for (size_t i = 0; i < structure; ++i) edit_entries(random_.one_in(2) ? parts.keys : parts.tensors);
        const size_t fields = random_.below(3);
        for (size_t i = 0; i < fields; ++i) edit_field(random_.one_in(2) ? parts.keys : parts.tensors, whole);
        Bytes bytes = join(parts);
        if (whole) return bytes;
        if (random_.one_in(8)) edit_header(bytes);
        if (random_.one_in(6)) edit_bytes(bytes);
        if (random_.one_in(10)) bytes.resize(random_.below(bytes.size() + 1));
        return bytes;
    }

private:
    // Removes, repeats, swaps or takes over whole keys or tensors, so that the file stays well-formed.
    void edit_entries(Entries& entries) {
        const auto& other = random_.pick(corpus_);
        const auto& foreign = random_.one_in(2) ? other.keys : other.tensors;
        const auto place = [&](size_t extra) {
            return entries.begin() + static_cast<ptrdiff_t>(random_.below(entries.size() + extra));
        };
        switch (random_.below(5)) {
            case 0:
                if (!entries.empty()) entries.erase(place(0));
                break;
            case 1:
                if (!entries.empty()) entries.insert(place(1), std::shared_ptr<const Entry>(*place(0)));
                break;
            case 2:
                if (!entries.empty()) std::swap(*place(0), *place(0));
                break;
            case 3:
                if (!foreign.empty()) entries.insert(place(1), random_.pick(foreign));
                break;
            case 4:
                if (!entries.empty() && !foreign.empty()) *place(0) = random_.pick(foreign);
                break;
        }
    }

    void edit_field(Entries& entries, bool only_free) {
        if (entries.empty()) return;
        auto& shared = random_.pick(entries);
        Entry entry = *shared;
        Field field = random_.pick(entry.fields);
        while (only_free && !field.free) field = random_.pick(entry.fields);  // an entry has a name, so there is one
        uint64_t value = 0;
        std::memcpy(&value, &entry.bytes[field.at], field.width);
        value = other_value(value, field.width, entry);
        std::memcpy(&entry.bytes[field.at], &value, field.width);
        shared = std::make_shared<const Entry>(std::move(entry));
    }

    void edit_header(Bytes& bytes) {
        constexpr std::array<Field, 4> kFields{{{0, 4}, {4, 4}, {8, 8}, {16, 8}}};
        const Field field = random_.pick(kFields);
        uint64_t value = 0;
        std::memcpy(&value, &bytes[field.at], field.width);
        value = other_value(value, field.width, {bytes, {}});
        std::memcpy(&bytes[field.at], &value, field.width);
    }

    uint64_t other_value(uint64_t value, size_t width, const Entry& entry) {
        constexpr std::array<uint64_t, 24> kEdges{0,
                                                  127,
                                                  128,
                                                  255,
                                                  32767,
                                                  32768,
                                                  65535,
                                                  65536,
                                                  65537,
                                                  1ULL << 24,
                                                  (1ULL << 24) + 1,
                                                  (1ULL << 31) - 1,
                                                  1ULL << 31,
                                                  (1ULL << 32) - 1,
                                                  1ULL << 32,
                                                  1ULL << 48,
                                                  1ULL << 60,
                                                  1ULL << 61,
                                                  1ULL << 62,
                                                  (1ULL << 63) - 1,
                                                  1ULL << 63,
                                                  ~0ULL,
                                                  -32ULL,
                                                  -64ULL};
        constexpr std::array<double, 10> kFloats{0.0,
                                                 -0.0,
                                                 -1.0,
                                                 1e-45,
                                                 1e38,
                                                 1e39,
                                                 1e308,
                                                 std::numeric_limits<double>::infinity(),
                                                 -std::numeric_limits<double>::infinity(),
                                                 std::numeric_limits<double>::quiet_NaN()};
        switch (random_.below(10)) {
            case 0: return random_.pick(kEdges);
            case 1: return random_.below(48);  // a type number, a rank, a small count
            case 2: return value + 1;
            case 3: return value - 1;
            case 4: return value * 2;
            case 5: return value / 2;
            case 6: return value ^ (1ULL << random_.below(8 * width));
            case 7: return entry.bytes.size() + random_.below(17) - 8;
            case 8: {
                const double number = random_.pick(kFloats);
                return width == 4 ? std::bit_cast<uint32_t>(static_cast<float>(number))
                                  : std::bit_cast<uint64_t>(number);
            }
            default: {  // what another field holds
                if (entry.fields.empty()) return random_.bits();
                const Field other = random_.pick(entry.fields);
                uint64_t copied = 0;
                std::memcpy(&copied, &entry.bytes[other.at], other.width);
                return copied;
            }
        }
    }

    // Without regard for what the bytes mean.
    void edit_bytes(Bytes& bytes) {
        const size_t begin = random_.below(bytes.size());
        const size_t length = 1 + random_.below(std::min<size_t>(bytes.size() - begin, random_.one_in(4) ? 4096 : 16));
        const auto first = bytes.begin() + static_cast<ptrdiff_t>(begin);
        const Bytes range(first, first + static_cast<ptrdiff_t>(length));
        switch (random_.below(5)) {
            case 0:
                for (size_t i = 0; i < length; ++i) bytes[begin + i] = static_cast<uint8_t>(random_.bits());
                break;
            case 1: bytes[begin] ^= static_cast<uint8_t>(1U << random_.below(8)); break;
            case 2: bytes.erase(first, first + static_cast<ptrdiff_t>(length)); break;
            case 3: bytes.insert(first, range.begin(), range.end()); break;
            case 4: {  // the rest of another file
                const Bytes other = join(random_.pick(corpus_));
                const size_t cut = random_.below(other.size());
                bytes.resize(begin);
                bytes.insert(bytes.end(), other.begin() + static_cast<ptrdiff_t>(cut), other.end());
                break;
            }
        }
    }

    static Bytes join(const Parts& parts) {
        Bytes bytes{'G', 'G', 'U', 'F'};
        const auto append = [&](const void* data, size_t size) {
            const auto* begin = static_cast<const uint8_t*>(data);
            bytes.insert(bytes.end(), begin, begin + size);
        };
        const uint64_t n_tensors = parts.tensors.size();
        const uint64_t n_keys = parts.keys.size();
        append(&parts.version, 4);
        append(&n_tensors, 8);
        append(&n_keys, 8);
        for (const auto& key : parts.keys) append(key->bytes.data(), key->bytes.size());
        for (const auto& tensor : parts.tensors) append(tensor->bytes.data(), tensor->bytes.size());
        bytes.resize((bytes.size() + parts.alignment - 1) / parts.alignment * parts.alignment);
        append(parts.data.data(), parts.data.size());
        return bytes;
    }

    const std::vector<Parts>& corpus_;
    Random random_;
};

// --- The run
// ------------------------------------------------------------------------------------------------------------

Bytes current;  // kept if the run ends with it

void keep_current() {
    std::ofstream("fuzz-failure.gguf", std::ios::binary)
        .write(reinterpret_cast<const char*>(current.data()), static_cast<std::streamsize>(current.size()));
    std::fprintf(stderr, "the input is in fuzz-failure.gguf\n");
}

void run_one(Bytes input) {
    current = std::move(input);
    // A block of exactly this size, so that AddressSanitizer sees the first byte too far.
    const auto exact = std::make_unique_for_overwrite<uint8_t[]>(current.size());
    std::ranges::copy(current, exact.get());
    LLVMFuzzerTestOneInput(exact.get(), current.size());
}

void run_folder(const std::filesystem::path& folder, size_t n_inputs) {
    std::vector<std::filesystem::path> paths;
    for (const auto& item : std::filesystem::directory_iterator(folder)) {
        if (item.path().extension() == ".gguf") paths.push_back(item.path());
    }
    std::ranges::sort(paths);
    expect(!paths.empty(), "no .gguf files in the folder");
    std::vector<Parts> corpus;
    for (const auto& path : paths) {
        const Bytes file = read_bytes(path);
        run_one(file);
        corpus.push_back(Splitter(file).split());
    }
    expect(counts.parsed == corpus.size(), "a file of the corpus was refused");
    expect(counts.opened == 3, "expected the corpus to hold one single file and one pair that open");

    std::clock_t slowest = 0;
    for (size_t i = 0; i < n_inputs; ++i) {
        Bytes input = Mutator(corpus, i).file();
        const std::clock_t start = std::clock();
        run_one(std::move(input));
        slowest = std::max(slowest, std::clock() - start);
    }
    std::printf("%zu inputs: %zu parsed, %zu opened, %zu kinds of refusal, slowest %.1f ms\n", n_inputs, counts.parsed,
                counts.opened, counts.refusals.size(), 1e3 * static_cast<double>(slowest) / CLOCKS_PER_SEC);
    if (std::getenv("FUZZ_VERBOSE") != nullptr) {
        for (const auto& [kind, count] : counts.refusals) std::printf("%8zu %s\n", count, kind.c_str());
    }
    expect(slowest < CLOCKS_PER_SEC, "an input took too long");
    if (n_inputs >= 2000) {
        expect(counts.parsed > n_inputs / 10 && counts.parsed < n_inputs * 9 / 10,
               "the mutations are too wild or too tame");
        expect(counts.refusals.size() >= 40, "the mutations reach too few checks");
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 2 || argc > 3) {
        std::fprintf(stderr, "usage: fuzz_gguf FOLDER [INPUTS] | fuzz_gguf FILE\n");
        return 2;
    }
    __sanitizer_set_death_callback(keep_current);
    try {
        if (std::filesystem::is_directory(argv[1])) {
            run_folder(argv[1], argc > 2 ? std::stoull(argv[2]) : 200'000);
        } else {
            run_one(read_bytes(argv[1]));
        }
    } catch (const std::exception& error) {
        std::fprintf(stderr, "fuzz_gguf: %s\n", error.what());
        keep_current();
        return 1;
    }
    return 0;
}

#endif  // YIVL_LIBFUZZER
