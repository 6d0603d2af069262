#include "cpu/threads.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <fstream>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace yivl {

namespace {

// A sleeping thread takes tens of microseconds to wake; the next operation of a forward pass usually comes sooner.
constexpr auto kSpin = std::chrono::microseconds(50);
// A caller that has the pool keeps it from one operation to the next for this long while others wait: a turn for every
// operation would put threads to sleep and wake them all the time.
constexpr auto kTurnTime = std::chrono::milliseconds(30);
// So long nobody else gets the pool from a caller that has it and does not use it; it is also how often a caller that
// waits looks at its Control.
constexpr auto kTurnIdle = std::chrono::milliseconds(2);

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins until `ready()` or until it is no longer worth it; returns ready().
template <class Ready>
bool spin_until(Ready ready) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; ++i) {
            if (ready()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return ready();
}

// CPUs of a cgroup's quota ("max 100000" or "150000 100000"), rounded up; 0: no limit.
int64_t quota_cpus(const std::string& path) {
    std::ifstream file(path);
    std::string quota;
    int64_t period = 0;
    if (!(file >> quota >> period) || quota == "max" || period <= 0) return 0;
    const int64_t microseconds = std::strtoll(quota.c_str(), nullptr, 10);
    return (microseconds + period - 1) / period;
}

// One name for all SMT siblings of a CPU, e.g. "0,64"; the CPU's own number where the system does not tell.
[[maybe_unused]] std::string core_of(int cpu) {
    const std::string folder = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    for (const char* name : {"core_cpus_list", "thread_siblings_list"}) {
        std::ifstream file(folder + name);
        std::string siblings;
        if (file >> siblings) return siblings;
    }
    return std::to_string(cpu);
}

}  // namespace

int64_t cgroup_cpus(const std::string& root) {
    std::ifstream membership(root + "/proc/self/cgroup");
    std::string group;
    for (std::string line; std::getline(membership, line);) {
        if (line.starts_with("0::/")) group = line.substr(3);
    }
    for (int64_t least = 0;; group.resize(group.rfind('/'))) {
        const int64_t cpus = quota_cpus(root + "/sys/fs/cgroup" + group + "/cpu.max");
        if (cpus > 0 && (least == 0 || cpus < least)) least = cpus;
        if (group.empty()) return least;
    }
}

int default_thread_count() {
    int n = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) {
        std::set<std::string> cores;
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (CPU_ISSET(cpu, &allowed)) cores.insert(core_of(cpu));
        }
        n = static_cast<int>(cores.size());
    }
#endif
    if (const int64_t quota = cgroup_cpus(); quota > 0) n = static_cast<int>(std::min<int64_t>(n, quota));
    return std::max(n, 1);
}

struct ThreadPool::Shared {
    // Whether a job is open, how many workers are inside, and how many jobs there have been. A worker enters only an
    // open job; the caller closes it when the items have run out, so that it never waits for a worker still waking up.
    static constexpr uint64_t kInside = 0xffff;
    static constexpr uint64_t kOpen = 0x10000;
    static constexpr uint64_t kGeneration = 0x20000;
    std::atomic<uint64_t> gate{0};

    // The job. Written by the caller while no worker is inside.
    const Function* fn = nullptr;
    const Control* control = nullptr;
    int64_t n_items = 0;
    int64_t grain = 1;
    // The pieces left for each thread: a run of neighbours, so that what one fetches ahead is its own. It takes them
    // from the front; who has none left takes another's from the back.
    struct alignas(64) Share {
        std::atomic<uint64_t> pieces{0};  // first and end, 32 bits each

        static constexpr int kBits = 32;
        void set(int64_t first, int64_t end) {
            pieces.store(static_cast<uint64_t>(first) << kBits | static_cast<uint64_t>(end), std::memory_order_relaxed);
        }
        // The next piece from the front, or the back; -1: none.
        int64_t take(bool front) {
            uint64_t now = pieces.load(std::memory_order_relaxed);
            uint64_t first, end;
            do {
                first = now >> kBits;
                end = now & 0xffffffff;
                if (first >= end) return -1;
            } while (!pieces.compare_exchange_weak(now, front ? (first + 1) << kBits | end : now - 1,
                                                   std::memory_order_relaxed));
            return static_cast<int64_t>(front ? first : end - 1);
        }
    };
    std::vector<Share> shares;      // of each thread
    std::atomic<bool> stop{false};  // an exception or a cancel: hand out no more
    std::mutex error_mutex;
    std::exception_ptr error;

