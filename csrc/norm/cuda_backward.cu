// The norms backward on NVIDIA GPUs. With x_hat = (h - mean) rstd and g = dy (offset + weight)
// (docs/kernels/layer_norm.md):
//
//     dresidual = rstd (g - mean(g) - x_hat mean(g x_hat)) + dh
//     dx = dresidual, times dropout's factors
//     dweight = sum over rows of dy x_hat      dbias = sum over rows of dy
//
// RMS norm is the same with mean = 0, and without mean(g) and dbias.
//
// Rows of up to 8192 elements (4096 where they are not aligned to 16 bytes) are read once, into registers: a
// grid of p.chunks blocks goes over them, and each block leaves its sums for dweight and dbias in its slice
// of partials. Those of up to 262144 (49152 where they are not aligned) are read once too, by p.chunks
// clusters of blocks; beyond 65536 elements the sums for dweight and dbias live in shared memory.
// For wider rows, and where the GPU has no clusters, one grid makes dx and dresidual, reading each row twice,
// and another the slices. The blocks that end last add the slices. Every order is fixed by the shapes and
// p.chunks, whoever comes last: the same bits each time.
#include "norm/cuda.hpp"
#include "norm/cuda_common.hpp"
#include "tile/row.hpp"

namespace lmkern::cuda {
namespace {

// Elements of a row that a thread holds of each of h, dy and the two sums, and the most threads of a block
// that holds rows: 128 registers a thread have room for them.
template <int W>
constexpr int kElements = W == 1 ? 8 : 16;
constexpr int64_t kThreads = 512;

// Threads of a block that sums columns.
constexpr int64_t kColumnThreads = 128;

// Slices that one of their blocks adds: few enough for one to do, and for their sums likewise.
constexpr int kGroup = 16;

// The slice that a block leaves its sums in: (2, E), each null if nobody wants it.
struct Slice {
    float* dweight;
    float* dbias;

    __device__ Slice(const NormParams& p, int64_t chunk, int64_t first_column) {
        float* start = static_cast<float*>(p.partials) + 2 * p.columns * chunk + first_column;
        dweight = p.dweight == nullptr ? nullptr : start;
        dbias = p.dbias == nullptr ? nullptr : start + p.columns;
    }
};

// A sum over a block's rows for the columns of a thread, folded over threadIdx.y at the end.
template <int W, int V, bool SHARED>
class ColumnSums {
public:
    __device__ explicit ColumnSums(float*) {}
    __device__ void add(int i, const Pack<float, W>& pack) {
#pragma unroll
        for (int w = 0; w < W; ++w) sums_[i][w] += pack.element[w];
    }
    // Every thread of the block calls it. to: (E,) or null.
    __device__ void finish(float* to, int columns) {
        __shared__ float fold[V * W * kThreads];
        const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
        if (to == nullptr) return;
        if (blockDim.y > 1) {
            __syncthreads();
            each([&](int i, int w) { fold[(i * W + w) * threads + thread] = sums_[i][w]; });
            __syncthreads();
            if (threadIdx.y > 0) return;
            each([&](int i, int w) {
                for (unsigned y = 1; y < blockDim.y; ++y)
                    sums_[i][w] += fold[(i * W + w) * threads + y * blockDim.x + thread];
            });
        }
        for_packs<W, V>(columns, [&](int i, int column) {
            Pack<float, W> pack;
#pragma unroll
            for (int w = 0; w < W; ++w) pack.element[w] = sums_[i][w];
            store_pack(to + column, pack);
        });
    }

private:
    // use(i, w), unrolled: an index known only at run time would put the sums in memory.
    template <class Use>
    __device__ static void each(const Use& use) {
#pragma unroll
        for (int i = 0; i < V; ++i)
#pragma unroll
            for (int w = 0; w < W; ++w) use(i, w);
    }

