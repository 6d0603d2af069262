// The core's own exceptions, and how messages write numbers. The bindings map each exception to a Python exception
// of the same name, but AllocationError to MemoryError. The core throws the standard library's, too: for a bad argument
// std::invalid_argument, ValueError in Python.
#pragma once

#include <charconv>
#include <iterator>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace yivl {

// A model file that is damaged, incomplete or not a Yi-VL model: names file, tensor or key, expected and found.
struct ModelFileError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A picture that cannot be used: names what was expected and what was found.
struct ImageError : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

// A conversation that does not fit the context: raised before anything is computed.
struct ContextOverflowError : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

// A device that cannot be used, or that failed: names what is missing or what was being done.
struct DeviceError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Memory that cannot be had: names how much was needed, and on a device how much was free.
class AllocationError : public std::bad_alloc {
public:
    explicit AllocationError(std::string message) : message_(std::move(message)) {}
    const char* what() const noexcept override { return message_.c_str(); }

private:
    std::string message_;
};

// The caller asked for the work to end. The model and the session stay usable.
struct Cancelled : std::runtime_error {
    Cancelled() : std::runtime_error("cancelled") {}
};

// The fewest digits that give the number back, as a float where it is one.
inline std::string number_text(double number) {
    char digits[32];
    const auto written = [&](auto value) { return std::to_chars(digits, std::end(digits), value).ptr; };
    const auto narrow = static_cast<float>(number);
    return {digits, narrow == number ? written(narrow) : written(number)};
}

}  // namespace yivl
