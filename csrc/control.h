// How a caller watches and stops long work: one Control per call into the core.
#pragma once

#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <string>
#include <thread>

#include "errors.h"

namespace yivl {

enum class Stage { load, image, prefill, decode };

const char* stage_name(Stage stage);

class Control {
public:
    // Called on the calling thread, never concurrently, with the fraction done in [0, 1].
    std::function<void(Stage, double)> on_progress;
    // Called on the calling thread every few tens of milliseconds; may throw to end the work (Ctrl-C in Python).
    std::function<void()> poll;
    // Called on the calling thread with what may be of interest when something is not as expected.
    std::function<void(const std::string&)> on_log;

    // From any thread.
    void cancel() { cancelled_.store(true, std::memory_order_relaxed); }
    bool cancelled() const { return cancelled_.load(std::memory_order_relaxed); }

    // On the calling thread, between pieces of work: throws Cancelled, or what poll throws.
    void check();
    // On any thread of the work, in the middle of a piece: whether to leave the rest. On the thread that last called
    // check() it polls, too; what poll throws comes from the next check().
    bool ends();
    void progress(Stage stage, double fraction) {
        if (on_progress) on_progress(stage, fraction);
    }
    void log(const std::string& message) {
        if (on_log) on_log(message);
    }

private:
    // All threads of the work read these all the time: what the caller's writes meanwhile is in another cache line.
    static constexpr size_t kLine = 64;
    alignas(kLine) std::atomic<bool> cancelled_{false};
    std::atomic<std::thread::id> caller_{};

    alignas(kLine) std::chrono::steady_clock::time_point last_poll_{};
    std::exception_ptr failure_;
    unsigned asked_ = 0;
};

}  // namespace yivl
