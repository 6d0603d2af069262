// Barriers, warps and shared memory of an emulated block, and when kernels run. Blocks are handed to the threads of a
// pool; on each, the emulated threads of a block run one after the other, each until it must wait for others.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cassert>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cpu/threads.h"
#include "cuda/device.h"
#include "emulated_memory.h"
#include "emulated_stream.h"
#include "errors.h"
#include "fibres.h"

namespace yivl::cuda::emulator {

thread_local const Position* position = nullptr;

namespace {

// Of cards from 75 on: threads of a block, shared memory of a kernel's objects, and all that a launch may ask for: 75
// has the least, 90 the most.
constexpr int kMaxThreads = 1024;
constexpr size_t kStaticShared = 48 << 10;
constexpr size_t kMaxShared = 227 << 10;
size_t max_shared() { return capability() < 90 ? 64 << 10 : kMaxShared; }
constexpr int kMaxGridYZ = 65535;

// What shared memory holds before a block writes it: as float32, half or bfloat16 not a number.
constexpr int kPoison = 0xff;
constexpr size_t kFence = 64;  // bytes of poison after each object

// ---- one block ----

enum class Order { forward, reverse, shuffled };

Order chosen_order() {
    const char* variable = std::getenv("YIVL_EMULATOR_ORDER");
    const std::string_view name = variable == nullptr ? "forward" : variable;
    if (name == "forward") return Order::forward;
    if (name == "reverse") return Order::reverse;
    if (name == "shuffled") return Order::shuffled;
    throw DeviceError("YIVL_EMULATOR_ORDER: expected forward, reverse or shuffled, found " + std::string(name));
}

std::string text(const Place& place) {
    const std::string_view file = place.file_name();
    return std::string(file.substr(file.rfind('/') + 1)) + ":" + std::to_string(place.line());
}

struct Copy {
    void* to;
    const void* from;
    int bytes;
    int group;
};

enum class Wait { none, warp, block, end };

struct Thread {
    Position position;
    Fibre fibre;
    Wait wait;
    const char* operation;  // that it waits in
    Place place;
    bool has_waited;  // for earlier kernels
    std::vector<Copy> copies;
    int copy_group;
    bool is_published;  // what it has copied
    std::vector<AsyncProduct> products;
    int product_group;
};

struct Warp {
    uint32_t ready;    // lanes that can run
    uint32_t arrived;  // lanes that wait in the operation
    Operand operands[kWarp];
};

class BlockRunner;
// The one whose fibre runs on this thread of the operating system.
thread_local BlockRunner* running __attribute__((tls_model("initial-exec"))) = nullptr;

// A kernel that runs.
class Launch {
public:
    Launch(const Kernel& kernel, const Kernel* earlier) : kernel_(kernel), earlier_(earlier) {}

    const Kernel& kernel() const { return kernel_; }
    Order order() const { return order_; }

    // From inside a fibre: another kernel runs meanwhile.
    void wait_for_earlier() {
        if (earlier_ == nullptr) return;
        std::call_once(once_, [this] {
            BlockRunner* const runner = running;
            const Position* const here = position;
            try {
                run(*earlier_, nullptr);
            } catch (...) {
                error_ = std::current_exception();
            }
            running = runner;
            position = here;
        });
    }
    // What went wrong with the earlier kernel.
    const std::exception_ptr& error() const { return error_; }

private:
    const Kernel& kernel_;
    const Kernel* const earlier_;
    const Order order_ = chosen_order();
    std::once_flag once_;
    std::exception_ptr error_;
};

// Runs blocks one after the other, on one thread of the operating system at a time.
class BlockRunner {
public:
    void run(Launch& launch, Index block) {
        launch_ = &launch;
        block_ = block;
        error_.clear();
        begin();
        schedule();
        position = nullptr;
        if (error_.empty()) check_fences();
        if (!error_.empty()) {
            throw DeviceError("kernel " + std::string(launch.kernel().name) + ", block (" + std::to_string(block.x) +
                              ", " + std::to_string(block.y) + ", " + std::to_string(block.z) + "): " + error_);
        }
    }

