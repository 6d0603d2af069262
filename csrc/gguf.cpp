#include "gguf.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>
#include <system_error>
#include <type_traits>
#include <utility>

#include "utf8.h"

namespace yivl {

static_assert(std::endian::native == std::endian::little, "GGUF values are read as they lie in the file");

namespace {

// The format's own limits on keys and tensor names.
constexpr uint64_t kMaxKeyBytes = 65535;
constexpr uint64_t kMaxNameBytes = 64;
constexpr uint32_t kMaxDims = 4;
constexpr uint64_t kDefaultAlignment = 32;
// Weights are read where they lie, so data must at least suit a 64-bit load.
constexpr uint64_t kMinAlignment = 8;

// Ours. An entry takes several times its bytes in memory (an 8-bit array item eight times), so a file of many gigabytes
// could justify more than the machine has. No model comes near these numbers.
constexpr uint64_t kMaxKeys = 1 << 16;
constexpr uint64_t kMaxTensors = 1 << 16;
constexpr uint64_t kMaxStringBytes = 1 << 26;
constexpr uint64_t kMaxArrayItems = 1 << 24;  // of all arrays of a file together

// The fewest bytes that an entry can take.
constexpr uint64_t kMinKeyBytes = 8 + 1 + 4 + 1;             // key length, key, type, value
constexpr uint64_t kMinTensorBytes = 8 + 1 + 4 + 8 + 4 + 8;  // name length, name, rank, one dimension, type, offset

enum class ValueType : uint32_t {
    u8 = 0,
    i8 = 1,
    u16 = 2,
    i16 = 3,
    u32 = 4,
    i32 = 5,
    f32 = 6,
    boolean = 7,
    string = 8,
    array = 9,
    u64 = 10,
    i64 = 11,
    f64 = 12,
};

std::string system_message(int error) { return std::generic_category().message(error); }

// Error messages must be valid UTF-8 whatever is in the file or its name: Python refuses others.
std::string printable(std::string_view text) {
    constexpr char kHex[] = "0123456789abcdef";
    std::string out;
    while (!text.empty()) {
        const Utf8Step step = utf8_step(text);
        for (const char c : text.substr(0, step.length)) {
            const auto byte = static_cast<uint8_t>(c);
            if (step.kind == Utf8Step::valid && byte >= 0x20 && byte != 0x7F) {
                out += c;
            } else {
                out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
            }
        }
        text.remove_prefix(step.length);
    }
    return out;
}

[[noreturn]] void fail_file(const std::string& path, const std::string& what) {
    throw ModelFileError((path.empty() ? "''" : printable(path)) + ": " + what);
}

std::string readable_types() {
    std::string out;
    for (uint32_t number = 0; number < 256; ++number) {
        if (const TypeInfo* info = find_type(number)) out.append(out.empty() ? "" : ", ").append(info->name);
    }
    return out;
}

// False if the product does not fit.
bool multiply(uint64_t a, uint64_t b, uint64_t* product) {
    if (b != 0 && a > std::numeric_limits<uint64_t>::max() / b) return false;
    *product = a * b;
    return true;
}

std::string describe(const GgufValue& value) {
    if (std::holds_alternative<std::string_view>(value)) return "a string";
    if (std::holds_alternative<bool>(value)) return "a bool";
    if (std::holds_alternative<double>(value)) return "a float";
    if (const auto* array = std::get_if<GgufArray>(&value)) {
        constexpr const char* kItems[] = {"integers", "floats", "bools", "strings"};
        return "an array of " + std::to_string(array->size()) + " " + kItems[array->items.index()];
    }
    return "an integer";
}

}  // namespace

std::string quoted(std::string_view text) {
    constexpr size_t kLongest = 100;
    if (text.size() <= kLongest) return "'" + printable(text) + "'";
    size_t end = kLongest;
    while (end > 0 && (static_cast<uint8_t>(text[end]) & 0xC0) == 0x80) --end;  // not inside a UTF-8 sequence
    return "'" + printable(text.substr(0, end)) + "...'";
}

std::string shape_text(std::span<const int64_t> shape) {
    std::string out = "(";
    for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
    return out + ")";
}

MappedFile::MappedFile(const std::string& path) : path_(path) {
    struct Descriptor {
        int fd;
        ~Descriptor() {
            if (fd >= 0) ::close(fd);
        }
    };
    // Without O_NONBLOCK a named pipe would wait for a writer.
    if (path.find('\0') != std::string::npos) fail_file(path, "expected a path, found one with a null character");
    const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
    if (file.fd < 0) fail_file(path, "cannot open: " + system_message(errno));
    struct stat status{};
    if (::fstat(file.fd, &status) != 0) fail_file(path, "cannot open: " + system_message(errno));
    if (S_ISDIR(status.st_mode)) fail_file(path, "expected a GGUF file, found a directory");
    if (!S_ISREG(status.st_mode)) fail_file(path, "expected a GGUF file, found something that is no regular file");
    if (status.st_size == 0) fail_file(path, "expected a GGUF file, found an empty file");
    if (static_cast<uint64_t>(status.st_size) > std::numeric_limits<size_t>::max()) {
        fail_file(path, "the file is larger than this machine can address");
    }
    const auto size = static_cast<size_t>(status.st_size);
    void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.fd, 0);
    if (data == MAP_FAILED) fail_file(path, "cannot map into memory: " + system_message(errno));
#if defined(__linux__)
    // What is not in the page cache then comes from the disk 2 MB at a time and is mapped so: with small pages every
    // walk through the weights waits for addresses. Only a hint.
    ::madvise(data, size, MADV_HUGEPAGE);
#endif
    bytes_ = {static_cast<const std::byte*>(data), size};
}

