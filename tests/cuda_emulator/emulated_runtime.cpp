// csrc/cuda/runtime.h without a card. Device memory is memory of the process that nobody may touch but kernels and
// copies: elsewhere it is protected, so that code of the host that takes a device's pointer for its own stops at once.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "cuda/device.h"
#include "cuda/runtime.h"
#include "emulated_memory.h"
#include "emulated_stream.h"
#include "errors.h"

namespace yivl::cuda {

namespace {

constexpr int kPoison = 0xff;   // float32, half and bfloat16 read as not a number
constexpr size_t kFence = 256;  // bytes of poison after each allocation, and the alignment of all
constexpr size_t kTotal = size_t{8} << 30;

// The size of the card: YIVL_EMULATOR_MEMORY in bytes, asked again every time so that a test can change it.
size_t total_bytes() {
    const char* text = std::getenv("YIVL_EMULATOR_MEMORY");
    return text == nullptr ? kTotal : std::min<size_t>(std::strtoull(text, nullptr, 10), kTotal);
}

// What a test asks to fail with YIVL_EMULATOR_FAIL: "allocation:N" or "launch:N", the N-th after the variable was set.
// A failed launch loses the device, until the variable is something else.
class Failures {
public:
    // One more of this kind; whether it is to fail.
    bool strikes(std::string_view kind) {
        const std::lock_guard lock(mutex_);
        read();
        if (kind != kind_ || ++count_ != wanted_) return false;
        lost_ = kind == "launch";
        return true;
    }
    bool lost() {
        const std::lock_guard lock(mutex_);
        read();
        return lost_;
    }

private:
    void read() {
        const char* value = std::getenv("YIVL_EMULATOR_FAIL");
        const std::string text = value == nullptr ? "" : value;
        if (text == text_) return;
        text_ = text;
        const size_t colon = text_.find(':');
        kind_ = text_.substr(0, colon);
        wanted_ = colon == std::string::npos ? 0 : std::atoi(&text_[colon + 1]);
        count_ = 0;
        lost_ = false;
    }

