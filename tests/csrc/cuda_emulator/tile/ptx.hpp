// csrc/tile/ptx.hpp on the CPU: the same names, as the PTX manual defines them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <string>

#include "tile/cluster.hpp"

namespace cuda_emulator {

// Threads that have come to a named barrier, and how often each was passed.
struct Named {
    int arrived = 0, passed = 0;
};
inline Named named[16];

// Bulk copies that a thread has started and that are not made.
inline std::vector<int> bulk_pending(kMaxThreads);

inline const bool registered = [] {
    at_block_start.push_back([] {
        std::fill(named, named + 16, Named{});
        std::fill(bulk_pending.begin(), bulk_pending.end(), 0);
    });
    return true;
}();

}  // namespace cuda_emulator

namespace lmkern::ptx {

struct TensorMap {
    const unsigned char* start;
    int64_t sizes[4], strides[3];  // batch, head, row, column; bytes
    int rows;
};

inline void mbarrier_arrive(Barrier* barrier) {
    arrive(barrier);
    // Who waited may be faster than who arrived.
    cuda_emulator::step_aside();
}

// The address that the 128-byte swizzle gives to one.
inline uint32_t swizzled(uint32_t address) {
    return address ^ (address >> 7 & 7) << 4;
}

inline void cp_async_bulk_tensor(void* to, const TensorMap* map, Barrier* barrier, int column, int row,
                                 int head, int batch) {
    unsigned char* const memory = cuda_emulator::shared_memory;
    cuda_emulator::start_copy([=] {
        const TensorMap& m = *map;
        const auto address = static_cast<uint32_t>(static_cast<unsigned char*>(to) - memory);
        for (int r = 0; r < m.rows; ++r)
            for (int c = 0; c < 64; ++c) {
                const bool inside = row + r < m.sizes[2] && column + c < m.sizes[3];
                uint16_t value = 0;
                if (inside)
                    std::memcpy(&value,
                                m.start + batch * m.strides[0] + head * m.strides[1] +
                                    (row + r) * m.strides[2] + (column + c) * 2,
                                2);
                std::memcpy(memory + swizzled(address + r * 128 + c * 2), &value, 2);
            }
        barrier->bytes -= m.rows * 128;
        barrier->settle();
    });
}

// merge(what is there, what comes): what will be there, for each element of the box within the tensor.
template <class Merge>
void store_box(const TensorMap* map, const void* from, int column, int row, int head, int batch,
               const Merge& merge) {
    const unsigned thread = cuda_emulator::current;
    unsigned char* const memory = cuda_emulator::shared_memory;
    ++cuda_emulator::bulk_pending[thread];
    cuda_emulator::start_copy([=] {
        const TensorMap& m = *map;
        const auto address = static_cast<uint32_t>(static_cast<const unsigned char*>(from) - memory);
        for (int r = 0; r < m.rows && row + r < m.sizes[2]; ++r)
            for (int c = 0; c < 64 && column + c < m.sizes[3]; ++c) {
                uint16_t comes, there;
                auto* to = const_cast<unsigned char*>(m.start) + batch * m.strides[0] + head * m.strides[1] +
                           (row + r) * m.strides[2] + (column + c) * 2;
                std::memcpy(&comes, memory + swizzled(address + r * 128 + c * 2), 2);
                std::memcpy(&there, to, 2);
                there = merge(there, comes);
                std::memcpy(to, &there, 2);
            }
        --cuda_emulator::bulk_pending[thread];
    });
}

inline void cp_async_bulk_tensor_store(const TensorMap* map, const void* from, int column, int row, int head,
                                       int batch) {
    store_box(map, from, column, row, head, batch, [](uint16_t, uint16_t comes) { return comes; });
}

// Maps are of bfloat16.
inline void cp_reduce_async_bulk_tensor_add(const TensorMap* map, const void* from, int column, int row,
                                            int head, int batch) {
    const auto wide = [](uint16_t bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); };
    store_box(map, from, column, row, head, batch, [=](uint16_t there, uint16_t comes) {
        return __bfloat16_as_ushort(__float2bfloat16_rn(wide(there) + wide(comes)));
    });
}

inline void cp_reduce_async_bulk_add(float* to, const float* from, uint32_t bytes) {
    const unsigned thread = cuda_emulator::current;
    ++cuda_emulator::bulk_pending[thread];
    cuda_emulator::start_copy([=] {
        for (uint32_t i = 0; i < bytes / 4; ++i) to[i] += from[i];
        --cuda_emulator::bulk_pending[thread];
    });
}
inline void cp_async_bulk_commit_group() {}
inline void cp_async_bulk_wait_group() {
    const unsigned thread = cuda_emulator::current;
    cuda_emulator::wait_until([=] { return cuda_emulator::bulk_pending[thread] == 0; }, "its bulk copies");
}
inline void cp_async_bulk_wait_group_read() {
    cp_async_bulk_wait_group();
}
inline void fence_proxy_async() {}
inline void fence_proxy_async_global() {}

inline bool bar_arrives(int barrier, int threads) {
    cuda_emulator::Named& at = cuda_emulator::named[barrier];
    if (++at.arrived < threads) return false;
    at.arrived = 0;
    ++at.passed;
    return true;
}
inline void bar_arrive(int barrier, int threads) {
    bar_arrives(barrier, threads);
}
inline void bar_sync(int barrier, int threads) {
    const int before = cuda_emulator::named[barrier].passed;
    bar_arrives(barrier, threads);
    cuda_emulator::wait_until([=] { return cuda_emulator::named[barrier].passed != before; },
                              "named barrier " + std::to_string(barrier));
}

template <int>
void setmaxnreg_inc() {}
template <int>
void setmaxnreg_dec() {}

inline float ex2(float x) {
    return std::exp2(x);
}

inline float max_nan(float x, float y) {
    return std::isnan(x) || std::isnan(y) ? NAN : std::max(x, y);
}

inline void wait_for(const int* counter, int value, const char* name) {
    cuda_emulator::wait_until([=] { return *counter == value; }, name);
}
inline void red_release_add(int* counter, int value) {
    *counter += value;
}

}  // namespace lmkern::ptx