    // From inside a fibre.

    void wait_for_earlier_kernels() {
        current_->has_waited = true;
        launch_->wait_for_earlier();
    }

    void sync_block(const Place& place) {
        Thread& me = *current_;
        me.wait = Wait::block;
        me.operation = "sync_block";
        me.place = place;
        leave();
    }

    void meet(const char* operation, Operand mine, void (*compute)(const Operand (&)[kWarp]), const Place& place) {
        Thread& me = *current_;
        Warp& warp = warps_[me.position.thread / kWarp];
        const int lane = me.position.thread % kWarp;
        me.operation = operation;
        me.place = place;
        warp.operands[lane] = mine;
        warp.arrived |= 1u << lane;
        if (warp.arrived == ~0u) {
            const Thread* first = &threads_[me.position.thread - lane];
            for (int i = 0; i < kWarp; ++i) {
                if (first[i].operation != operation || first[i].place.line() != place.line()) {
                    fail("lanes of a warp do not meet: " + describe(me) + ", " + describe(first[i]));
                }
            }
            compute(warp.operands);
            warp.arrived = 0;
            warp.ready = ~0u;
            for (int i = 0; i < kWarp; ++i) threads_[me.position.thread - lane + i].wait = Wait::none;
            return;
        }
        me.wait = Wait::warp;
        leave();
    }

    [[noreturn]] void fail(std::string what) {
        error_ = std::move(what);
        // Never to return: the fibre is given up, and with it the block.
        Fibre::change(current_->fibre, scheduler_);
        std::abort();
    }
    [[noreturn]] void fail(const char* what, const Place& place) {
        fail(text(place) + ": thread " + std::to_string(current_->position.thread) + ": " + what);
    }

    std::byte* shared_object(const void* key, size_t bytes, size_t alignment) {
        for (const Object& object : objects_) {
            if (object.key == key) return object.data;
        }
        const size_t begin = (shared_used_ + alignment - 1) / alignment * alignment;
        static_used_ += bytes;
        const size_t most = std::min(kStaticShared, max_shared() - launch_->kernel().dynamic_shared);
        if (static_used_ > most) {
            fail("shared objects: expected at most " + std::to_string(most) + " bytes, found " +
                 std::to_string(static_used_));
        }
        return objects_.emplace_back(key, place_object(begin, bytes), bytes).data;
    }
    std::byte* dynamic_shared() const { return objects_.front().data; }

    void copy_async(void* to, const void* from, int bytes, const Place& place) {
        if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
            fail("copy_async: address not aligned to 16", place);
        }
        if (bytes < 0 || bytes > 16 || bytes % 2 != 0) {
            fail("copy_async: expected an even number of bytes up to 16", place);
        }
        const auto* byte = static_cast<const std::byte*>(to);
        if (byte < shared_.get() || byte + 16 > shared_.get() + kArena) {
            fail("copy_async: expected an address in shared memory", place);
        }
        current_->copies.push_back({to, from, bytes, current_->copy_group});
    }
    void commit_copies() { ++current_->copy_group; }
    void wait_copies(int pending) {
        Thread& me = *current_;
        const auto done =
            std::ranges::find_if(me.copies, [&](const Copy& copy) { return copy.group >= me.copy_group - pending; });
        for (auto copy = me.copies.begin(); copy != done; ++copy) {
            std::memset(copy->to, 0, 16);
            std::memcpy(copy->to, copy->from, copy->bytes);
        }
        if (done != me.copies.begin()) me.is_published = false;
        me.copies.erase(me.copies.begin(), done);
    }

