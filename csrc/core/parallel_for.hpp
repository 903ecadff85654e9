// One loop over tasks, shared out among the threads of torch's own pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#include "core/types.hpp"
#include "core/workspace.hpp"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace lmkern {

// Denormal numbers cost up to 100 cycles an operation, and peaky softmax rows are full of them: inside a
// kernel they count as zero. The caller's mode is restored at the end.
class FlushDenormals {
public:
    FlushDenormals() : saved_(mode()) { set_mode(saved_ | kFlush); }
    ~FlushDenormals() { set_mode(saved_); }
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;

private:
#if defined(__SSE2__)
    static constexpr uint64_t kFlush = 0x8040;  // MXCSR: results to zero, operands for zero
    static uint64_t mode() { return _mm_getcsr(); }
    static void set_mode(uint64_t mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__)
    static constexpr uint64_t kFlush = uint64_t{1} << 24;  // FPCR.FZ: both
    static uint64_t mode() {
        uint64_t mode;
        asm volatile("mrs %0, fpcr" : "=r"(mode) : : "memory");
        return mode;
    }
    static void set_mode(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else
    static constexpr uint64_t kFlush = 0;
    static uint64_t mode() { return 0; }
    static void set_mode(uint64_t) {}
#endif

    uint64_t saved_;
};

// At its end whatever this thread streamed past the caches can be seen by the other threads.
struct StreamsEnd {
    ~StreamsEnd() {
#if defined(__SSE2__)
        _mm_sfence();
#endif
    }
};

// An OpenMP team started in a forked child (a DataLoader worker) hangs: its threads stayed in the parent.
inline bool& in_forked_child() {
    static bool forked = false;
#if defined(__unix__) || defined(__APPLE__)
    static const int registered = pthread_atfork(nullptr, nullptr, [] { in_forked_child() = true; });
    (void)registered;
#endif
    return forked;
}

// body(task) for every task in [0, tasks), on up to `threads` threads. As many tasks as threads: task i runs
// on thread i, in whose cache its data may be from the op before. More: they are handed out in order, one at
// a time. An exception of a task is thrown again here.
template <class Body>
void parallel_for(int64_t tasks, int64_t threads, const Body& body) {
    if (threads <= 1 || tasks <= 1 || in_forked_child()) {
        FlushDenormals flush;
        Workspace::Use workspace;
        StreamsEnd streams;
        for (int64_t task = 0; task < tasks; ++task) body(task);
        return;
    }
    std::exception_ptr failure;
    auto guarded = [&](int64_t task) {
        try {
            body(task);
        } catch (...) {
#pragma omp critical
            failure = std::current_exception();
        }
    };
    if (tasks <= threads) {
#pragma omp parallel num_threads(static_cast<int>(tasks))
        {
            FlushDenormals flush;
            Workspace::Use workspace;
            StreamsEnd streams;
#pragma omp for schedule(static, 1) nowait
            for (int64_t task = 0; task < tasks; ++task) guarded(task);
        }
    } else {
#pragma omp parallel num_threads(static_cast<int>(threads))
        {
            FlushDenormals flush;
            Workspace::Use workspace;
            StreamsEnd streams;
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t task = 0; task < tasks; ++task) guarded(task);
        }
    }
    if (failure) std::rethrow_exception(failure);
}

// body(begin, end) for ranges that make up [0, count), at most so many, neighbours on one thread: two threads
// that write to one fresh page both wait for it.
template <class Body>
void parallel_ranges(int64_t count, int64_t ranges, int64_t threads, const Body& body) {
    if (count <= 0) return;
    const int64_t length = ceil_div(count, std::clamp<int64_t>(ranges, 1, count));
    parallel_for(ceil_div(count, length), threads,
                 [&](int64_t range) { body(range * length, std::min(count, (range + 1) * length)); });
}

// As parallel_for, body(task, next): next() is the task that this thread will do after this one, if that is
// known yet, else `tasks`. It is this thread's from then on, so the last ones are left to whoever is free.
template <class Body>
void parallel_for_ahead(int64_t tasks, int64_t threads, const Body& body) {
    const int64_t workers = std::min(tasks, threads);
    std::atomic<int64_t> handed_out{workers};
    auto take = [&] { return std::min(tasks, handed_out.fetch_add(1, std::memory_order_relaxed)); };
    parallel_for(workers, workers, [&](int64_t task) {
        while (task < tasks) {
            int64_t after = tasks;
            body(task, [&] {
                if (after == tasks && handed_out.load(std::memory_order_relaxed) < tasks - workers)
                    after = take();
                return after;
            });
            task = after < tasks ? after : take();
        }
    });
}

}  // namespace lmkern
