// csrc/tile/cluster.hpp on the CPU.
#pragma once

#include <cuda_runtime.h>

namespace lmkern {

constexpr int kMaxCluster = cuda_emulator::kMaxCluster;

namespace ptx {

constexpr bool kHasClusters = true;

inline unsigned char* dynamic_shared() {
    return cuda_emulator::shared_memory;
}

inline unsigned cluster_rank() {
    return cuda_emulator::fibers[cuda_emulator::current].rank;
}
inline unsigned cluster_size() {
    return cuda_emulator::cluster_blocks;
}

struct Barrier {
    int arrivals, pending;
    int64_t bytes;
    uint32_t parity;

    void settle() {
        if (pending != 0 || bytes != 0) return;
        pending = arrivals;
        parity ^= 1;
    }
};

inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - cuda_emulator::shared_memory);
}

inline void mbarrier_init(Barrier* barrier, uint32_t arrivals) {
    *barrier = {static_cast<int>(arrivals), static_cast<int>(arrivals), 0, 0};
}
inline void fence_mbarrier_init() {}
inline void arrive(Barrier* barrier) {
    --barrier->pending;
    barrier->settle();
}
inline void mbarrier_arrive_expect_tx(Barrier* barrier, uint32_t bytes) {
    barrier->bytes += bytes;
    arrive(barrier);
}
inline void mbarrier_wait(Barrier* barrier, uint32_t parity, const char* name) {
    cuda_emulator::wait_until([=] { return barrier->parity != parity; }, name);
}

inline void st_async(float* to, Barrier* barrier, unsigned rank, float value) {
    using namespace cuda_emulator;
    Block& block = blocks[rank];
    if (!block.begun) fault = "a store to a block that has not begun";
    const auto there = [&](auto* here) {
        const auto offset = reinterpret_cast<unsigned char*>(here) - shared_memory;
        return reinterpret_cast<decltype(here)>(block.shared + offset);
    };
    start_copy([=, to = there(to), barrier = there(barrier)] {
        const unsigned own = blockDim.x * blockDim.y * blockDim.z;
        const Fiber* first = &fibers[rank * own];
        if (std::all_of(first, first + own, [](const Fiber& fiber) { return fiber.state == State::done; }))
            fault = "a store to a block that has ended";
        *to = value;
        barrier->bytes -= sizeof value;
        barrier->settle();
    });
}

inline void cluster_sync() {
    using namespace cuda_emulator;
    const unsigned before = cluster_passed;
    if (++cluster_arrived == cluster_blocks * blockDim.x * blockDim.y * blockDim.z) {
        cluster_arrived = 0;
        ++cluster_passed;
    }
    wait_until([=] { return cluster_passed != before; }, "its cluster");
}

}  // namespace ptx
}  // namespace lmkern
