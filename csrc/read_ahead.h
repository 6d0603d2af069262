// Brings files into memory in the background, so that an answer does not wait for the disk page by page.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <memory>
#include <span>
#include <thread>
#include <vector>

namespace yivl {

// Maps the pages of files that are mapped, one file after the other, as fast as the disk gives them. Only a help: what
// is not there is read when it is needed, and a file that would not fit in the machine's memory is left to that.
class ReadAhead {
public:
    // The files must stay mapped as long as this lives.
    explicit ReadAhead(std::vector<std::span<const std::byte>> files);
    ~ReadAhead();
    ReadAhead(const ReadAhead&) = delete;
    ReadAhead& operator=(const ReadAhead&) = delete;

private:
    struct Shared {
        std::vector<std::span<const std::byte>> files;
        std::atomic<bool> stop = false;
        std::thread thread;
    };
    std::unique_ptr<Shared> shared_;
    pid_t process_;
};

}  // namespace yivl
