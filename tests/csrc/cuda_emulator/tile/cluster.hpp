// csrc/tile/cluster.hpp on the CPU.
#pragma once

#include <cuda_runtime.h>

namespace cuda_emulator {

// A store to another block's shared memory that has been started.
struct RemoteStore {
    unsigned rank;
    float* to;
    float value;
};
inline std::vector<std::vector<RemoteStore>> remote_stores(kMaxCluster* kMaxThreads);

inline void make(const RemoteStore& store) {
    if (!blocks[store.rank].begun) fault = "a store to a block that has not begun";
    const unsigned own = blockDim.x * blockDim.y * blockDim.z;
    const Fiber* first = &fibers[store.rank * own];
    if (std::all_of(first, first + own, [](const Fiber& fiber) { return fiber.state == State::done; }))
        fault = "a store to a block that has ended";
    *store.to = store.value;
}

}  // namespace cuda_emulator

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

inline void store_in_block(float* to, unsigned rank, float value) {
    using namespace cuda_emulator;
    const auto offset = reinterpret_cast<unsigned char*>(to) - shared_memory;
    const RemoteStore store{rank, reinterpret_cast<float*>(blocks[rank].shared + offset), value};
    if (descending)
        make(store);
    else
        remote_stores[current].push_back(store);
}

inline void cluster_sync() {
    using namespace cuda_emulator;
    for (const RemoteStore& store : remote_stores[current]) make(store);
    remote_stores[current].clear();
    const unsigned before = cluster_passed;
    if (++cluster_arrived == cluster_blocks * blockDim.x * blockDim.y * blockDim.z) {
        cluster_arrived = 0;
        ++cluster_passed;
    }
    wait_until([=] { return cluster_passed != before; }, "its cluster");
}

}  // namespace ptx
}  // namespace lmkern
