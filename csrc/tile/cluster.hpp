// Clusters of blocks, which read and write each other's shared memory (PTX ISA 8.5,
// sections 9.7.12.4, 9.7.8.23 and 10). Compute capability 9.0 and later.
#pragma once

#include <cstdint>

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

// Writes to where `to`, in this block's shared memory, lies in that of block `rank`, which must have begun.
__device__ inline void store_in_block(float* to, unsigned rank, float value) {
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "st.shared::cluster.f32 [there], %2;\n}" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
        "r"(rank), "f"(value)
        : "memory");
}

// Every thread of the cluster comes here before one goes on, and sees what the others wrote before.
__device__ inline void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

}  // namespace ptx
}  // namespace lmkern
