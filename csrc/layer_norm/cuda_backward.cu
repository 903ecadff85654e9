// Layer norm backward on NVIDIA GPUs. With x_hat = (x - mean) rstd and g = dy weight:
//
//     dx = rstd (g - mean(g) - x_hat mean(g x_hat))
//     dweight = sum over rows of dy x_hat      dbias = sum over rows of dy
//
// Derivation: docs/kernels/layer_norm.md.
//
// A grid of p.chunks blocks goes over the rows; each block leaves its sums for dweight and dbias in its slice
// of partials, and a second kernel adds the slices. Both orders are fixed by the shapes and p.chunks: no
// atomics, the same bits each time. Rows of up to 8192 elements (4096 where they are not aligned to 16 bytes)
// are read once, into registers, where the block's sums are kept too; wider ones are read twice, with the
// sums in the slice itself.
#include "layer_norm/cuda.hpp"
#include "layer_norm/cuda_common.hpp"
#include "tile/row.hpp"

namespace lmkern::cuda {
namespace {

// Elements of a row that a thread holds of each of x, dy and the two sums: what 64 registers have room for.
template <int W>
constexpr int kElements = W == 1 ? 4 : 8;

// Threads of a block with more than one row in it.
constexpr int64_t kThreads = 512;

// The sum over a block's rows, for the columns of a thread: in registers, folded over threadIdx.y at the end.
template <int W, int V>
class ColumnSums {
public:
    __device__ ColumnSums(float*, int) {}
    __device__ void add(int i, int, const Pack<float, W>& values) {
#pragma unroll
        for (int w = 0; w < W; ++w) sums_[i][w] += values.element[w];
    }
    // Every thread of the block calls it. slice: (E,), null if nobody wants it.
    __device__ void finish(float* slice, int columns) {
        __shared__ float fold[V * W * kThreads];
        const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
        if (slice == nullptr) return;
        if (blockDim.y > 1) {
            __syncthreads();
            for (int i = 0; i < V; ++i)
                for (int w = 0; w < W; ++w) fold[(i * W + w) * threads + thread] = sums_[i][w];
            __syncthreads();
            if (threadIdx.y > 0) return;
            for (int i = 0; i < V; ++i)
                for (int w = 0; w < W; ++w)
                    for (unsigned y = 1; y < blockDim.y; ++y)
                        sums_[i][w] += fold[(i * W + w) * threads + y * blockDim.x + thread];
        }
        for_packs<W, V>(columns, [&](int i, int column) {
            Pack<float, W> pack;
            for (int w = 0; w < W; ++w) pack.element[w] = sums_[i][w];
            store_pack(slice + column, pack);
        });
    }

private:
    float sums_[V][W] = {};
};

// Likewise in memory, for one row at a time: a thread reads and writes its own columns alone.
template <int W>
class ColumnSums<W, 0> {
public:
    __device__ ColumnSums(float* slice, int columns) : slice_(slice) {
        if (slice_ != nullptr)
            for_packs<W, 0>(columns, [&](int, int column) { store_pack(slice_ + column, Pack<float, W>{}); });
    }
    __device__ void add(int, int column, Pack<float, W> values) {
        if (slice_ == nullptr) return;
        const Pack<float, W> before = *reinterpret_cast<const Pack<float, W>*>(slice_ + column);
#pragma unroll
        for (int w = 0; w < W; ++w) values.element[w] += before.element[w];
        store_pack(slice_ + column, values);
    }
    __device__ void finish(float*, int) {}

private:
    float* slice_;
};

// Grid: p.chunks blocks; block b takes rows b blockDim.y + threadIdx.y, and so on in steps of the grid.
// Traffic: 3 R E elements + 8 R bytes, and 8 E bytes a block.
template <class T, class P, int W, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) backward_kernel(LayerNormParams p) {
    __shared__ float scratch[2][kMaxThreads / 32];
    const P* weight = static_cast<const P*>(p.weight);
    const int all_columns = static_cast<int>(p.columns);
    float* slice = static_cast<float*>(p.partials) + 2 * p.columns * blockIdx.x;
    float* dweight_slice = p.dweight == nullptr ? nullptr : slice;
    float* dbias_slice = p.dbias == nullptr ? nullptr : slice + p.columns;
    ColumnSums<W, V> dweight(dweight_slice, all_columns);
    ColumnSums<W, V> dbias(dbias_slice, all_columns);

    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < p.rows; first += step) {
        const int64_t row = first + threadIdx.y;
        // Beyond the last row a thread has nothing to read, but takes part in the sums.
        const int columns = row < p.rows ? all_columns : 0;
        const Row<T, W, V> x(static_cast<const T*>(p.x) + row * p.x_stride, columns);
        const Row<T, W, V> dy(static_cast<const T*>(p.dy) + row * p.dy_stride, columns);
        const float mean = row < p.rows ? static_cast<const float*>(p.mean)[row] : 0.0f;
        const float rstd = row < p.rows ? static_cast<const float*>(p.rstd)[row] : 0.0f;
        const auto x_hat_at = [&](int i, int column) {
            Pack<float, W> x_hat = x.at(i, column);
#pragma unroll
            for (int w = 0; w < W; ++w) x_hat.element[w] = (x_hat.element[w] - mean) * rstd;
            return x_hat;
        };

        float sums[2] = {0.0f, 0.0f};  // of g, and of g x_hat
        for_packs<W, V>(columns, [&](int i, int column) {
            const Pack<float, W> x_hat = x_hat_at(i, column), dy_part = dy.at(i, column);
            const Pack<float, W> scale = load_or<W>(weight, column, 1.0f);
            Pack<float, W> product;
#pragma unroll
            for (int w = 0; w < W; ++w) {
                const float g = dy_part.element[w] * scale.element[w];
                sums[0] += g;
                sums[1] += g * x_hat.element[w];
                product.element[w] = dy_part.element[w] * x_hat.element[w];
            }
            dweight.add(i, column, product);
            dbias.add(i, column, dy_part);
        });
        if (p.dx == nullptr) continue;
        sum_over_threads(sums, scratch);
        const float g_mean = sums[0] / static_cast<float>(p.columns);
        const float along = sums[1] / static_cast<float>(p.columns);
        T* dx = static_cast<T*>(p.dx) + row * p.columns;
        for_packs<W, V>(columns, [&](int i, int column) {
            const Pack<float, W> x_hat = x_hat_at(i, column), dy_part = dy.at(i, column);
            const Pack<float, W> scale = load_or<W>(weight, column, 1.0f);
            Pack<float, W> part;
#pragma unroll
            for (int w = 0; w < W; ++w) {
                const float g = dy_part.element[w] * scale.element[w];
                part.element[w] = (g - g_mean - x_hat.element[w] * along) * rstd;
            }
            store_pack(dx + column, part);
        });
    }
    dweight.finish(dweight_slice, all_columns);
    dbias.finish(dbias_slice, all_columns);
}

