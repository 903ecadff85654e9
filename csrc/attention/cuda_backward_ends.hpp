// The kernels before and after the backward's own: delta, and dq from its float32 sums.
#pragma once

#include "attention/cuda_backward_parts.hpp"

namespace lmkern::cuda {
namespace {

constexpr int kDeltaThreads = 128, kDeltaRows = kDeltaThreads / 32;

struct DeltaCall {
    AttentionParams p;
    float* delta;
};

// delta of kDeltaRows queries, one a warp. Grid: the rows (B, H, N_q).
template <class T>
__global__ void __launch_bounds__(kDeltaThreads) delta_kernel(const __grid_constant__ DeltaCall call) {
    const AttentionParams& p = call.p;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kDeltaRows + threadIdx.x / 32;
    if (row >= p.batch * p.heads * p.n_q) return;
    const int64_t query = row % p.n_q, head = row / p.n_q % p.heads, batch = row / p.n_q / p.heads;
    const T* out = at<const T>(p.out, p.out_strides, batch, head, query);
    const T* dout = at<const T>(const_cast<void*>(p.dout), p.dout_strides, batch, head, query);
    float sum = 0.0f;
    for (int column = static_cast<int>(threadIdx.x) % 32 * 8; column < p.head_dim; column += 32 * 8) {
        const Pack<T, 8> a = load_pack<8>(out + column), b = load_pack<8>(dout + column);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += to_float(a.element[i]) * to_float(b.element[i]);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
    if (threadIdx.x % 32 == 0)
        call.delta[row] = sum - (p.dlse == nullptr ? 0.0f : static_cast<const float*>(p.dlse)[row]);
}

struct DqCall {
    AttentionParams p;
    const float* dq_sum;
};

// dq of one block of queries. Grid: (blocks of a head, H, sequences).
template <class T, int D>
__global__ void __launch_bounds__(kConsumerThreads) dq_kernel(const __grid_constant__ DqCall call) {
    const AttentionParams& p = call.p;
    const Sequence s = sequence_of(p, blockIdx.z);
    const int64_t block = blockIdx.x, head = blockIdx.y;
    if (block * kQueries >= s.n_q) return;
    const int consumer = static_cast<int>(threadIdx.x) / kWarpgroup,
              thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    const int64_t index = (s.batch * p.heads + head) * blocks_of_head(p, kQueries) +
                          blocks_before(p, s.index, kQueries) + block;
    const int64_t first_query = block * kQueries;
    const float scale = static_cast<float>(p.softmax_scale), factor[2] = {scale, scale};
#pragma unroll
    for (int part = 0; part < kDqParts<D>; ++part) {
        const int place = part * kConsumers + consumer, first_column = place * kDqColumns<D>;
        const float* from = call.dq_sum + index * kQueries * D + place * kDqPart<D>;
        RegisterTile<kDqColumns<D>> dq;
#pragma unroll
        for (int i = 0; i < kDqColumns<D> / 2; i += 4) {
            const float4 four = *reinterpret_cast<const float4*>(from + (i / 4 * kWarpgroup + thread) * 4);
            dq.element[i] = four.x, dq.element[i + 1] = four.y, dq.element[i + 2] = four.z,
            dq.element[i + 3] = four.w;
        }
        store_rows(dq, factor,
                   at<T>(p.dq, p.dq_strides, s.batch, head, s.first_query + first_query) + first_column,
                   p.dq_strides.row, s.n_q - first_query, static_cast<int>(p.head_dim) - first_column);
    }
}

}  // namespace
}  // namespace lmkern::cuda