MappedFile::~MappedFile() { ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size()); }

// Walks the header once, front to back.
class GgufParser {
public:
    explicit GgufParser(GgufFile& file) : file_(file), bytes_(file.bytes_) {}

    void parse() {
        read_header();
        for (uint64_t i = 0; i < n_keys_; ++i) read_key_value(i);
        read_alignment();
        file_.tensors_.reserve(n_tensors_);
        offsets_.reserve(n_tensors_);
        for (uint64_t i = 0; i < n_tensors_; ++i) read_tensor(i);
        place_tensors();
    }

private:
    [[noreturn]] void fail(std::string_view subject, const std::string& expected, const std::string& found) const {
        file_.fail(std::string(subject) + ": expected " + expected + ", found " + found);
    }

    uint64_t left() const { return bytes_.size() - pos_; }

    void need(uint64_t n, std::string_view subject) const {
        if (n > left()) {
            fail(subject, std::to_string(n) + " bytes at offset " + std::to_string(pos_),
                 std::to_string(left()) + ": the file is truncated or damaged");
        }
    }

    template <class T>
    T read(std::string_view subject) {
        static_assert(std::is_arithmetic_v<T> && !std::is_same_v<T, bool>);
        need(sizeof(T), subject);
        T value;
        std::memcpy(&value, bytes_.data() + pos_, sizeof(T));
        pos_ += sizeof(T);
        return value;
    }

    bool read_bool(std::string_view subject) {
        const auto value = read<uint8_t>(subject);
        if (value > 1) fail(subject, "a bool of 0 or 1", std::to_string(value));
        return value == 1;
    }

    std::string_view read_string(std::string_view subject) {
        const auto length = read<uint64_t>(subject);
        if (length > kMaxStringBytes) {
            fail(subject, "a string of at most " + std::to_string(kMaxStringBytes) + " bytes", std::to_string(length));
        }
        need(length, subject);
        const std::string_view text(reinterpret_cast<const char*>(bytes_.data()) + pos_, static_cast<size_t>(length));
        if (find_invalid_utf8(text) != std::string_view::npos) fail(subject, "UTF-8 text", quoted(text));
        pos_ += static_cast<size_t>(length);
        return text;
    }

    std::string_view read_name(const std::string& subject, uint64_t longest) {
        const std::string_view name = read_string(subject);
        if (name.empty() || name.size() > longest) {
            fail(subject, "a name of 1 to " + std::to_string(longest) + " bytes",
                 std::to_string(name.size()) + " bytes");
        }
        return name;
    }

    uint64_t read_count(const std::string& subject, uint64_t most, uint64_t bytes_each) {
        const auto count = read<uint64_t>(subject);
        if (count > most) fail(subject, "at most " + std::to_string(most), std::to_string(count));
        if (count > left() / bytes_each) {
            fail(subject, "at most " + std::to_string(left() / bytes_each) + ", which fit the rest of the file",
                 std::to_string(count) + ": the file is truncated or damaged");
        }
        return count;
    }