    float sums_[V][W] = {};
};

// Rows that are read each time: their columns are summed by column_sums_kernel.
template <int W>
class ColumnSums<W, 0, false> {
public:
    __device__ explicit ColumnSums(float*) {}
    __device__ void add(int, const Pack<float, W>&) {}
    __device__ void finish(float*, int) {}
};

// In shared memory, 4 V W bytes a thread, 16 at a time from neighbouring threads; null: nobody wants it.
template <int W, int V>
class ColumnSums<W, V, true> {
public:
    __device__ explicit ColumnSums(float* shared) : shared_(shared) {
        if (shared_ == nullptr) return;
        for (int i = 0; i < V; ++i)
            for (int w = 0; w < W; w += 4) *at(i, w) = float4{0.0f, 0.0f, 0.0f, 0.0f};
    }
    __device__ void add(int i, const Pack<float, W>& pack) {
        if (shared_ == nullptr) return;
#pragma unroll
        for (int w = 0; w < W; w += 4) {
            float4 sums = *at(i, w);
            sums.x += pack.element[w], sums.y += pack.element[w + 1];
            sums.z += pack.element[w + 2], sums.w += pack.element[w + 3];
            *at(i, w) = sums;
        }
    }
    __device__ void finish(float* to, int columns) {
        if (to == nullptr) return;
        for_packs<W, V>(columns, [&](int i, int column) {
#pragma unroll
            for (int w = 0; w < W; w += 4) *reinterpret_cast<float4*>(to + column + w) = *at(i, w);
        });
    }

private:
    __device__ float4* at(int i, int w) {
        const int thread = made_here(static_cast<int>(threadIdx.x)), threads = static_cast<int>(blockDim.x);
        return reinterpret_cast<float4*>(shared_) + (i * (W / 4) + w / 4) * threads + thread;
    }

