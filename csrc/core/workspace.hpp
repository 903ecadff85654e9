// Scratch memory of a thread: kept from call to call, so that no call pays for fresh pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace lmkern {

class Workspace {
public:
    ~Workspace() { std::free(memory_); }

    // Starts a kernel's use of the workspace with room for `bytes`; what was in it is lost.
    void reserve(size_t bytes) {
        used_ = 0;
        bytes += kSlack;
        if (bytes <= capacity_) return;
        std::free(memory_);
        capacity_ = 0;
        memory_ = static_cast<char*>(std::aligned_alloc(kAlignment, round_up(bytes)));
        if (memory_ == nullptr) throw std::bad_alloc();
        capacity_ = round_up(bytes);
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

private:
    static constexpr size_t kAlignment = 64;
    // Each take() rounds up to a cache line; kernels take at most 32 pieces.
    static constexpr size_t kSlack = 32 * kAlignment;

    static size_t round_up(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

    char* memory_ = nullptr;
    size_t capacity_ = 0;
    size_t used_ = 0;
};

}  // namespace lmkern