    void read_header() {
        need(4, "header");
        if (std::memcmp(bytes_.data(), "GGUF", 4) != 0) {
            fail("header", "the letters GGUF",
                 quoted({reinterpret_cast<const char*>(bytes_.data()), 4}) + ": this is no GGUF file");
        }
        pos_ = 4;
        const auto version = read<uint32_t>("version");
        if (version != 0 && (version & 0xFFFF) == 0) {
            fail("version", "a little-endian file", "a big-endian one; convert the model on this machine");
        }
        if (version != 2 && version != 3) {
            fail("version", "GGUF version 2 or 3",
                 "version " + std::to_string(version) + (version == 1 ? "; convert the model again" : ""));
        }
        n_tensors_ = read_count("number of tensors", kMaxTensors, kMinTensorBytes);
        n_keys_ = read_count("number of metadata keys", kMaxKeys, kMinKeyBytes);
    }

    void read_key_value(uint64_t i) {
        const std::string_view key = read_name("metadata key " + std::to_string(i), kMaxKeyBytes);
        const std::string subject = "key " + quoted(key);
        if (file_.metadata_.contains(key)) fail(subject, "one key of this name", "a second");
        const auto type = static_cast<ValueType>(read<uint32_t>(subject));
        file_.metadata_.emplace(key,
                                type == ValueType::array ? GgufValue(read_array(subject)) : read_scalar(type, subject));
    }

    GgufValue read_scalar(ValueType type, const std::string& subject) {
        switch (type) {
            case ValueType::u8: return uint64_t{read<uint8_t>(subject)};
            case ValueType::u16: return uint64_t{read<uint16_t>(subject)};
            case ValueType::u32: return uint64_t{read<uint32_t>(subject)};
            case ValueType::u64: return read<uint64_t>(subject);
            case ValueType::i8: return int64_t{read<int8_t>(subject)};
            case ValueType::i16: return int64_t{read<int16_t>(subject)};
            case ValueType::i32: return int64_t{read<int32_t>(subject)};
            case ValueType::i64: return read<int64_t>(subject);
            case ValueType::f32: return double{read<float>(subject)};
            case ValueType::f64: return read<double>(subject);
            case ValueType::boolean: return read_bool(subject);
            case ValueType::string: return read_string(subject);
            case ValueType::array: break;
        }
        fail_value_type(type, subject);
    }

    [[noreturn]] void fail_value_type(ValueType type, const std::string& subject) const {
        fail(subject, "a value type from 0 to 12", std::to_string(static_cast<uint32_t>(type)));
    }

    GgufArray read_array(const std::string& subject) {
        const auto type = static_cast<ValueType>(read<uint32_t>(subject));
        switch (type) {
            case ValueType::u8: return read_integers<uint8_t>(subject);
            case ValueType::u16: return read_integers<uint16_t>(subject);
            case ValueType::u32: return read_integers<uint32_t>(subject);
            case ValueType::u64: return read_integers<uint64_t>(subject);
            case ValueType::i8: return read_integers<int8_t>(subject);
            case ValueType::i16: return read_integers<int16_t>(subject);
            case ValueType::i32: return read_integers<int32_t>(subject);
            case ValueType::i64: return read_integers<int64_t>(subject);
            case ValueType::f32: return read_items<float>(subject, 4, [&] { return read<float>(subject); });
            case ValueType::f64: return read_items<float>(subject, 8, [&] { return read_narrowed(subject); });
            case ValueType::boolean: return read_items<bool>(subject, 1, [&] { return read_bool(subject); });
            case ValueType::string:
                return read_items<std::string_view>(subject, 8, [&] { return read_string(subject); });
            case ValueType::array: fail(subject, "an array of scalars or strings", "an array of arrays");
        }
        fail_value_type(type, subject);
    }

    template <class Item>
    GgufArray read_items(const std::string& subject, uint64_t bytes_each, auto read_item) {
        const uint64_t count = read_count(subject + ": array length", array_items_left_, bytes_each);
        array_items_left_ -= count;
        std::vector<Item> items;
        items.reserve(static_cast<size_t>(count));
        for (uint64_t i = 0; i < count; ++i) items.push_back(read_item());
        return {std::move(items)};
    }

    template <class T>
    GgufArray read_integers(const std::string& subject) {
        return read_items<int64_t>(subject, sizeof(T), [&] {
            const auto value = read<T>(subject);
            if (!std::in_range<int64_t>(value)) {
                fail(subject, "integers below 2^63", std::to_string(value));
            }
            return static_cast<int64_t>(value);
        });
    }

    float read_narrowed(const std::string& subject) {
        const auto value = read<double>(subject);
        if (std::isfinite(value) && std::abs(value) > std::numeric_limits<float>::max()) {
            fail(subject, "floats in the range of 32 bits", number_text(value));
        }
        return static_cast<float>(value);
    }