    std::atomic<int> sleepers{0};
    std::atomic<bool> exit{false};
    std::mutex sleep_mutex;
    std::condition_variable wake;

    std::mutex done_mutex;
    std::condition_variable done;

    struct Waiter {
        std::condition_variable granted_changed;
        bool granted = false;
        std::thread::id thread = std::this_thread::get_id();
    };
    std::mutex turn_mutex;
    bool busy = false;
    std::thread::id caller;           // whose operation is at work
    const Control* holder = nullptr;  // whose turn it is
    std::chrono::steady_clock::time_point turn_end, last_use;
    std::deque<Waiter*> queue;

    std::vector<std::thread> threads;
    pid_t process = getpid();

    static uint64_t generation(uint64_t gate) { return gate / kGeneration; }

    void fail(std::exception_ptr e) {
        const std::lock_guard lock(error_mutex);
        if (!error) error = std::move(e);
        stop.store(true, std::memory_order_relaxed);
    }

    void share_out() {
        const int64_t pieces = (n_items + grain - 1) / grain;
        const int64_t n = static_cast<int64_t>(shares.size());
        for (int64_t i = 0; i < n; ++i) shares[static_cast<size_t>(i)].set(pieces * i / n, pieces * (i + 1) / n);
    }

    // Takes the next piece for a thread; false when there is none.
    bool take(int thread, int64_t& begin, int64_t& end) {
        if (stop.load(std::memory_order_relaxed)) return false;
        for (size_t i = 0; i < shares.size(); ++i) {
            const int64_t piece = shares[(static_cast<size_t>(thread) + i) % shares.size()].take(i == 0);
            if (piece < 0) continue;
            begin = piece * grain;
            end = std::min(begin + grain, n_items);
            return true;
        }
        return false;
    }

    void wait_for_job(uint64_t seen) {
        const auto changed = [&] { return generation(gate.load()) != seen || exit.load(std::memory_order_relaxed); };
        if (spin_until(changed)) return;
        std::unique_lock lock(sleep_mutex);
        // The caller opens the gate, then reads `sleepers`; this thread does the reverse: one of the two sees the
        // other.
        sleepers.fetch_add(1);
        wake.wait(lock, changed);
        sleepers.fetch_sub(1);
    }

    bool enter(uint64_t& seen) {
        uint64_t now = gate.load(std::memory_order_acquire);
        do {
            seen = generation(now);
            if (!(now & kOpen)) return false;
        } while (!gate.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel, std::memory_order_acquire));
        return true;
    }

    void leave() {
        const uint64_t before = gate.fetch_sub(1, std::memory_order_acq_rel);
        if ((before & kInside) == 1 && !(before & kOpen)) {
            {
                const std::lock_guard lock(done_mutex);
            }
            done.notify_one();
        }
    }

    void worker(int thread) {
        for (uint64_t seen = 0;;) {
            wait_for_job(seen);
            if (exit.load(std::memory_order_relaxed)) return;
            if (!enter(seen)) continue;
            try {
                int64_t begin, end;
                while (take(thread, begin, end)) {
                    if (control->cancelled()) {
                        stop.store(true, std::memory_order_relaxed);
                        break;
                    }
                    (*fn)(begin, end, thread);
                }
            } catch (...) {
                fail(std::current_exception());
            }
            leave();
        }
    }

    void end_workers() {
        exit.store(true);
        {
            const std::lock_guard lock(sleep_mutex);
        }
        wake.notify_all();
        for (std::thread& thread : threads) thread.join();
    }

    void open() {
        const uint64_t now = gate.load(std::memory_order_relaxed);
        assert((now & (kInside | kOpen)) == 0);
        gate.store((now + kGeneration) | kOpen);
        if (sleepers.load() > 0) {
            {
                const std::lock_guard lock(sleep_mutex);
            }
            wake.notify_all();
        }
    }

    void close() {
        gate.fetch_and(~kOpen, std::memory_order_acq_rel);
        const auto empty = [&] { return (gate.load(std::memory_order_acquire) & kInside) == 0; };
        if (spin_until(empty)) return;
        std::unique_lock lock(done_mutex);
        done.wait(lock, empty);
    }
};