    std::mutex mutex_;
    std::string text_, kind_;
    int wanted_ = 0, count_ = 0;
    bool lost_ = false;
};

Failures& failures() {
    static Failures& failures = *new Failures;
    return failures;
}

void require_device(const char* what) {
    if (failures().lost()) throw DeviceError("CUDA: " + std::string(what) + ": the emulated device is lost");
}

class DeviceHeap {
public:
    DeviceHeap() {
        void* memory = mmap(nullptr, kTotal, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        base_ = static_cast<std::byte*>(memory);
        madvise(base_, kTotal, MADV_HUGEPAGE);  // fewer pages to protect
        free_.emplace(base_, kTotal);
    }

    std::byte* allocate(size_t bytes) {
        const size_t needed = with_fence(bytes);
        const emulator::DeviceAccess access;
        const std::lock_guard lock(mutex_);
        const auto range = std::ranges::find_if(free_, [&](const auto& r) { return r.second >= needed; });
        if (range == free_.end() || needed > free_bytes_locked() || failures().strikes("allocation")) {
            throw AllocationError("emulated device: cannot allocate " + std::to_string(bytes) + " bytes, " +
                                  std::to_string(free_bytes_locked()) + " of " + std::to_string(total_bytes()) +
                                  " are free");
        }
        const auto [begin, size] = *range;
        free_.erase(range);
        if (size > needed) free_.emplace(begin + needed, size - needed);
        used_.emplace(begin, bytes);
        std::memset(begin, kPoison, needed);
        return begin;
    }

    // Whether the fence after the bytes was whole.
    bool release(std::byte* memory) {
        const emulator::DeviceAccess access;
        const std::lock_guard lock(mutex_);
        const auto allocation = used_.find(memory);
        const size_t bytes = allocation->second;
        const size_t needed = with_fence(bytes);
        const bool whole =
            std::all_of(memory + bytes, memory + needed, [](std::byte b) { return b == std::byte{kPoison}; });
        used_.erase(allocation);
        auto range = free_.emplace(memory, needed).first;
        if (const auto next = std::next(range); next != free_.end() && range->first + range->second == next->first) {
            range->second += next->second;
            free_.erase(next);
        }
        if (range != free_.begin()) {
            const auto before = std::prev(range);
            if (before->first + before->second == range->first) {
                before->second += range->second;
                free_.erase(range);
            }
        }
        return whole;
    }

    bool holds(const void* address) const {
        const auto* byte = static_cast<const std::byte*>(address);
        return byte >= base_ && byte < base_ + kTotal;
    }

    size_t free_bytes() {
        const std::lock_guard lock(mutex_);
        return free_bytes_locked();
    }

    void enter() {
        const std::lock_guard lock(access_mutex_);
        if (inside_++ == 0) mprotect(base_, kTotal, PROT_READ | PROT_WRITE);
    }
    void leave() {
        const std::lock_guard lock(access_mutex_);
        if (--inside_ == 0) mprotect(base_, kTotal, PROT_NONE);
    }

private:
    static size_t with_fence(size_t bytes) { return (bytes + 2 * kFence - 1) / kFence * kFence; }
    size_t free_bytes_locked() const {
        size_t used = kTotal;
        for (const auto& [begin, size] : free_) used -= size;
        return total_bytes() > used ? total_bytes() - used : 0;
    }

    std::byte* base_;
    std::mutex mutex_;
    std::map<std::byte*, size_t> free_, used_;
    std::mutex access_mutex_;
    int inside_ = 0;
};

DeviceHeap& heap() {
    static DeviceHeap& heap = *new DeviceHeap;
    return heap;
}

emulator::Queue& queue_of(const Stream& stream) { return *static_cast<emulator::Queue*>(stream.handle()); }

// What a card cannot do, either, while it records.
void require_not_recording(const Stream& stream, const char* what) {
    if (queue_of(stream).recording != nullptr) {
        throw DeviceError("CUDA: " + std::string(what) + " while work is recorded");
    }
}

// All work so far is done.
void finish(emulator::Queue& queue, const char* what) {
    if (failures().lost()) queue.drop();
    require_device(what);
    queue.finish();
}

void copy_rows(emulator::Queue& queue, void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
               size_t rows) {
    finish(queue, "copying");
    const emulator::DeviceAccess access;
    for (size_t i = 0; i < rows; ++i) {
        std::memcpy(static_cast<std::byte*>(to) + i * to_pitch, static_cast<const std::byte*>(from) + i * from_pitch,
                    width);
    }
}

}  // namespace

int emulator::capability() {
    const char* text = std::getenv("YIVL_EMULATOR_CAPABILITY");
    return text == nullptr ? 80 : std::atoi(text);
}

emulator::DeviceAccess::DeviceAccess() { heap().enter(); }
emulator::DeviceAccess::~DeviceAccess() { heap().leave(); }

void emulator::check_address(const char* kernel, const void* address) {
    if (address == nullptr || heap().holds(address)) return;
    throw DeviceError("kernel " + std::string(kernel) + ": expected an address of the device, found one of the host");
}

void emulator::fail_launch_if_asked(const char* kernel) {
    failures().strikes("launch");
    require_device(kernel);
}

int device_count() { return 1; }

DeviceInfo device_info(int device) {
    if (device != 0) throw DeviceError("CUDA: expected a device from 0 to 0, found " + std::to_string(device));
    require_device("asking for free memory");
    return {"emulated device",
            emulator::capability(),
            2,
            static_cast<int64_t>(total_bytes()),
            static_cast<int64_t>(heap().free_bytes()),
            true};
}

std::byte* allocate(int, size_t bytes) {
    require_device("allocating memory");
    return heap().allocate(bytes);
}

void release(int, std::byte* memory) noexcept {
    if (!heap().release(memory)) {
        // Nobody to report to: a destructor may have called.
        std::fputs("emulated device: a kernel wrote past the end of device memory\n", stderr);
        std::abort();
    }
}

Stream::Stream(int device) : device_(device), overlaps_kernels_(true), has_warpgroups_(emulator::capability() == 90) {
    require_device("making a stream");
    handle_ = new emulator::Queue;
}
Stream::~Stream() { delete static_cast<emulator::Queue*>(handle_); }
void Stream::copy_in(void* to, size_t to_pitch, const void* host, size_t host_pitch, size_t width, size_t rows) {
    require_not_recording(*this, "copying from the host");
    copy_rows(queue_of(*this), to, to_pitch, host, host_pitch, width, rows);
}
void Stream::copy_out(void* host, size_t host_pitch, const void* from, size_t from_pitch, size_t width, size_t rows) {
    require_not_recording(*this, "copying to the host");
    copy_rows(queue_of(*this), host, host_pitch, from, from_pitch, width, rows);
}
void Stream::copy(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows) {
    emulator::Queue& queue = queue_of(*this);
    if (queue.recording == nullptr) return copy_rows(queue, to, to_pitch, from, from_pitch, width, rows);
    queue.recording->push_back(
        [=](emulator::Queue& later) { copy_rows(later, to, to_pitch, from, from_pitch, width, rows); });
}
void Stream::synchronize() {
    require_not_recording(*this, "waiting");
    finish(queue_of(*this), "waiting for the device");
}

Graph::~Graph() { delete static_cast<emulator::Queue::Recording*>(handle_); }
void Graph::record(Stream& stream, const std::function<void()>& work) {
    auto recording = std::make_unique<emulator::Queue::Recording>();
    emulator::Queue& queue = queue_of(stream);
    queue.recording = recording.get();
    try {
        work();
    } catch (...) {
        queue.recording = nullptr;
        throw;
    }
    queue.recording = nullptr;
    handle_ = recording.release();
}
void Graph::start(Stream& stream) {
    require_not_recording(stream, "starting recorded work");
    for (const auto& work : *static_cast<emulator::Queue::Recording*>(handle_)) work(queue_of(stream));
}

using Time = std::chrono::steady_clock::time_point;

Event::Event(int device, Kind) : device_(device), handle_(new Time) {}
Event::~Event() { delete static_cast<Time*>(handle_); }
void Event::record(Stream& stream) {
    finish(queue_of(stream), "recording an event");
    *static_cast<Time*>(handle_) = std::chrono::steady_clock::now();
}
void Event::wait() {}
double seconds_between(Event& begin, Event& end) {
    return std::chrono::duration<double>(*static_cast<Time*>(end.handle_) - *static_cast<Time*>(begin.handle_)).count();
}

}  // namespace yivl::cuda
