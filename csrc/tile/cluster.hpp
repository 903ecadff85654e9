// Clusters of blocks, which write to each other's shared memory, and the barriers in it that count what has
// come (PTX ISA 8.5, sections 9.7.8, 9.7.12.4, 9.7.12.15 and 10). Compute capability 9.0 and later.
#pragma once

#include <cstdint>
#include <cstdio>

namespace lmkern {

// More than 8 blocks not every GPU has room for.
constexpr int kMaxCluster = 16;

namespace ptx {

// Whether this code is compiled for a GPU that has them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif

// The block's dynamic shared memory.
__device__ inline unsigned char* dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char memory[];
    return memory;
}

// The block's place in its cluster, and the cluster's blocks.
__device__ inline unsigned cluster_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ inline unsigned cluster_size() {
    unsigned size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

// 64 bits in shared memory: arrivals and bytes that are still awaited, and the parity of the phase.
using Barrier = uint64_t;

__device__ inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A phase ends when `arrivals` threads have arrived and the bytes they announced are there.
__device__ inline void mbarrier_init(Barrier* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Makes initialised barriers known to the copy engine and, before cluster_sync, to the cluster; __syncthreads
// makes them known to the block.
__device__ inline void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and lets the phase wait for so many bytes more.
__device__ inline void mbarrier_arrive_expect_tx(Barrier* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

// In debug builds a wait of more than about a second says for what, and ends the kernel.
class Patience {
public:
#ifdef LMKERN_CUDA_DEBUG
    __device__ void end(const char* name, uint32_t value) {
        constexpr long long kTooLong = 2'000'000'000;  // clocks
        if (clock64() - start_ <= kTooLong) return;
        printf("lmkern: block %u, thread %u waits for %s, %u\n", blockIdx.x, threadIdx.x, name, value);
        __trap();
    }

private:
    long long start_ = clock64();
#else
    __device__ void end(const char*, uint32_t) {}
#endif
};

// Waits for the end of the phase of this parity: of the first phase it is 0.
__device__ inline void mbarrier_wait(Barrier* barrier, uint32_t parity, const char* name) {
    Patience patience;
    while (true) {
        uint32_t ended = 0;
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(ended)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
        if (ended) return;
        patience.end(name, parity);
    }
}

// Starts to write to where `to`, in this block's shared memory, lies in that of block `rank`, which must have
// begun; the barrier there counts the 4 bytes.
__device__ inline void st_async(float* to, Barrier* barrier, unsigned rank, float value) {
    asm volatile(
        "{\n.reg .b32 there, barrier;\n"
        "mapa.shared::cluster.u32 there, %0, %2;\n"
        "mapa.shared::cluster.u32 barrier, %1, %2;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], %3, [barrier];\n}" ::"r"(
            shared_address(to)),
        "r"(shared_address(barrier)), "r"(rank), "f"(value)
        : "memory");
}

// Every thread of the cluster comes here before one goes on, and sees what the others wrote before.
__device__ inline void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

}  // namespace ptx
}  // namespace lmkern
