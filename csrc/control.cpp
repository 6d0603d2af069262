#include "control.h"

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
    if (cancelled()) throw Cancelled();
    if (!poll) return;
    // Taking Python's GIL costs microseconds; a person cannot tell 20 ms from at once.
    const auto now = std::chrono::steady_clock::now();
    if (now - last_poll_ < std::chrono::milliseconds(20)) return;
    last_poll_ = now;
    poll();
    if (cancelled()) throw Cancelled();
}

}  // namespace yivl