// Lanes that share out the slices of a column.
constexpr int64_t kLanes = 32;

// Grid: (E / 32, 2): dweight, dbias. Block: 32 columns by up to kLanes lanes; lane l adds the slices l, l +
// lanes, and so on, and the lanes are added in order.
__global__ void __launch_bounds__(32 * kLanes) sum_chunks_kernel(LayerNormParams p) {
    __shared__ float lane_sums[kLanes][32];
    float* out = static_cast<float*>(blockIdx.y == 0 ? p.dweight : p.dbias);
    if (out == nullptr) return;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
    const float* partials = static_cast<const float*>(p.partials) + blockIdx.y * p.columns + column;
    float total = 0.0f;
    if (column < p.columns)
        for (int64_t chunk = threadIdx.y; chunk < p.chunks; chunk += blockDim.y)
            total += partials[chunk * 2 * p.columns];
    lane_sums[threadIdx.y][threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.y > 0 || column >= p.columns) return;
    for (unsigned lane = 1; lane < blockDim.y; ++lane) total += lane_sums[lane][threadIdx.x];
    out[column] = total;
}

template <class T, class P, int W, class What>
void launch_backward(const LayerNormParams& p, const What& what) {
    const auto kernel = p.columns <= kMaxThreads * kElements<W> ? backward_kernel<T, P, W, kElements<W> / W>
                                                                : backward_kernel<T, P, W, 0>;
    const dim3 block = block_for(p.columns, kElements<W>, kThreads);
    launch(kernel, dim3(static_cast<unsigned>(p.chunks)), block, p.stream, p, what);
}

}  // namespace

void layer_norm_backward(const LayerNormParams& p) {
    const auto what = [&] { return describe("backward", p); };
    const DeviceGuard guard(p.device, what);
    with_types(p, [&](auto type, auto parameter_type) {
        using T = typename decltype(type)::type;
        using P = typename decltype(parameter_type)::type;
        if (in_packs(p, sizeof(T)))
            launch_backward<T, P, 16 / sizeof(T)>(p, what);
        else
            launch_backward<T, P, 1>(p, what);
    });
    if (p.dweight == nullptr && p.dbias == nullptr) return;
    const dim3 grid(static_cast<unsigned>(ceil_div(p.columns, 32)), 2);
    const dim3 block(32, static_cast<unsigned>(std::min(p.chunks, kLanes)));
    launch(sum_chunks_kernel, grid, block, p.stream, p, what);
}

}  // namespace lmkern::cuda
