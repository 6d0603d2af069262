// How long kernels take, one by one. Small ones seem to take longer than they do: the card may wait for them.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/runtime.h"
#include "ops.h"

namespace yivl::cuda {

class Profile {
public:
    // A place in the stream's work, before a kernel.
    static std::unique_ptr<Event> mark(Stream& stream);
    // After it.
    void add(Stream& stream, const char* name, const Work& work, std::unique_ptr<Event> begin);
    // Of all kernels so far, by name; waits for them, and forgets them.
    std::vector<KernelTime> take();

private:
    struct Pending {
        const char* name;
        std::unique_ptr<Event> begin, end;
        Work work;
    };
    std::mutex mutex_;
    std::vector<Pending> pending_;
};

}  // namespace yivl::cuda