    void read_alignment() {
        constexpr std::string_view kKey = "general.alignment";
        if (!file_.has(kKey)) return;
        const int64_t value = file_.integer(kKey);
        if (value < static_cast<int64_t>(kMinAlignment) || !std::has_single_bit(static_cast<uint64_t>(value))) {
            fail("key 'general.alignment'", "a power of two from " + std::to_string(kMinAlignment),
                 std::to_string(value));
        }
        alignment_ = static_cast<uint64_t>(value);
    }

    void read_tensor(uint64_t i) {
        const std::string_view name = read_name("name of tensor " + std::to_string(i), kMaxNameBytes);
        const std::string subject = "tensor " + quoted(name);
        if (!file_.tensor_index_.emplace(name, file_.tensors_.size()).second) {
            fail(subject, "one tensor of this name", "a second");
        }
        std::vector<int64_t> shape = read_shape(subject);
        const auto number = read<uint32_t>(subject);
        const TypeInfo* type = find_type(number);
        if (type == nullptr) {
            fail(subject, "a weight type of " + readable_types(), "type number " + std::to_string(number));
        }
        const uint64_t size = tensor_bytes(*type, shape, subject);
        offsets_.push_back(read<uint64_t>(subject));
        // The span gets its address when the end of the header, and with it the data, is known.
        file_.tensors_.push_back({name, type->type, std::move(shape), bytes_.first(static_cast<size_t>(size))});
    }

    // The file has the innermost dimension first.
    std::vector<int64_t> read_shape(const std::string& subject) {
        const auto n_dims = read<uint32_t>(subject);
        if (n_dims < 1 || n_dims > kMaxDims) {
            fail(subject, "1 to " + std::to_string(kMaxDims) + " dimensions", std::to_string(n_dims));
        }
        std::vector<int64_t> shape(n_dims);
        for (size_t i = n_dims; i-- > 0;) {
            const auto dim = read<uint64_t>(subject);
            if (dim < 1 || !std::in_range<int64_t>(dim)) {
                fail(subject, "dimensions from 1 to 2^63 - 1", std::to_string(dim));
            }
            shape[i] = static_cast<int64_t>(dim);
        }
        return shape;
    }

    // The size of a tensor's data, at most the file's.
    uint64_t tensor_bytes(const TypeInfo& type, std::span<const int64_t> shape, const std::string& subject) const {
        const int64_t cols = shape.back();
        if (cols % type.block != 0) {
            fail(subject, "rows of a multiple of " + std::to_string(type.block) + " for " + std::string(type.name),
                 "shape " + shape_text(shape));
        }
        uint64_t size = 0;
        bool fits = multiply(static_cast<uint64_t>(cols / type.block), static_cast<uint64_t>(type.bytes), &size);
        for (const int64_t dim : shape.first(shape.size() - 1)) {
            fits = fits && multiply(size, static_cast<uint64_t>(dim), &size);
        }
        if (!fits || size > bytes_.size()) {
            fail(subject, "data that fit a file of " + std::to_string(bytes_.size()) + " bytes",
                 (fits ? std::to_string(size) : "more than 2^64") + " bytes of " + std::string(type.name) + " " +
                     shape_text(shape) + ": the file is truncated or damaged");
        }
        return size;
    }

    void place_tensors() {
        if (file_.tensors_.empty()) return;
        // pos_ is below 2^63 and alignment_ at most 2^62: no overflow.
        const uint64_t data_start = (uint64_t{pos_} + alignment_ - 1) & ~(alignment_ - 1);
        const uint64_t data_size = data_start <= bytes_.size() ? bytes_.size() - data_start : 0;
        std::vector<size_t> order(file_.tensors_.size());
        for (size_t i = 0; i < order.size(); ++i) {
            order[i] = i;
            GgufTensor& tensor = file_.tensors_[i];
            const std::string subject = "tensor " + quoted(tensor.name);
            const uint64_t offset = offsets_[i];
            if (offset % alignment_ != 0) {
                fail(subject, "an offset that is a multiple of " + std::to_string(alignment_), std::to_string(offset));
            }
            if (offset > data_size || tensor.data.size() > data_size - offset) {
                fail(subject,
                     std::to_string(tensor.data.size()) + " bytes at offset " + std::to_string(offset) + " of the data",
                     std::to_string(data_size) + " bytes of data: the file is truncated or damaged");
            }
            tensor.data = bytes_.subspan(static_cast<size_t>(data_start + offset), tensor.data.size());
        }
        std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return offsets_[a] < offsets_[b]; });
        for (size_t i = 1; i < order.size(); ++i) {
            const GgufTensor& before = file_.tensors_[order[i - 1]];
            const uint64_t end = offsets_[order[i - 1]] + before.data.size();
            if (offsets_[order[i]] < end) {
                fail("tensor " + quoted(file_.tensors_[order[i]].name),
                     "data after those of tensor " + quoted(before.name) + ", which end at " + std::to_string(end),
                     "offset " + std::to_string(offsets_[order[i]]) + ": they overlap");
            }
        }
    }

    GgufFile& file_;
    std::span<const std::byte> bytes_;
    size_t pos_ = 0;
    uint64_t n_tensors_ = 0;
    uint64_t n_keys_ = 0;
    uint64_t alignment_ = kDefaultAlignment;
    uint64_t array_items_left_ = kMaxArrayItems;
    std::vector<uint64_t> offsets_;  // of each tensor, from the start of the data
};