    void publish_shared() { current_->is_published = true; }
    void multiply_async(AsyncProduct product, int columns, const Place& place) {
        const auto begin = threads_.begin(), end = begin + launch_->kernel().threads;
        const auto unpublished = std::find_if(begin, end, [](const Thread& t) { return !t.is_published; });
        if (unpublished != end) fail("multiply_async: copies without publish_shared: " + describe(*unpublished));
        const std::byte* const tile = tile_of(product.b);
        if (tile < shared_.get() || tile + columns * kAsyncRowBytes > shared_.get() + kArena) {
            fail("multiply_async: expected an operand in shared memory", place);
        }
        if (current_->position.thread % kWarp == 0) product.was.assign(tile, tile + columns * kAsyncRowBytes);
        product.group = current_->product_group;
        current_->products.push_back(std::move(product));
        meet("multiply_async", {}, [](const Operand(&)[kWarp]) {}, place);
    }
    void commit_products() { ++current_->product_group; }
    void wait_products(int pending, int columns, const Place& place) {
        struct Mine {
            Thread* thread;
            int first_pending, columns;
        } mine{current_, current_->product_group - pending, columns};
        meet(
            "wait_products", {&mine, nullptr},
            [](const Operand(&lanes)[kWarp]) {
                const Mine& first = *static_cast<const Mine*>(lanes[0].in);
                std::vector<AsyncProduct>* products[kWarp];
                for (int i = 0; i < kWarp; ++i) products[i] = &static_cast<const Mine*>(lanes[i].in)->thread->products;
                size_t n = 0;
                for (; n < products[0]->size() && (*products[0])[n].group < first.first_pending; ++n) {
                    multiply(products, n, first.columns);
                }
                for (std::vector<AsyncProduct>* p : products) p->erase(p->begin(), p->begin() + n);
            },
            place);
    }

    // The life of a fibre.
    void live() {
        launch_->kernel().body();
        Thread& me = *current_;
        if (!me.has_waited) {
            fail("thread " + std::to_string(me.position.thread) + " ends without wait_for_earlier_kernels");
        }
        me.wait = Wait::end;
        me.operation = "end";
        leave();
        std::abort();  // nobody goes back to one that has ended
    }

private:
    struct Object {
        const void* key;
        std::byte* data;
        size_t bytes;
    };
    // Each object with its fence, and room to align it.
    static constexpr size_t kArena = kMaxShared + 64 * kFence;

    std::byte* place_object(size_t begin, size_t bytes) {
        assert(begin + bytes + kFence <= kArena);
        std::byte* data = shared_.get() + begin;
        std::memset(data, kPoison, bytes + kFence);
        shared_used_ = begin + bytes + kFence;
        return data;
    }

    void begin() {
        const Kernel& kernel = launch_->kernel();
        const int n = kernel.threads;
        if (static_cast<int>(threads_.size()) < n) threads_.resize(n);
        warps_.assign(n / kWarp, {.ready = ~0u, .arrived = 0, .operands = {}});
        for (int i = 0; i < n; ++i) {
            Thread& thread = threads_[i];
            thread.position = {i, n, block_, kernel.grid};
            thread.fibre.prepare(stacks_.end_of(i), &enter);
            thread.wait = Wait::none;
            thread.operation = "";
            thread.has_waited = false;
            thread.copies.clear();
            thread.copy_group = 0;
            thread.is_published = true;
            thread.products.clear();
            thread.product_group = 0;
        }
        objects_.clear();
        shared_used_ = static_used_ = 0;
        objects_.emplace_back(nullptr, place_object(0, kernel.dynamic_shared), kernel.dynamic_shared);
    }

    static void enter();

    static const std::byte* tile_of(const std::byte* b) {
        return b - reinterpret_cast<uintptr_t>(b) % kSharedAlignment;
    }