// The right to use the pool for an operation. Callers take turns in order of arrival; while one has its turn, its next
// operations go first.
class ThreadPool::Turn {
public:
    Turn(Shared& shared, Control& control) : shared_(shared) {
        std::unique_lock lock(shared_.turn_mutex);
        const auto mine = [me = std::this_thread::get_id()](const Shared::Waiter* w) { return w->thread == me; };
        // A handler may come while its thread computes, and while it waits.
        if ((shared_.busy && shared_.caller == std::this_thread::get_id()) ||
            std::ranges::any_of(shared_.queue, mine)) {
            throw std::logic_error("a model cannot be used from inside its own work, as by a signal handler");
        }
        if (!shared_.busy && (shared_.queue.empty() || (shared_.holder == &control && !over()))) {
            begin(control);
            return;
        }
        Shared::Waiter waiter;
        shared_.queue.push_back(&waiter);
        while (!waiter.granted_changed.wait_for(lock, kTurnIdle, [&] { return waiter.granted; })) {
            if (!shared_.busy && shared_.queue.front() == &waiter && (over() || idle())) {
                shared_.queue.pop_front();
                break;
            }
            lock.unlock();
            try {
                control.check();
            } catch (...) {
                lock.lock();
                if (waiter.granted) {
                    pass_on();
                } else {
                    std::erase(shared_.queue, &waiter);
                }
                throw;
            }
            lock.lock();
        }
        begin(control);
    }
    ~Turn() {
        const std::lock_guard lock(shared_.turn_mutex);
        shared_.last_use = Clock::now();
        shared_.caller = {};
        if (over()) {
            pass_on();
        } else {
            shared_.busy = false;
        }
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

private:
    using Clock = std::chrono::steady_clock;

    // All with turn_mutex held.
    bool over() const { return Clock::now() >= shared_.turn_end; }
    bool idle() const { return Clock::now() >= shared_.last_use + kTurnIdle; }
    void begin(const Control& control) {
        shared_.busy = true;
        shared_.caller = std::this_thread::get_id();
        if (shared_.holder == &control && !over()) return;
        shared_.holder = &control;
        shared_.turn_end = Clock::now() + kTurnTime;
    }
    void pass_on() {
        shared_.busy = !shared_.queue.empty();
        if (!shared_.busy) return;
        Shared::Waiter* next = shared_.queue.front();
        shared_.queue.pop_front();
        next->granted = true;
        shared_.caller = next->thread;
        next->granted_changed.notify_one();
    }

    Shared& shared_;
};

ThreadPool::ThreadPool(int n_threads) : n_threads_(n_threads), shared_(std::make_unique<Shared>()) {
    if (n_threads < 1 || n_threads > 1024) {
        throw std::invalid_argument("n_threads must be from 1 to 1024, not " + std::to_string(n_threads));
    }
    shared_->shares = std::vector<Shared::Share>(static_cast<size_t>(n_threads));
    shared_->threads.reserve(static_cast<size_t>(n_threads - 1));
    for (int i = 0; i < n_threads - 1; ++i) {
        try {
            shared_->threads.emplace_back([shared = shared_.get(), i] { shared->worker(i); });
        } catch (const std::system_error& e) {
            shared_->end_workers();
            throw std::system_error(
                e.code(), "cannot start thread " + std::to_string(i + 2) + " of " + std::to_string(n_threads));
        } catch (...) {
            shared_->end_workers();
            throw;
        }
    }
}

ThreadPool::~ThreadPool() {
    if (getpid() != shared_->process) {
        // The workers exist in the parent only, and the locks may be held by them for ever: leave everything as it is.
        shared_.release();
        return;
    }
    shared_->end_workers();
}

void ThreadPool::check_process() const {
    if (getpid() == shared_->process) return;
    throw std::runtime_error(
        "this model was opened in another process: its threads did not survive the fork. Open the model in the process "
        "that uses it, or start processes with 'spawn'");
}

void ThreadPool::parallel_for(Control& control, int64_t n_items, int64_t grain, const Function& fn) {
    assert(grain >= 1);
    control.check();
    if (n_items <= 0) return;
    check_process();
    const Turn turn(*shared_, control);
    Shared& s = *shared_;
    s.fn = &fn;
    s.control = &control;
    s.n_items = n_items;
    s.grain = grain;
    s.share_out();
    s.stop.store(false, std::memory_order_relaxed);
    s.error = nullptr;

    const bool shared_out = n_items > grain && n_threads_ > 1;
    if (shared_out) s.open();
    try {
        int64_t begin, end;
        while (s.take(n_threads_ - 1, begin, end)) {
            control.check();
            fn(begin, end, n_threads_ - 1);
        }
    } catch (...) {
        s.fail(std::current_exception());
    }
    if (shared_out) s.close();
    if (s.error) std::rethrow_exception(std::exchange(s.error, nullptr));
    control.check();  // a worker that saw the cancel left items undone
}

}  // namespace yivl