std::shared_ptr<const GgufFile> GgufFile::open(const std::string& path) {
    const auto mapping = std::make_shared<const MappedFile>(path);
    const auto file = std::make_shared<GgufFile>();
    file->mapping_ = mapping;
    file->path_ = path;
    file->bytes_ = mapping->bytes();
    GgufParser(*file).parse();
    return file;
}

std::shared_ptr<const GgufFile> GgufFile::parse(std::span<const std::byte> bytes, std::string name) {
    const auto file = std::make_shared<GgufFile>();
    file->path_ = std::move(name);
    file->bytes_ = bytes;
    GgufParser(*file).parse();
    return file;
}

const GgufTensor* GgufFile::find_tensor(std::string_view name) const {
    const auto found = tensor_index_.find(name);
    return found == tensor_index_.end() ? nullptr : &tensors_[found->second];
}

void GgufFile::fail(const std::string& what) const { fail_file(path_, what); }

const GgufValue* GgufFile::find_value(std::string_view key) const {
    const auto found = metadata_.find(key);
    return found == metadata_.end() ? nullptr : &found->second;
}

void GgufFile::fail_key(std::string_view key, std::string_view expected, const GgufValue* found) const {
    fail("key " + quoted(key) + ": expected " + std::string(expected) + ", found " +
         (found == nullptr ? "no such key" : describe(*found)));
}

int64_t GgufFile::integer(std::string_view key) const {
    const GgufValue* value = find_value(key);
    if (value != nullptr) {
        if (const auto* i = std::get_if<int64_t>(value)) return *i;
        if (const auto* u = std::get_if<uint64_t>(value)) {
            if (std::in_range<int64_t>(*u)) return static_cast<int64_t>(*u);
            fail("key " + quoted(key) + ": expected an integer below 2^63, found " + std::to_string(*u));
        }
    }
    fail_key(key, "an integer", value);
}

double GgufFile::number(std::string_view key) const {
    const GgufValue* value = find_value(key);
    if (value != nullptr) {
        if (const auto* d = std::get_if<double>(value)) return *d;
        if (const auto* i = std::get_if<int64_t>(value)) return static_cast<double>(*i);
        if (const auto* u = std::get_if<uint64_t>(value)) return static_cast<double>(*u);
    }
    fail_key(key, "a number", value);
}

bool GgufFile::boolean(std::string_view key) const {
    const GgufValue* value = find_value(key);
    if (value != nullptr) {
        if (const auto* b = std::get_if<bool>(value)) return *b;
    }
    fail_key(key, "a bool", value);
}

std::string_view GgufFile::string(std::string_view key) const {
    const GgufValue* value = find_value(key);
    if (value != nullptr) {
        if (const auto* s = std::get_if<std::string_view>(value)) return *s;
    }
    fail_key(key, "a string", value);
}

template <class T>
std::span<const T> GgufFile::array(std::string_view key, std::string_view expected) const {
    const GgufValue* value = find_value(key);
    if (value != nullptr) {
        if (const auto* array = std::get_if<GgufArray>(value)) {
            if (const auto* items = std::get_if<std::vector<T>>(&array->items)) return *items;
            if (array->size() == 0) return {};
        }
    }
    fail_key(key, expected, value);
}

std::span<const std::string_view> GgufFile::strings(std::string_view key) const {
    return array<std::string_view>(key, "an array of strings");
}

std::span<const float> GgufFile::floats(std::string_view key) const { return array<float>(key, "an array of floats"); }

std::span<const int64_t> GgufFile::integers(std::string_view key) const {
    return array<int64_t>(key, "an array of integers");
}

}  // namespace yivl
