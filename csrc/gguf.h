// GGUF, versions 2 and 3, little-endian: a memory-mapped, bounds-checked reader. A file from a stranger is hostile
// input: everything is checked against the real size of the file before use, and nothing is allocated that this size
// cannot justify.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "errors.h"
#include "quant_blocks.h"

namespace yivl {

// A regular file mapped read-only; unmapped when the last owner goes. Throws ModelFileError if that cannot be.
//
// The mapping follows the file: one that somebody cuts short while it is open makes the next read of a lost page raise
// SIGBUS, and one that is rewritten in place changes under the reader. Replace a model file by renaming a new one over
// it, as the converter does; the old mapping then stays whole.
class MappedFile {
public:
    explicit MappedFile(const std::string& path);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    std::span<const std::byte> bytes() const { return bytes_; }
    const std::string& path() const { return path_; }

private:
    std::string path_;
    std::span<const std::byte> bytes_;
};

// A metadata value. Unsigned integers of all widths are widened to uint64_t, signed ones to int64_t, floats to double.
// Strings are valid UTF-8 and point into the mapped file.
struct GgufArray;
using GgufValue = std::variant<uint64_t, int64_t, double, bool, std::string_view, GgufArray>;

// An array of scalars or strings; nested arrays are refused. Integers are widened to int64_t and an item that does not
// fit is refused; 64-bit floats are rounded to 32 bits and one out of range is refused.
struct GgufArray {
    std::variant<std::vector<int64_t>, std::vector<float>, std::vector<bool>, std::vector<std::string_view>> items;
    size_t size() const {
        return std::visit([](const auto& v) { return v.size(); }, items);
    }
};

struct GgufTensor {
    std::string_view name;
    WeightType type;
    std::vector<int64_t> shape;  // row-major order, outermost first: (rows, cols) of a matrix; 1 to 4 of them, >= 1
    std::span<const std::byte> data;  // exactly the bytes that type and shape need; begins on a multiple of 8
};

// Text from a file, fit for an error message: in quotes, control characters and invalid UTF-8 as \xNN, cut when long.
std::string quoted(std::string_view text);
// A tensor's shape for one, e.g. "(64, 32)".
std::string shape_text(std::span<const int64_t> shape);

class GgufFile {
public:
    // Throws ModelFileError naming the file and what is wrong.
    static std::shared_ptr<const GgufFile> open(const std::string& path);
    // The same parser over bytes in memory (fuzzing), which must outlive the result and begin on a multiple of 8;
    // `name` stands for the path in errors.
    static std::shared_ptr<const GgufFile> parse(std::span<const std::byte> bytes, std::string name);

    const std::string& path() const { return path_; }
    uint64_t file_size() const { return bytes_.size(); }
    std::span<const std::byte> bytes() const { return bytes_; }
    const std::map<std::string_view, GgufValue>& metadata() const { return metadata_; }
    const std::vector<GgufTensor>& tensors() const { return tensors_; }  // in file order

    bool has(std::string_view key) const { return metadata_.contains(key); }
    const GgufTensor* find_tensor(std::string_view name) const;  // null if absent

    // Typed look-ups: a missing key or one of another type throws ModelFileError naming file, key, expected and found.
    // An empty array is an array of any type.
    int64_t integer(std::string_view key) const;
    double number(std::string_view key) const;  // a float, or an integer
    bool boolean(std::string_view key) const;
    std::string_view string(std::string_view key) const;
    std::span<const std::string_view> strings(std::string_view key) const;
    std::span<const float> floats(std::string_view key) const;
    std::span<const int64_t> integers(std::string_view key) const;

    // ModelFileError("<path>: <what>"). Text from the file goes into `what` through quoted().
    [[noreturn]] void fail(const std::string& what) const;

private:
    const GgufValue* find_value(std::string_view key) const;
    [[noreturn]] void fail_key(std::string_view key, std::string_view expected, const GgufValue* found) const;
    template <class T>
    std::span<const T> array(std::string_view key, std::string_view expected) const;

    std::shared_ptr<const MappedFile> mapping_;  // null when parsed from memory
    std::string path_;
    std::span<const std::byte> bytes_;
    std::map<std::string_view, GgufValue> metadata_;
    std::vector<GgufTensor> tensors_;
    std::map<std::string_view, size_t> tensor_index_;

    friend class GgufParser;
};

}  // namespace yivl
