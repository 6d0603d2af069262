// What an emulated stream has still to do.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "cuda/device.h"

namespace yivl::cuda::emulator {

// Runs the kernel, all but what it does before wait_for_earlier_kernels after `earlier`, if that is given. Throws what
// docs/cuda.md says of the emulator, of either.
void run(const Kernel& kernel, const Kernel* earlier);

// A stream's handle. A kernel is done when the next one has come as far as its wait, or when its results are asked for;
// every third is done at once, so that in work that repeats others meet.
class Queue {
public:
    using Recording = std::vector<std::function<void(Queue&)>>;

    Recording* recording = nullptr;  // where work is kept while it is recorded

    void start(Kernel kernel);
    void finish();
    void drop() { begun_.reset(); }

private:
    std::optional<Kernel> begun_;
    bool next_waits_ = true;
};

}  // namespace yivl::cuda::emulator
