// Scratch memory of a thread: kept from call to call, so that no call pays for fresh pages, up to a limit. It
// belongs to the tasks of one parallel_for, which ends the use of it in each thread.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace lmkern {

class Workspace {
public:
    // What a thread keeps between calls at most, in bytes.
    static constexpr size_t kKept = size_t{64} << 20;

    ~Workspace() { release(); }

    // Starts a task's use of the workspace with room for `bytes`; what was in it is lost.
    void reserve(size_t bytes) {
        used_ = 0;
        bytes += kSlack;
        if (bytes <= capacity_) return;
        release();
        memory_ = static_cast<char*>(std::aligned_alloc(kAlignment, round_up(bytes)));
        if (memory_ == nullptr) throw std::bad_alloc();
        capacity_ = round_up(bytes);
        bytes_held().fetch_add(static_cast<int64_t>(capacity_), std::memory_order_relaxed);
    }

    // The next `count` elements, aligned to a cache line.
    template <class T>
    T* take(int64_t count) {
        char* place = memory_ + used_;
        used_ += round_up(static_cast<size_t>(count) * sizeof(T));
        if (used_ > capacity_) throw std::bad_alloc();
        return reinterpret_cast<T*>(place);
    }

    static Workspace& of_this_thread() {
        thread_local Workspace workspace;
        return workspace;
    }

    // While it lives tasks may use the thread's workspace; at its end what is above kKept is given back.
    class Use {
    public:
        Use() = default;
        ~Use() {
            Workspace& workspace = of_this_thread();
            if (workspace.capacity_ > kKept) workspace.release();
        }
        Use(const Use&) = delete;
        Use& operator=(const Use&) = delete;
    };

    // What the workspaces of all threads of this module hold together.
    static int64_t bytes_of_all_threads() { return bytes_held().load(std::memory_order_relaxed); }

private:
    static constexpr size_t kAlignment = 64;
    // Each take() rounds up to a cache line; kernels take at most 32 pieces.
    static constexpr size_t kSlack = 32 * kAlignment;

    static std::atomic<int64_t>& bytes_held() {
        static std::atomic<int64_t> bytes{0};
        return bytes;
    }

    void release() {
        bytes_held().fetch_sub(static_cast<int64_t>(capacity_), std::memory_order_relaxed);
        std::free(memory_);
        memory_ = nullptr;
        capacity_ = used_ = 0;
    }

    static size_t round_up(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

    char* memory_ = nullptr;
    size_t capacity_ = 0;
    size_t used_ = 0;
};

}  // namespace lmkern
