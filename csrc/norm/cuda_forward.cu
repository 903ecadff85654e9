// The norms forward on NVIDIA GPUs. Rows of up to 16384 elements (4096 where they are not aligned to 16
// bytes) are read once, into a block's registers, and those of up to 16 times as many into a cluster's; of
// wider ones, and where the GPU has no clusters, each pass reads h again.
#include "norm/cuda.hpp"
#include "norm/cuda_common.hpp"
#include "tile/row.hpp"

namespace lmkern::cuda {
namespace {

// Packs of a row that a thread holds, where one for each thread of a warp is not enough: what 64 registers
// have room for of x and h.
template <int W>
constexpr int kPacks = W == 1 ? 4 : 16 / W;

// Threads of a block with more than one row in it.
constexpr int64_t kThreads = 128;

// Grid: any number of blocks, or clusters of them; b takes rows b blockDim.y + threadIdx.y, and so on in
// steps of the grid.
//
//     h    = residual + dropout(x), or x
//     mean = sum(h) / E                               RMS norm: 0
//     rstd = 1 / sqrt(sum((h - mean)^2) / E + eps)
//     y    = (h - mean) rstd (offset + weight) + bias
//
// h counts as it is stored. Traffic: 2 R E elements, 4 R E with a residual, and 8 R bytes; weight and bias
// stay in the L2 cache.
template <class T, class S, int W, int V, bool CLUSTERED>
__global__ void __launch_bounds__(kMaxThreads, 1) forward_kernel(CudaNormParams call) {
    if constexpr (CLUSTERED && !ptx::kHasClusters) return;
    const NormParams& p = call.norm;
    RowSum<1, CLUSTERED> sum_over_row(*reinterpret_cast<SumScratch<1>*>(ptx::dynamic_shared()));
    const auto share = Share<CLUSTERED>::template of<W>(static_cast<int>(p.columns));
    const float all_columns = static_cast<float>(p.columns);
    const unsigned step = share.units * blockDim.y;
    int64_t row = static_cast<int64_t>(share.unit) * blockDim.y + threadIdx.y;
    for (; row - threadIdx.y < p.rows; row += step) {
        // Beyond the last row a thread has nothing to read, but takes part in the sums.
        const int columns = row < p.rows ? share.columns : 0;
        const T* x_row = static_cast<const T*>(p.x) + row * p.x_stride + share.first;
        // Without a residual S is T.
        const S* read_row = p.residual == nullptr
                                ? reinterpret_cast<const S*>(x_row)
                                : static_cast<const S*>(p.residual) + row * p.residual_stride + share.first;
        Row<S, W, V> h(read_row, columns);
        if (p.residual != nullptr) {
            const Row<T, W, V> x(x_row, columns);
            h.become(static_cast<S*>(p.h) + row * p.columns + share.first, columns, [&](int i, int column) {
                Pack<float, W> part = x.at(i, column);
                drop(p, row, share.first + column, part);
                const Pack<float, W> residual = h.at(i, column);
#pragma unroll
                for (int w = 0; w < W; ++w) part.element[w] += residual.element[w];
                return part;
            });
        }

        float mean = 0.0f;
        if (p.centred) {
            float sum[1] = {0.0f};
            for_packs<W, V>(columns, [&](int i, int column) {
                const Pack<float, W> part = h.at(i, column);
                float packed = 0.0f;
#pragma unroll
                for (int w = 0; w < W; ++w) packed += part.element[w];
                sum[0] += packed;
            });
            sum_over_row(sum);
            mean = sum[0] / all_columns;
        }

        float squares[1] = {0.0f};
        for_packs<W, V>(columns, [&](int i, int column) {
            const Pack<float, W> part = h.at(i, column);
            float packed = 0.0f;
#pragma unroll
            for (int w = 0; w < W; ++w) packed += (part.element[w] - mean) * (part.element[w] - mean);
            squares[0] += packed;
        });
        sum_over_row(squares);
        const float rstd = 1.0f / sqrtf(squares[0] / all_columns + static_cast<float>(p.eps));

        T* y = static_cast<T*>(p.y) + row * p.columns + share.first;
        const float offset = static_cast<float>(p.offset);
        for_packs<W, V>(columns, [&](int i, int column) {
            Pack<float, W> part = h.at(i, column);
            const Pack<float, W> scale =
                load_parameter<T, W>(p, p.weight, share.first + column, offset, 1.0f);
            const Pack<float, W> shift = load_parameter<T, W>(p, p.bias, share.first + column, 0.0f, 0.0f);
#pragma unroll
            for (int w = 0; w < W; ++w)
                part.element[w] = (part.element[w] - mean) * rstd * scale.element[w] + shift.element[w];
            store_pack(y + column, part);
        });
        if (threadIdx.x == 0 && row < p.rows && share.first == 0) {
            if (p.centred) static_cast<float*>(p.mean)[row] = mean;
            static_cast<float*>(p.rstd)[row] = rstd;
        }
    }
}

}  // namespace

void norm_forward(const CudaNormParams& call) {
    const NormParams& p = call.norm;
    const auto what = [&] { return describe("forward", call); };
    if (p.rows == 0) return;
    const DeviceGuard guard(call.device, what);
    with_types_and_packs(p, [&](auto type, auto residual_type, auto width) {
        using T = typename decltype(type)::type;
        using S = typename decltype(residual_type)::type;
        constexpr int W = decltype(width)::value, V = kPacks<W>;
        // Of a cluster's blocks two share a processor, or one is as wide as registers allow.
        if (const Cluster cluster = cluster_for(p.columns, kMaxThreads / 2 * V * W, kMaxThreads * V * W);
            p.columns > kMaxThreads * V * W && cluster.size > 0) {
            const dim3 block(block_for(cluster.share, V * W, kThreads).x);
            const auto blocks = static_cast<unsigned>(std::min<int64_t>(p.rows, INT32_MAX / cluster.size));
            if (launch_clusters(forward_kernel<T, S, W, V, true>, dim3(blocks * cluster.size), block,
                                cluster.size, call.stream, call, what, sizeof(SumScratch<1>)))
                return;
        }
        const bool one = p.columns <= 32 * W, registers = p.columns <= kMaxThreads * V * W;
        const auto kernel = one         ? forward_kernel<T, S, W, 1, false>
                            : registers ? forward_kernel<T, S, W, V, false>
                                        : forward_kernel<T, S, W, 0, false>;
        const dim3 block = block_for(p.columns, one ? W : V * W, kThreads);
        const int64_t blocks = std::min<int64_t>(ceil_div(p.rows, block.y), INT32_MAX);
        launch(kernel, dim3(static_cast<unsigned>(blocks)), block, call.stream, call, what,
               sizeof(SumScratch<1>));
    });
}

}  // namespace lmkern::cuda