    // Product i of a warp's lanes: d += a b.
    static void multiply(std::vector<AsyncProduct>* const (&lanes)[kWarp], size_t i, int columns) {
        const auto half = [](const void* at) {
            Half h;
            std::memcpy(&h, at, sizeof(h));
            return to_float(h);
        };
        float a[16][16];
        for (int lane = 0; lane < kWarp; ++lane) {
            const int g = lane / 4, t = lane % 4;
            for (int r = 0; r < 4; ++r) {
                for (int j = 0; j < 2; ++j) {
                    a[g + r % 2 * 8][2 * t + j + r / 2 * 8] =
                        half(reinterpret_cast<const uint16_t*>(&(*lanes[lane])[i].a[r]) + j);
                }
            }
        }
        const AsyncProduct& first = (*lanes[0])[i];
        const std::byte* const tile = tile_of(first.b);
        if (!std::equal(first.was.begin(), first.was.end(), tile)) {
            fail_here("multiply_async: its operand changed before wait_products");
        }
        const auto first_chunk = (first.b - tile) / sizeof(Words);
        for (int eight = 0; eight < columns / 8; ++eight) {
            float b[16][8];
            for (int n = 0; n < 8; ++n) {
                for (int k = 0; k < 16; ++k) {
                    const size_t chunk = (first_chunk + k / 8) ^ static_cast<size_t>(n);
                    b[k][n] =
                        half(tile + (eight * 8 + n) * kAsyncRowBytes + chunk * sizeof(Words) + k % 8 * sizeof(Half));
                }
            }
            for (int row = 0; row < 16; ++row) {
                const auto sum = [&](int n) -> float& {
                    return (*lanes[row % 8 * 4 + n / 2])[i].d[eight][row / 8 * 2 + n % 2];
                };
                float d[8];
                for (int n = 0; n < 8; ++n) d[n] = sum(n);
                add_products(d, a[row], b);
                for (int n = 0; n < 8; ++n) sum(n) = d[n];
            }
        }
    }
    [[noreturn]] static void fail_here(const char* what);

    // Runs warps until all threads have ended, or wait for ones that will not come.
    void schedule() {
        std::vector<int> order(warps_.size());
        for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
        if (launch_->order() == Order::reverse) std::ranges::reverse(order);
        for (;;) {
            if (launch_->order() == Order::shuffled) std::ranges::shuffle(order, random_);
            for (const int w : order) {
                if (warps_[w].ready == 0) continue;
                current_ = &threads_[w * kWarp + next_lane(warps_[w])];
                position = &current_->position;
                Fibre::change(scheduler_, current_->fibre);
                if (!error_.empty()) return;
            }
            if (all(Wait::end)) return;
            if (!all(Wait::block)) return report_absent();
            const Thread& first = threads_[0];
            for (int i = 0; i < launch_->kernel().threads; ++i) {
                if (threads_[i].place.line() == first.place.line()) continue;
                error_ =
                    "threads of the block wait in different places: " + describe(first) + ", " + describe(threads_[i]);
                return;
            }
            for (int i = 0; i < launch_->kernel().threads; ++i) threads_[i].wait = Wait::none;
            for (Warp& warp : warps_) warp.ready = ~0u;
        }
    }

    bool all(Wait wait) const {
        return std::all_of(threads_.begin(), threads_.begin() + launch_->kernel().threads,
                           [wait](const Thread& thread) { return thread.wait == wait; });
    }

    // Some wait for others that have ended or wait elsewhere.
    void report_absent() {
        const auto end = threads_.begin() + launch_->kernel().threads;
        // In a warp first: its lanes cannot reach the block's barrier.
        auto waiting = std::find_if(threads_.begin(), end, [](const Thread& t) { return t.wait == Wait::warp; });
        auto begin = threads_.begin();
        auto last = end;
        if (waiting == end) {
            waiting = std::find_if(threads_.begin(), end, [](const Thread& t) { return t.wait == Wait::block; });
        } else {
            begin = threads_.begin() + waiting->position.thread / kWarp * kWarp;
            last = begin + kWarp;
        }
        const auto absent =
            std::find_if(begin, last, [&](const Thread& thread) { return thread.wait != waiting->wait; });
        error_ = describe(*waiting) + " never meets " + describe(*absent);
    }

    static std::string describe(const Thread& thread) {
        const std::string name = "thread " + std::to_string(thread.position.thread);
        if (thread.wait == Wait::end) return name + " (ended)";
        return name + " (" + thread.operation + " at " + text(thread.place) + ")";
    }

