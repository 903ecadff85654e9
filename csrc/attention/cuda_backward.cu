// Attention backward on Hopper. Derivation: docs/kernels/attention.md. With s = softmax_scale q k^T:
//
//     p = exp(s - lse)      ds = p (dout v^T - delta)      delta = rowsum(dout out) - dlse
//     dv = p^T dout         dk = softmax_scale ds^T q      dq = softmax_scale ds k
//
// Three kernels: delta; then a block for each tile of keys, which keeps dk and dv in registers, goes over the
// queries and adds its part of dq to float32 sums in memory; then dq in its own type. The tiles of keys add
// to a block of dq in their order, so the bits are the same every time.
#include "attention/cuda_backward_columns.hpp"
#include "attention/cuda_backward_ends.hpp"
#include "attention/cuda_backward_keys.hpp"
#include "attention/cuda_common.hpp"

namespace lmkern::cuda {
namespace {

// Warpgroup 0: warp 0 copies, warp 1 brings lse and delta, warp 2 adds dq to memory. The others consume.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

// Grid: a block for each tile of the schedule; one that adds to dq later than another comes later. Products:
// 10 N_q N_k D of a query head, half of it if causal.
template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(const __grid_constant__ Call call) {
    Shared<T, D>& shared = *reinterpret_cast<Shared<T, D>*>(ptx::dynamic_shared());
    const KeyTile tile = call.schedule.at(call.p, blockIdx.x);
    if (tile.block < 0) return;
    const Work work(call.p, tile, kKeys<D>);
    if (threadIdx.x == 0) shared.init_barriers();
    __syncthreads();
    if (threadIdx.x < kWarpgroup) {
        ptx::setmaxnreg_dec<kProducerRegisters>();
        const int warp = static_cast<int>(threadIdx.x) / 32;
        if (threadIdx.x == 0) copy<T, D>(call, shared, work);
        if (warp == 1) bring_statistics<T, D>(call, shared, work);
        if (warp == 2 && call.p.dq != nullptr) add_dq<T, D>(call, shared, work);
    } else {
        ptx::setmaxnreg_inc<kConsumerRegisters>();
        const int consumer = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
        if constexpr (D <= 128)
            consume_by_keys<T, D>(call, shared, work, consumer);
        else
            consume_by_columns<T, D>(call, shared, work, consumer);
    }
}

}  // namespace

void attention_backward(const CudaAttentionParams& c) {
    const auto what = [&] { return describe("backward", c); };
    const AttentionParams& p = c.attention;
    if (p.sequences * p.heads * std::max(p.n_q, p.n_k) == 0) return;
    const DeviceGuard guard(c.device, what);
    with_tile(p, [&](auto type, auto head_dim) {
        using T = typename decltype(type)::type;
        constexpr int D = decltype(head_dim)::value;
        const auto count = [](int64_t n) { return static_cast<unsigned>(n); };
        float* delta = static_cast<float*>(c.delta);
        float* dq_sum = static_cast<float*>(c.dq_sum);
        if (const int64_t rows = p.batch * p.heads * p.n_q; rows > 0)
            launch(delta_kernel<T>, dim3(count(ceil_div(rows, kDeltaRows))), dim3(kDeltaThreads), c.stream,
                   DeltaCall{p, delta}, what);
        const KeySchedule schedule(p, kKeys<D>);
        const Call call{map_of(what, p.q, p.q_strides, p.batch, p.heads, p.n_q, p.head_dim, kQueries),
                        map_of(what, p.k, p.k_strides, p.batch, p.heads_kv, p.n_k, p.head_dim, kKeys<D>),
                        map_of(what, p.v, p.v_strides, p.batch, p.heads_kv, p.n_k, p.head_dim, kKeys<D>),
                        map_of(what, p.dout, p.dout_strides, p.batch, p.heads, p.n_q, p.head_dim, kQueries),
                        p,
                        schedule,
                        delta,
                        dq_sum,
                        static_cast<int*>(c.turns)};
        if (schedule.tiles > 0)
            launch(backward_kernel<T, D>, dim3(count(schedule.tiles)), dim3(kThreads), c.stream, call, what,
                   sizeof(Shared<T, D>));
        if (p.dq != nullptr && p.n_q > 0)
            launch(dq_kernel<T, D>,
                   dim3(count(ceil_div(p.n_q, kQueries)), count(p.heads), count(p.sequences)),
                   dim3(kConsumerThreads), c.stream, DqCall{p, dq_sum}, what);
    });
}

}  // namespace lmkern::cuda
