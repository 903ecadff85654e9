// A row of elements shared out among the threads of a block with equal threadIdx.y, and sums over it.
//
// blockDim.x is a multiple of 32. A pack is W neighbouring elements; pack i of a thread begins at column
// (i * blockDim.x + threadIdx.x) * W, so that the threads of a warp read neighbouring packs. V > 0: a thread
// has at most V packs, in registers. V = 0: any number, read again each time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/cuda_launch.hpp"
#include "core/types.hpp"
#include "tile/cluster.hpp"

namespace lmkern {

__device__ inline float to_float(float x) {
    return x;
}
__device__ inline float to_float(bfloat16 x) {
    return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ inline float to_float(float16 x) {
    return __half2float(__ushort_as_half(x.bits));
}

// Rounds to nearest even.
__device__ inline void from_float(float x, float& to) {
    to = x;
}
__device__ inline void from_float(float x, bfloat16& to) {
    to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ inline void from_float(float x, float16& to) {
    to.bits = __half_as_ushort(__float2half_rn(x));
}

// 16 bytes move in one instruction.
template <class T, int W>
struct alignas(W * sizeof(T) < 16 ? W * sizeof(T) : 16) Pack {
    T element[W];
};

// Through the read-only cache: for memory that the kernel does not write.
template <int W, class T>
__device__ Pack<T, W> load_pack(const T* from) {
    constexpr size_t bytes = W * sizeof(T);
    using Word =
        std::conditional_t<bytes % 16 == 0, uint4, std::conditional_t<bytes == 4, unsigned, unsigned short>>;
    static_assert(bytes % sizeof(Word) == 0, "load_pack: a pack is 2, 4 or a multiple of 16 bytes");
    Word words[bytes / sizeof(Word)];
#pragma unroll
    for (size_t word = 0; word < bytes / sizeof(Word); ++word)
        words[word] = __ldg(reinterpret_cast<const Word*>(from) + word);
    Pack<T, W> pack;
    memcpy(&pack, words, bytes);
    return pack;
}

template <class T, int W>
__device__ Pack<float, W> to_float(const Pack<T, W>& pack) {
    Pack<float, W> wide;
#pragma unroll
    for (int w = 0; w < W; ++w) wide.element[w] = to_float(pack.element[w]);
    return wide;
}

template <class T, int W>
__device__ Pack<T, W> from_float(const Pack<float, W>& pack) {
    Pack<T, W> narrow;
#pragma unroll
    for (int w = 0; w < W; ++w) from_float(pack.element[w], narrow.element[w]);
    return narrow;
}

template <class T, int W>
__device__ void store_pack(T* to, const Pack<float, W>& pack) {
    *reinterpret_cast<Pack<T, W>*>(to) = from_float<T>(pack);
}

// The value, for what is derived from it in a loop: the compiler would rather derive it all before the loop
// and keep it, in registers that are not there.
__device__ inline int made_here(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// body(i, column) for each pack of this thread. columns: a multiple of W.
template <int W, int V, class Body>
__device__ void for_packs(int columns, const Body& body) {
    if constexpr (V > 0) {
        const int thread = static_cast<int>(threadIdx.x), first = V * W > 16 ? made_here(thread) : thread;
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const int column = (i * static_cast<int>(blockDim.x) + first) * W;
            if (column < columns) body(i, column);
        }
    } else {
        int i = 0;
        for (int column = threadIdx.x * W; column < columns; column += blockDim.x * W) body(i++, column);
    }
}

// This thread's packs of a row.
template <class T, int W, int V>
class Row {
public:
    __device__ Row(const T* row, int columns) {
        for_packs<W, V>(columns, [&](int i, int column) { packs_[i] = load_pack<W>(row + column); });
    }
    __device__ Pack<float, W> at(int i, int) const { return to_float(packs_[i]); }
    // Each pack becomes make(i, column), rounded to T, and is written to the row `to`.
    template <class Make>
    __device__ void become(T* to, int columns, const Make& make) {
        for_packs<W, V>(columns, [&](int i, int column) {
            packs_[i] = from_float<T>(make(i, column));
            *reinterpret_cast<Pack<T, W>*>(to + column) = packs_[i];
        });
    }

private:
    Pack<T, W> packs_[V];
};

template <class T, int W>
class Row<T, W, 0> {
public:
    __device__ Row(const T* row, int) : row_(row) {}
    // Not through the read-only cache: become() may have written it.
    __device__ Pack<float, W> at(int, int column) const {
        return to_float(*reinterpret_cast<const Pack<T, W>*>(row_ + column));
    }
    template <class Make>
    __device__ void become(T* to, int columns, const Make& make) {
        for_packs<W, 0>(columns, [&](int i, int column) { store_pack(to + column, make(i, column)); });
        row_ = to;
    }

private:
    const T* row_;
};

// Each of the K sums becomes its sum over the threads of the row, the same bits in all of them. Every thread
// of the block calls it. scratch: shared, a float for each warp and sum.
template <int K>
__device__ void sum_over_threads(float (&sums)[K], float (&scratch)[K][kMaxThreads / 32]) {
    const auto over_warp = [&] {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2)
#pragma unroll
            for (int k = 0; k < K; ++k) sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], offset);
    };
    over_warp();
    if (blockDim.x == 32) return;
    const int warps = blockDim.x / 32, lane = threadIdx.x % 32, first = threadIdx.y * warps;
    // Every thread has read what the call before left in scratch.
    __syncthreads();
    if (lane == 0)
        for (int k = 0; k < K; ++k) scratch[k][first + threadIdx.x / 32] = sums[k];
    __syncthreads();
    for (int k = 0; k < K; ++k) sums[k] = lane < warps ? scratch[k][first + lane] : 0.0f;
    over_warp();
}

