// Hopper's instructions, one function each, named as in the PTX manual (sections 9.7.9, 9.7.13 and 9.7.15 of
// PTX ISA 8.5). sm_90a only: the callers are compiled for nothing else. Barriers are in cluster.hpp, the verb
// of the products is in wgmma.hpp.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "tile/cluster.hpp"

namespace lmkern::ptx {

using TensorMap = CUtensorMap;

__device__ inline void mbarrier_arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Copies a box of a tensor (column, row, head, batch: its first element) into shared memory; the barrier
// counts the bytes, those beyond the tensor, which are zero, among them.
__device__ inline void cp_async_bulk_tensor(void* to, const TensorMap* map, Barrier* barrier, int column,
                                            int row, int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(batch)
        : "memory");
}

// The other way: a box from shared memory; what lies beyond the tensor is left out. Waited for as the bulk
// copies below.
__device__ inline void cp_async_bulk_tensor_store(const TensorMap* map, const void* from, int column, int row,
                                                  int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
        "r"(shared_address(from)), "r"(column), "r"(row), "r"(head), "r"(batch)
        : "memory");
}

// The same, added to what is there, each element in one piece.
__device__ inline void cp_reduce_async_bulk_tensor_add(const TensorMap* map, const void* from, int column,
                                                       int row, int head, int batch) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group"
        " [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
        "r"(shared_address(from)), "r"(column), "r"(row), "r"(head), "r"(batch)
        : "memory");
}

// to[i] += from[i] for `bytes` bytes of float32 from shared memory, each element in one piece.
__device__ inline void cp_reduce_async_bulk_add(float* to, const float* from, uint32_t bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
                 "r"(shared_address(from)), "r"(bytes)
                 : "memory");
}

__device__ inline void cp_async_bulk_commit_group() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until the thread's bulk copies have read shared memory.
__device__ inline void cp_async_bulk_wait_group_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Until they are done: their results are in global memory.
__device__ inline void cp_async_bulk_wait_group() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Makes this thread's stores to shared memory known to the copy engine and the tensor cores.
__device__ inline void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Between this thread's loads and stores and its copies in global memory: what another block's copies wrote
// before the counter that was read here comes before the copies that follow.
__device__ inline void fence_proxy_async_global() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Named barriers 1 to 15 (0 is __syncthreads): `threads` of them arrive, those that sync wait for all.
__device__ inline void bar_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void bar_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// The registers of each thread of this warpgroup from here on; a multiple of 8.
template <int registers>
__device__ void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// 2^x, to 2 units in the last place.
__device__ inline float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The larger one; NaN where one is.
__device__ inline float max_nan(float x, float y) {
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(y));
    return larger;
}

// Until a counter in global memory has a value; what was written before the addition that gave it is seen
// then.
__device__ inline void wait_for(const int* counter, int value, const char* name) {
    Patience patience;
    while (true) {
        int found;
        asm volatile("ld.global.acquire.gpu.b32 %0, [%1];" : "=r"(found) : "l"(counter) : "memory");
        if (found == value) return;
        patience.end(name, static_cast<uint32_t>(value));
    }
}
__device__ inline void red_release_add(int* counter, int value) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

}  // namespace lmkern::ptx
