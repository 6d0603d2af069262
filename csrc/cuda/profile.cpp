#include "cuda/profile.h"

#include <algorithm>
#include <map>
#include <utility>

namespace yivl::cuda {

std::unique_ptr<Event> Profile::mark(Stream& stream) {
    auto event = std::make_unique<Event>(stream.device(), Event::timed);
    event->record(stream);
    return event;
}

void Profile::add(Stream& stream, const char* name, const Work& work, std::unique_ptr<Event> begin) {
    Pending pending{name, std::move(begin), mark(stream), work};
    const std::lock_guard lock(mutex_);
    pending_.push_back(std::move(pending));
}

std::vector<KernelTime> Profile::take() {
    std::vector<Pending> done;
    {
        const std::lock_guard lock(mutex_);
        done.swap(pending_);
    }
    std::map<std::string, KernelTime> by_name;
    for (const Pending& p : done) {
        p.end->wait();
        KernelTime& kernel = by_name[p.name];
        ++kernel.calls;
        kernel.seconds += seconds_between(*p.begin, *p.end);
        kernel.bytes += p.work.bytes;
        kernel.flop += p.work.flop;
    }
    std::vector<KernelTime> kernels;
    for (auto& [name, kernel] : by_name) {
        kernel.name = name;
        kernels.push_back(kernel);
    }
    std::ranges::sort(kernels, std::greater<>(), &KernelTime::seconds);
    return kernels;
}

}  // namespace yivl::cuda