    void check_fences() {
        for (const Object& object : objects_) {
            const std::byte* fence = object.data + object.bytes;
            const bool whole = std::all_of(fence, fence + kFence, [](std::byte b) { return b == std::byte{kPoison}; });
            if (whole) continue;
            error_ = std::string("writes past the end of ") +
                     (object.key == nullptr ? "its dynamic shared memory" : "a shared object") + " of " +
                     std::to_string(object.bytes) + " bytes";
        }
    }

    int next_lane(const Warp& warp) {
        switch (launch_->order()) {
            case Order::forward: break;
            case Order::reverse: return 31 - std::countl_zero(warp.ready);
            case Order::shuffled:
                if (const uint32_t some = warp.ready & random_(); some != 0) return std::countr_zero(some);
        }
        return std::countr_zero(warp.ready);
    }

    // The fibre that runs cannot go on: another lane of its warp does, or the scheduler.
    void leave() {
        Thread& me = *current_;
        Warp& warp = warps_[me.position.thread / kWarp];
        warp.ready &= ~(1u << me.position.thread % kWarp);
        if (warp.ready == 0) {
            Fibre::change(me.fibre, scheduler_);
            return;
        }
        current_ = &threads_[me.position.thread / kWarp * kWarp + next_lane(warp)];
        position = &current_->position;
        Fibre::change(me.fibre, current_->fibre);
    }

    Launch* launch_ = nullptr;
    Index block_;
    std::string error_;
    Fibre scheduler_;
    Thread* current_ = nullptr;
    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    Stacks stacks_{kMaxThreads};
    static constexpr size_t kSharedAlignment = 1024;
    struct FreeAligned {
        void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{kSharedAlignment}); }
    };
    std::unique_ptr<std::byte, FreeAligned> shared_{
        static_cast<std::byte*>(::operator new(kArena, std::align_val_t{kSharedAlignment}))};
    size_t shared_used_ = 0, static_used_ = 0;
    std::vector<Object> objects_;  // the first is the dynamic memory
    std::minstd_rand random_;
};

void BlockRunner::enter() { running->live(); }
void BlockRunner::fail_here(const char* what) { running->fail(what); }

// Runners that nobody uses.
class Runners {
public:
    std::unique_ptr<BlockRunner> take() {
        {
            const std::lock_guard lock(mutex_);
            if (!idle_.empty()) {
                std::unique_ptr<BlockRunner> runner = std::move(idle_.back());
                idle_.pop_back();
                return runner;
            }
        }
        return std::make_unique<BlockRunner>();
    }
    void give_back(std::unique_ptr<BlockRunner> runner) {
        const std::lock_guard lock(mutex_);
        idle_.push_back(std::move(runner));
    }

private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<BlockRunner>> idle_;
};

void check(const Kernel& kernel) {
    const auto& [name, grid, threads, dynamic_shared, body] = kernel;
    const auto expect = [&](bool good, const std::string& what) {
        if (!good) throw DeviceError("kernel " + std::string(kernel.name) + ": " + what);
    };
    expect(threads > 0 && threads <= kMaxThreads && threads % kWarp == 0,
           "expected a multiple of 32 threads up to 1024, found " + std::to_string(threads));
    expect(grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.y <= kMaxGridYZ && grid.z <= kMaxGridYZ,
           "expected a grid of at least one block and of at most 65535 in y and z, found (" + std::to_string(grid.x) +
               ", " + std::to_string(grid.y) + ", " + std::to_string(grid.z) + ")");
    expect(dynamic_shared <= max_shared(), "expected at most " + std::to_string(max_shared()) +
                                               " bytes of shared memory, found " + std::to_string(dynamic_shared));
}

}  // namespace