    float* shared_;
};

// Dynamic shared memory: SumScratch, and then the sums for dweight and dbias where they live there.
constexpr size_t kScratchBytes = (sizeof(SumScratch<2>) + 15) / 16 * 16;

// Behind the slices: for each part of the columns the blocks that have come of each group, and the groups.
__device__ __host__ inline int* counters_of(const NormParams& p) {
    return reinterpret_cast<int*>(static_cast<float*>(p.partials) + 2 * p.chunks * p.columns);
}
__device__ __host__ inline int groups_of(const NormParams& p) {
    return static_cast<int>((p.chunks + kGroup - 1) / kGroup);
}

// Whether this block comes last of `members`, and then sees what they wrote before. Every thread of the block
// calls it. counter: 0 at first.
__device__ inline bool comes_last(int* counter, int members) {
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        __threadfence();
        last = atomicAdd(counter, 1) == members - 1;
        __threadfence();
    }
    return __syncthreads_or(last);
}

// to[column] = sum of from[i * step + column] over i, in order; to: null if nobody wants it.
template <int W>
__device__ void add_slices(const float* from, int64_t step, int count, float* to, int columns) {
    if (to == nullptr) return;
    const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
    for (int column = thread * W; column < columns; column += threads * W) {
        Pack<float, W> total{};
#pragma unroll 8
        for (int i = 0; i < count; ++i) {
            const auto part = *reinterpret_cast<const Pack<float, W>*>(from + i * step + column);
#pragma unroll
            for (int w = 0; w < W; ++w) total.element[w] += part.element[w];
        }
        store_pack(to + column, total);
    }
}

// dweight and dbias of these columns, once every block has left its slice: the last of a group adds those of
// the group, in the first of them, and the last of these the groups'. part: of the columns, with counters of
// its own.
template <int W>
__device__ void add_up(const NormParams& p, unsigned part, unsigned chunk, int first_column, int columns) {
    if (p.dweight == nullptr && p.dbias == nullptr) return;
    const int groups = groups_of(p), group = static_cast<int>(chunk) / kGroup;
    int* counters = counters_of(p) + static_cast<int64_t>(part) * (groups + 1);
    const int64_t step = 2 * p.columns;
    const int members = min(kGroup, static_cast<int>(p.chunks) - group * kGroup);
    if (!comes_last(counters + group, members)) return;
    constexpr int F = W == 1 ? 1 : 4;
    const Slice sum(p, group * kGroup, first_column), sums(p, 0, first_column);
    add_slices<F>(sum.dweight, step, members, sum.dweight, columns);
    add_slices<F>(sum.dbias, step, members, sum.dbias, columns);
    if (!comes_last(counters + groups, groups)) return;
    const auto out = [&](void* start) {
        return start == nullptr ? nullptr : static_cast<float*>(start) + first_column;
    };
    add_slices<F>(sums.dweight, kGroup * step, groups, out(p.dweight), columns);
    add_slices<F>(sums.dbias, kGroup * step, groups, out(p.dbias), columns);
}

// Grid: any number of blocks or clusters, p.chunks where V > 0; b takes rows b blockDim.y + threadIdx.y, and
// so on in steps of the grid. Traffic: 3 R E elements, one more for each of dh and a second result, and 8 R
// bytes; 8 E bytes a block.
template <class T, class S, int W, int V, bool CLUSTERED>
__global__ void __launch_bounds__(V > 0 ? kThreads : kMaxThreads, 1) backward_kernel(CudaNormParams call) {
    if constexpr (CLUSTERED && !ptx::kHasClusters) return;
    const NormParams& p = call.norm;
    unsigned char* memory = ptx::dynamic_shared();
    RowSum<2, CLUSTERED> sum_over_row(*reinterpret_cast<SumScratch<2>*>(memory));
    const auto share = Share<CLUSTERED>::template of<W>(static_cast<int>(p.columns));
    const float offset = static_cast<float>(p.offset);
    float* sums_memory = reinterpret_cast<float*>(memory + kScratchBytes);
    constexpr bool kInShared = V * W > kElements<W>;
    ColumnSums<W, V, kInShared> dweight(p.dweight == nullptr ? nullptr : sums_memory);
    ColumnSums<W, V, kInShared> dbias(p.dbias == nullptr ? nullptr : sums_memory + V * W * blockDim.x);

    const unsigned step = share.units * blockDim.y;
    int64_t row = static_cast<int64_t>(share.unit) * blockDim.y + threadIdx.y;
    for (; row - threadIdx.y < p.rows; row += step) {
        // Beyond the last row a thread has nothing to read, but takes part in the sums.
        const bool there = CLUSTERED || row < p.rows;
        const int columns = there ? share.columns : 0;
        const Row<S, W, V> h(static_cast<const S*>(p.h) + row * p.h_stride + share.first, columns);
        const Row<T, W, V> dy(static_cast<const T*>(p.dy) + row * p.dy_stride + share.first, columns);
        const float mean = there && p.centred ? static_cast<const float*>(p.mean)[row] : 0.0f;
        const float rstd = there ? static_cast<const float*>(p.rstd)[row] : 0.0f;

        float sums[2] = {0.0f, 0.0f};  // of g, and of g x_hat
        for_packs<W, V>(columns, [&](int i, int column) {
            const Pack<float, W> h_part = h.at(i, column), dy_part = dy.at(i, column);
            Pack<float, W> dweight_part;
            const Pack<float, W> scale =
                load_parameter<T, W>(p, p.weight, share.first + column, offset, 1.0f);
#pragma unroll
            for (int w = 0; w < W; ++w) {
                const float x_hat = (h_part.element[w] - mean) * rstd;
                const float g = dy_part.element[w] * scale.element[w];
                sums[0] += g;
                sums[1] += g * x_hat;
                dweight_part.element[w] = dy_part.element[w] * x_hat;
            }
            dweight.add(i, dweight_part);
            dbias.add(i, dy_part);
        });
        if (p.dx == nullptr && p.dresidual == nullptr) continue;
        sum_over_row(sums);
        const float g_mean = p.centred ? sums[0] / static_cast<float>(p.columns) : 0.0f;
        const float along = sums[1] / static_cast<float>(p.columns);
        for_packs<W, V>(columns, [&](int i, int column) {
            Pack<float, W> part = h.at(i, column);
            const Pack<float, W> dy_part = dy.at(i, column);
            const Pack<float, W> scale =
                load_parameter<T, W>(p, p.weight, share.first + column, offset, 1.0f);
#pragma unroll
            for (int w = 0; w < W; ++w) {
                const float x_hat = (part.element[w] - mean) * rstd;
                part.element[w] = (dy_part.element[w] * scale.element[w] - g_mean - x_hat * along) * rstd;
            }
            if (p.dh != nullptr) {
                const S* dh = static_cast<const S*>(p.dh) + row * p.dh_stride + share.first;
                const Pack<float, W> dh_part = to_float(load_pack<W>(dh + column));
#pragma unroll
                for (int w = 0; w < W; ++w) part.element[w] += dh_part.element[w];
            }
            const int64_t place = row * p.columns + share.first + column;
            if (p.dresidual != nullptr) store_pack(static_cast<S*>(p.dresidual) + place, part);
            if (p.dx == nullptr) return;
            drop(p, row, share.first + column, part);
            store_pack(static_cast<T*>(p.dx) + place, part);
        });
    }
    const Slice slice(p, share.unit, share.first);
    dweight.finish(slice.dweight, share.columns);
    dbias.finish(slice.dbias, share.columns);
    if constexpr (V > 0)
        add_up<W>(p, CLUSTERED ? ptx::cluster_rank() : 0, share.unit, share.first, share.columns);
}

// Grid: (E / (W blockDim.x), p.chunks); a block takes W blockDim.x columns of the rows blockIdx.y, and so on
// in steps of p.chunks. Traffic: 2 R E elements, and 8 E bytes a chunk.
template <class T, class S, int W>
__global__ void __launch_bounds__(kColumnThreads) column_sums_kernel(CudaNormParams call) {
    const NormParams& p = call.norm;
    const int block_columns = blockDim.x * W, first_column = blockIdx.x * block_columns;
    const int column = first_column + threadIdx.x * W, columns = static_cast<int>(p.columns) - first_column;
    const int64_t rows = column < p.columns ? p.rows : 0;
    Pack<float, W> dweight{}, dbias{};
#pragma unroll 4
    for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
        const auto h = to_float(load_pack<W>(static_cast<const S*>(p.h) + row * p.h_stride + column));
        const auto dy = to_float(load_pack<W>(static_cast<const T*>(p.dy) + row * p.dy_stride + column));
        const float mean = p.centred ? static_cast<const float*>(p.mean)[row] : 0.0f;
        const float rstd = static_cast<const float*>(p.rstd)[row];
#pragma unroll
        for (int w = 0; w < W; ++w) {
            dweight.element[w] += dy.element[w] * ((h.element[w] - mean) * rstd);
            dbias.element[w] += dy.element[w];
        }
    }
    const Slice slice(p, blockIdx.y, column);
    if (slice.dweight != nullptr && column < p.columns) store_pack(slice.dweight, dweight);
    if (slice.dbias != nullptr && column < p.columns) store_pack(slice.dbias, dbias);
    add_up<W>(p, blockIdx.x, blockIdx.y, first_column, min(block_columns, columns));
}

