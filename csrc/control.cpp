#include "control.h"

#include <utility>

namespace yivl {

const char* stage_name(Stage stage) {
    switch (stage) {
        case Stage::load: return "load";
        case Stage::image: return "image";
        case Stage::prefill: return "prefill";
        case Stage::decode: return "decode";
    }
    return "unknown";
}

void Control::check() {
    if (const auto caller = std::this_thread::get_id(); caller_.load(std::memory_order_relaxed) != caller) {
        caller_.store(caller, std::memory_order_relaxed);
    }
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
    if (cancelled()) throw Cancelled();
    if (!poll) return;
    // Taking Python's GIL costs microseconds; a person cannot tell 20 ms from at once.
    const auto now = std::chrono::steady_clock::now();
    if (now - last_poll_ < std::chrono::milliseconds(20)) return;
    last_poll_ = now;
    poll();
    if (cancelled()) throw Cancelled();
}

bool Control::ends() {
    // The clock takes as long as some of the steps between which kernels ask.
    constexpr int kAskedBetween = 16;
    if (!cancelled() && caller_.load(std::memory_order_relaxed) == std::this_thread::get_id() &&
        ++asked_ % kAskedBetween == 0) {
        try {
            check();
        } catch (const Cancelled&) {
        } catch (...) {
            failure_ = std::current_exception();
            cancel();
        }
    }
    return cancelled();
}

}  // namespace yivl
