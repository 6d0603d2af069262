// The core's own pool of threads: OpenMP's would clash with PyTorch's in one process.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "control.h"

namespace yivl {

// Physical cores that this process may use: SMT siblings count once, CPU quotas of cgroups (version 2) are kept.
int default_thread_count();
// CPUs that the quotas of this process's cgroup and of those round it allow, rounded up; 0: no limit. `root` stands
// before /proc and /sys, for tests.
int64_t cgroup_cpus(const std::string& root = "");

// n_threads - 1 workers; the caller of parallel_for is the last thread. Workers sleep when there is nothing to do.
// Any number of threads may call: an operation has the whole pool to itself, and callers take turns in order of
// arrival, each for some operations.
class ThreadPool {
public:
    // Handles items [begin, end) on thread `thread` of [0, n_threads).
    using Function = std::function<void(int64_t begin, int64_t end, int thread)>;

    // Throws std::system_error if the system has no more threads to give.
    explicit ThreadPool(int n_threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int n_threads() const { return n_threads_; }

    // Calls fn over [0, n_items) in pieces of at most `grain` items, handed out as threads come free. An exception in
    // any piece is rethrown here, as is one from control.check(), which runs between the caller's pieces; either way no
    // thread is inside fn any more. Pieces set the time that a cancel takes: keep them to a few tens of milliseconds.
    void parallel_for(Control& control, int64_t n_items, int64_t grain, const Function& fn);

    // Throws std::runtime_error in a process forked from the one that made the pool: threads do not survive a fork.
    void check_process() const;

private:
    struct Shared;
    class Turn;

    int n_threads_;
    std::unique_ptr<Shared> shared_;
};

}  // namespace yivl