// Zeroes the counters of so many parts of the columns.
template <class What>
void clear_counters(const CudaNormParams& call, unsigned parts, const What& what) {
    const NormParams& p = call.norm;
    if (p.dweight == nullptr && p.dbias == nullptr) return;
    const size_t counters = size_t{parts} * (groups_of(p) + 1);
    check(cudaMemsetAsync(counters_of(p), 0, counters * sizeof(int),
                          reinterpret_cast<cudaStream_t>(call.stream)),
          what);
}

// Everything by clusters; false where a row is too wide for one or the GPU has none.
template <class T, class S, int W, class What>
bool in_clusters(const CudaNormParams& call, const What& what) {
    const NormParams& p = call.norm;
    // Where each element has an address of its own fewer of them leave room for the cluster's.
    constexpr int kFew = W == 1 ? 6 : kElements<W>;
    const auto with = [&](auto kernel, const Cluster& cluster, int elements, size_t sums) {
        const dim3 block(block_for(cluster.share, elements, kThreads).x);
        clear_counters(call, cluster.size, what);
        return launch_clusters(kernel, dim3(static_cast<unsigned>(p.chunks) * cluster.size), block,
                               cluster.size, call.stream, call, what, kScratchBytes + sums * block.x);
    };
    constexpr int64_t kShare = kThreads * kFew;
    if (const Cluster cluster = cluster_for(p.columns, kShare, W == 1 ? kShare : 0); cluster.size > 0)
        return with(backward_kernel<T, S, W, kFew / W, true>, cluster, kFew, 0);
    if constexpr (W > 1) {
        constexpr int kMany = 2 * kElements<W>;
        if (const Cluster cluster = cluster_for(p.columns, 0, kThreads * kMany); cluster.size > 0)
            return with(backward_kernel<T, S, W, kMany / W, true>, cluster, kMany, 2 * kMany * sizeof(float));
    }
    return false;
}

}  // namespace

void norm_backward(const CudaNormParams& call) {
    const NormParams& p = call.norm;
    const auto what = [&] { return describe("backward", call); };
    const DeviceGuard guard(call.device, what);
    const auto chunks = static_cast<unsigned>(p.chunks);
    with_types_and_packs(p, [&](auto type, auto residual_type, auto width) {
        using T = typename decltype(type)::type;
        using S = typename decltype(residual_type)::type;
        constexpr int W = decltype(width)::value;
        const dim3 block = block_for(p.columns, kElements<W>, kThreads);
        if (p.columns <= kThreads * kElements<W>) {
            clear_counters(call, 1, what);
            launch(backward_kernel<T, S, W, kElements<W> / W, false>, dim3(chunks), block, call.stream, call,
                   what, kScratchBytes);
            return;
        }
        if (in_clusters<T, S, W>(call, what)) return;
        const dim3 every_row(static_cast<unsigned>(std::min<int64_t>(p.rows, INT32_MAX)));
        if (p.rows > 0 && (p.dx != nullptr || p.dresidual != nullptr))
            launch(backward_kernel<T, S, W, 0, false>, every_row, block, call.stream, call, what,
                   kScratchBytes);
        const dim3 grid(static_cast<unsigned>(ceil_div(p.columns, W * kColumnThreads)), chunks);
        if (p.dweight == nullptr && p.dbias == nullptr) return;
        clear_counters(call, grid.x, what);
        launch(column_sums_kernel<T, S, W>, grid, dim3(kColumnThreads), call.stream, call, what);
    });
}

}  // namespace lmkern::cuda