void run(const Kernel& kernel, const Kernel* earlier) {
    // They live as long as the process: at its end a thread may still be inside. An earlier kernel runs while threads
    // of the other's pool wait for it.
    static ThreadPool& pool = *new ThreadPool(default_thread_count());
    static ThreadPool& inner_pool = *new ThreadPool(default_thread_count());
    static Runners& runners = *new Runners;
    Launch launch(kernel, earlier);
    const Index grid = kernel.grid;
    const int64_t n = int64_t{grid.x} * grid.y * grid.z;
    struct Running {
        Runners& runners;
        std::unique_ptr<BlockRunner> runner = runners.take();
        ~Running() {
            running = nullptr;
            runners.give_back(std::move(runner));
        }
    };
    const auto run_blocks = [&](int64_t begin, int64_t end, int) {
        const Running here{runners};
        running = here.runner.get();
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = launch.order() == Order::reverse ? n - 1 - i : i;
            running->run(launch, {static_cast<int>(b % grid.x), static_cast<int>(b / grid.x % grid.y),
                                  static_cast<int>(b / grid.x / grid.y)});
        }
    };
    const DeviceAccess access;
    Control control;
    ThreadPool& mine = running == nullptr ? pool : inner_pool;
    try {
        mine.parallel_for(control, n, std::max<int64_t>(n / (8 * mine.n_threads()), 1), run_blocks);
    } catch (const DeviceError&) {
        if (launch.error()) std::rethrow_exception(launch.error());
        throw;
    }
    if (launch.error()) std::rethrow_exception(launch.error());
}

void start(void* stream, Kernel kernel) {
    check(kernel);
    Queue& queue = *static_cast<Queue*>(stream);
    if (queue.recording == nullptr) return queue.start(std::move(kernel));
    queue.recording->push_back([kernel = std::move(kernel)](Queue& later) { later.start(kernel); });
}

void Queue::start(Kernel kernel) {
    fail_launch_if_asked(kernel.name);
    if (begun_) {
        const Kernel earlier = *std::exchange(begun_, std::nullopt);
        run(kernel, &earlier);
    } else if (std::exchange(next_waits_, !next_waits_)) {
        begun_ = std::move(kernel);
    } else {
        run(kernel, nullptr);
    }
}

void Queue::finish() {
    if (!begun_) return;
    const Kernel kernel = *std::exchange(begun_, std::nullopt);
    run(kernel, nullptr);
}

void fail(const char* what, const Place& place) { running->fail(what, place); }
void wait_for_earlier_kernels() { running->wait_for_earlier_kernels(); }
void sync_block(const Place& place) { running->sync_block(place); }
void meet(const char* operation, Operand mine, void (*compute)(const Operand (&lanes)[kWarp]), const Place& place) {
    running->meet(operation, mine, compute, place);
}
std::byte* shared_object(const void* key, size_t bytes, size_t alignment) {
    return running->shared_object(key, bytes, alignment);
}
std::byte* dynamic_shared_bytes() { return running->dynamic_shared(); }
void copy_async(void* to, const void* from, int bytes, const Place& place) {
    running->copy_async(to, from, bytes, place);
}
void commit_copies() { running->commit_copies(); }
void wait_copies(int pending) { running->wait_copies(pending); }
void publish_shared() { running->publish_shared(); }
void multiply_async(AsyncProduct product, int columns, const Place& place) {
    running->multiply_async(std::move(product), columns, place);
}
void commit_products() { running->commit_products(); }
void wait_products(int pending, int columns, const Place& place) { running->wait_products(pending, columns, place); }

// GCC calls this when an index is outside its array (-fsanitize=bounds); its data begins with where.
struct OutOfBounds {
    const char* file;
    uint32_t line;
};
extern "C" [[noreturn]] void __ubsan_handle_out_of_bounds_abort(const OutOfBounds* data, uintptr_t index) {
    const std::string_view file = data->file;
    running->fail(std::string(file.substr(file.rfind('/') + 1)) + ":" + std::to_string(data->line) + ": index " +
                  std::to_string(static_cast<intptr_t>(index)) + " is outside its array");
}

}  // namespace yivl::cuda::emulator
