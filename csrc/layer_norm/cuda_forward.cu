// Layer norm forward on NVIDIA GPUs. Rows of up to 4096 packs (of 16 bytes, or of one element where they are
// not aligned) are read once, into registers; wider ones three times.
#include "layer_norm/cuda.hpp"
#include "layer_norm/cuda_common.hpp"
#include "tile/row.hpp"

namespace lmkern::cuda {
namespace {

// Packs of a row that a thread holds, where one for each thread of a warp is not enough.
constexpr int kPacks = 4;

// Threads of a block with more than one row in it.
constexpr int64_t kThreads = 128;

// Grid: any number of blocks; block b takes rows b blockDim.y + threadIdx.y, and so on in steps of the grid.
//
//     mean = sum(x) / E
//     rstd = 1 / sqrt(sum((x - mean)^2) / E + eps)
//     y    = (x - mean) rstd weight + bias
//
// Traffic: 2 R E elements + 8 R bytes; weight and bias stay in the L2 cache.
template <class T, class P, int W, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) forward_kernel(LayerNormParams p) {
    __shared__ float scratch[1][kMaxThreads / 32];
    const P* weight = static_cast<const P*>(p.weight);
    const P* bias = static_cast<const P*>(p.bias);
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < p.rows; first += step) {
        const int64_t row = first + threadIdx.y;
        // Beyond the last row a thread has nothing to read, but takes part in the sums.
        const int columns = row < p.rows ? static_cast<int>(p.columns) : 0;
        const Row<T, W, V> x(static_cast<const T*>(p.x) + row * p.x_stride, columns);

        float sum[1] = {0.0f};
        for_packs<W, V>(columns, [&](int i, int column) {
            const Pack<float, W> part = x.at(i, column);
            float packed = 0.0f;
#pragma unroll
            for (int w = 0; w < W; ++w) packed += part.element[w];
            sum[0] += packed;
        });
        sum_over_threads(sum, scratch);
        const float mean = sum[0] / static_cast<float>(p.columns);

        float squares[1] = {0.0f};
        for_packs<W, V>(columns, [&](int i, int column) {
            const Pack<float, W> part = x.at(i, column);
            float packed = 0.0f;
#pragma unroll
            for (int w = 0; w < W; ++w) packed += (part.element[w] - mean) * (part.element[w] - mean);
            squares[0] += packed;
        });
        sum_over_threads(squares, scratch);
        const float variance = squares[0] / static_cast<float>(p.columns);
        const float rstd = 1.0f / sqrtf(variance + static_cast<float>(p.eps));

        T* y = static_cast<T*>(p.y) + row * p.columns;
        for_packs<W, V>(columns, [&](int i, int column) {
            Pack<float, W> part = x.at(i, column);
            const Pack<float, W> scale = load_or<W>(weight, column, 1.0f),
                                 shift = load_or<W>(bias, column, 0.0f);
#pragma unroll
            for (int w = 0; w < W; ++w)
                part.element[w] = (part.element[w] - mean) * rstd * scale.element[w] + shift.element[w];
            store_pack(y + column, part);
        });
        if (threadIdx.x == 0 && row < p.rows) {
            static_cast<float*>(p.mean)[row] = mean;
            static_cast<float*>(p.rstd)[row] = rstd;
        }
    }
}

template <class T, class P, int W, class What>
void launch_forward(const LayerNormParams& p, const What& what) {
    const bool one = p.columns <= 32 * W, registers = p.columns <= kMaxThreads * kPacks * W;
    const dim3 block = block_for(p.columns, one ? W : kPacks * W, kThreads);
    const int64_t blocks = std::min<int64_t>(ceil_div(p.rows, block.y), INT32_MAX);
    const auto kernel = one         ? forward_kernel<T, P, W, 1>
                        : registers ? forward_kernel<T, P, W, kPacks>
                                    : forward_kernel<T, P, W, 0>;
    launch(kernel, dim3(static_cast<unsigned>(blocks)), block, p.stream, p, what);
}

}  // namespace

void layer_norm_forward(const LayerNormParams& p) {
    const auto what = [&] { return describe("forward", p); };
    if (p.rows == 0) return;
    const DeviceGuard guard(p.device, what);
    with_types(p, [&](auto type, auto parameter_type) {
        using T = typename decltype(type)::type;
        using P = typename decltype(parameter_type)::type;
        if (in_packs(p, sizeof(T)))
            launch_forward<T, P, 16 / sizeof(T)>(p, what);
        else
            launch_forward<T, P, 1>(p, what);
    });
}

}  // namespace lmkern::cuda
