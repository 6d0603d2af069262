// What the backend uses of the CUDA runtime, so that nothing else knows it: runtime.cpp calls the runtime itself, a
// test build has tests/cuda_emulator. Every function may be called from any thread; failures are DeviceErrors, too
// little memory an AllocationError.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>

namespace yivl::cuda {

struct DeviceInfo {
    std::string name;
    int capability;  // 10 * major + minor, e.g. 89
    int n_multiprocessors;
    int64_t total_bytes;
    int64_t free_bytes;
    bool emulated;  // for tests: correct, and slower than any CPU
};

// Throws DeviceError saying what is missing when there is none: the driver, a newer one, or a card.
int device_count();
DeviceInfo device_info(int device);

// Bytes on a device, aligned to 256, not initialised.
std::byte* allocate(int device, size_t bytes);
void release(int device, std::byte* memory) noexcept;

// What a kernel reads and writes of memory, and computes.
struct Work {
    int64_t bytes = 0;
    int64_t flop = 0;
};

class Profile;

// Work in order. Belongs to one caller at a time.
class Stream {
public:
    explicit Stream(int device);
    ~Stream();
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    int device() const { return device_; }
    void* handle() const { return handle_; }
    // Whether a kernel may begin while the one before is still at work (wait_for_earlier_kernels in device.h).
    bool overlaps_kernels() const { return overlaps_kernels_; }
    // Whether the card multiplies by four warps at once (multiply_async in device.h).
    bool has_warpgroups() const { return has_warpgroups_; }
    // Whether a step is recorded, and then started as one.
    bool records_steps() const { return records_steps_; }
    // Does without what the text names, of overlap, warpgroups and graph: to find which of them a fault comes with.
    void leave_out(std::string_view names) {
        const auto named = [names](std::string_view name) { return names.find(name) != std::string_view::npos; };
        if (named("overlap")) overlaps_kernels_ = false;
        if (named("warpgroups")) has_warpgroups_ = false;
        if (named("graph")) records_steps_ = false;
    }

    // Rows of `width` bytes that begin `pitch` bytes apart. The host's memory may be used again when a call returns,
    // and holds what was copied out.
    void copy_in(void* to, size_t to_pitch, const void* host, size_t host_pitch, size_t width, size_t rows);
    void copy_out(void* host, size_t host_pitch, const void* from, size_t from_pitch, size_t width, size_t rows);
    void copy(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows);

    // Waits until all work so far is done.
    void synchronize();

    // Where kernels are timed; null: nowhere.
    Profile* profile = nullptr;
    // Of the next kernel: for a profile.
    void expect(const Work& work) { work_ = work; }
    Work take_work() { return std::exchange(work_, {}); }

private:
    friend class Graph;
    int device_;
    void* handle_ = nullptr;
    bool overlaps_kernels_ = false, has_warpgroups_ = false, records_steps_ = true;
    Work work_;
};

// Work that is recorded once and then started again and again, at the cost of one launch.
class Graph {
public:
    explicit Graph(int device) : device_(device) {}
    ~Graph();
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;

    // What `work` starts on the stream is kept, not done. Meanwhile nothing may be allocated, awaited, or copied from
    // or to the host's memory.
    void record(Stream& stream, const std::function<void()>& work);
    void start(Stream& stream);

private:
    int device_;
    void* handle_ = nullptr;
};

// A place in a stream's work that can be waited for.
class Event {
public:
    enum Kind { untimed, timed };
    explicit Event(int device, Kind kind = untimed);
    ~Event();
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;

    void record(Stream& stream);
    // Returns at once if it was never recorded.
    void wait();

private:
    friend double seconds_between(Event& begin, Event& end);
    int device_;
    void* handle_ = nullptr;
};
// Of two timed ones that the device has passed.
double seconds_between(Event& begin, Event& end);

}  // namespace yivl::cuda