// The part of a row that a block has: a whole one, or its share of one that a cluster has. unit: of the
// grid's blocks or clusters, `units`.
template <bool CLUSTERED>
struct Share {
    int first, columns;
    unsigned unit, units;

    // all: the row's columns; W: of a pack, which is not cut.
    template <int W>
    static __device__ Share of(int all) {
        if constexpr (!CLUSTERED) return {0, all, blockIdx.x, gridDim.x};
        const int size = static_cast<int>(ptx::cluster_size()), share = (all + W * size - 1) / (W * size) * W;
        const int first = static_cast<int>(ptx::cluster_rank()) * share;
        return {first, max(min(share, all - first), 0), blockIdx.x / size, gridDim.x / size};
    }
};

// What the sums of K numbers over a row need of shared memory.
template <int K>
struct SumScratch {
    float of_warps[K][kMaxThreads / 32];
    // A cluster's blocks, in turns: who is still reading one sum's is not disturbed by the next, nor can the
    // one after it come before every thread here has begun the next.
    float of_blocks[2][K][kMaxCluster];
    ptx::Barrier arrived[2];
};

// Sums over rows, one after the other. CLUSTERED: every block of the cluster makes and uses one at the same
// time.
template <int K, bool CLUSTERED>
class RowSum {
public:
    __device__ explicit RowSum(SumScratch<K>& scratch) : scratch_(scratch) {
        if constexpr (!CLUSTERED) return;
        if (threadIdx.x == 0) {
            for (int turn = 0; turn < 2; ++turn) ptx::mbarrier_init(&scratch_.arrived[turn], 1);
            ptx::fence_mbarrier_init();
        }
        // A block may be written to as soon as it has begun and its barriers are there.
        ptx::cluster_sync();
    }

    // Each sum becomes that over the row, the same bits in all its threads.
    __device__ void operator()(float (&sums)[K]) {
        sum_over_threads(sums, scratch_.of_warps);
        if constexpr (!CLUSTERED) return;
        auto& of_blocks = scratch_.of_blocks[sums_ % 2];
        ptx::Barrier* arrived = &scratch_.arrived[sums_ % 2];
        const unsigned size = ptx::cluster_size();
        if (threadIdx.x == 0) ptx::mbarrier_arrive_expect_tx(arrived, size * K * sizeof(float));
        if (threadIdx.x < size)
#pragma unroll
            for (int k = 0; k < K; ++k)
                ptx::st_async(&of_blocks[k][ptx::cluster_rank()], arrived, threadIdx.x, sums[k]);
        ptx::mbarrier_wait(arrived, sums_ / 2 % 2, "the cluster's sums");
        ++sums_;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            sums[k] = 0.0f;
            for (unsigned block = 0; block < size; ++block) sums[k] += of_blocks[k][block];
        }
    }

private:
    SumScratch<K>& scratch_;
    unsigned sums_ = 0;  // that were made
};

// The block for rows of which a thread takes so many elements: threads along a row, rows at once. At most
// max_threads, or a thread takes more.
inline dim3 block_for(int64_t columns, int64_t elements_per_thread, int64_t max_threads) {
    const int64_t warps = ceil_div(columns, elements_per_thread * 32);
    const int64_t along = std::min<int64_t>(warps * 32, kMaxThreads);
    return dim3(static_cast<unsigned>(along),
                static_cast<unsigned>(std::max<int64_t>(1, max_threads / along)));
}

}  // namespace lmkern
