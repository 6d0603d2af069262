#include "read_ahead.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <utility>

namespace yivl {

namespace {

#if defined(__linux__)
// Whoever destroys a model waits for no more than one such part.
constexpr size_t kPart = 8 << 20;
// MADV_POPULATE_READ of Linux 5.14, which older headers lack; it says so where a page cannot be read, instead of ending
// the program.
constexpr int kPopulate = 22;

// Whether the rest of the machine keeps some memory.
bool fits(size_t bytes) {
    const auto pages = static_cast<uint64_t>(std::max(sysconf(_SC_PHYS_PAGES), 0L));
    const auto page = static_cast<uint64_t>(std::max(sysconf(_SC_PAGESIZE), 0L));
    return bytes <= pages * page / 8 * 7;
}

void map_pages(std::span<const std::byte> file, const std::atomic<bool>& stop) {
    for (size_t at = 0; at < file.size() && !stop; at += kPart) {
        // The kernel's interface has no const; reading changes nothing.
        void* const part = const_cast<std::byte*>(file.data() + at);
        if (madvise(part, std::min(kPart, file.size() - at), kPopulate) != 0) return;
    }
}
#endif

}  // namespace

ReadAhead::ReadAhead(std::vector<std::span<const std::byte>> files) : process_(getpid()) {
#if defined(__linux__)
    size_t bytes = 0;
    for (const auto& file : files) bytes += file.size();
    if (bytes == 0 || !fits(bytes)) return;
    shared_ = std::make_unique<Shared>();
    shared_->files = std::move(files);
    try {
        shared_->thread = std::thread([shared = shared_.get()] {
            for (const auto& file : shared->files) map_pages(file, shared->stop);
        });
    } catch (const std::system_error&) {
        shared_.reset();  // no thread to be had
    }
#else
    static_cast<void>(files);
#endif
}

ReadAhead::~ReadAhead() {
    if (shared_ == nullptr) return;
    if (getpid() != process_) {
        shared_.release();  // a fork has no such thread
        return;
    }
    shared_->stop = true;
    shared_->thread.join();
}

}  // namespace yivl
