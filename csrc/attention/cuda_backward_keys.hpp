// The consumers of the backward kernel up to 128 columns: each owns 64 keys.
#pragma once

#include "attention/cuda_backward_parts.hpp"

namespace lmkern::cuda {

// Scores, weights and ds are transposed, (keys, queries), so that the weights and ds of a consumer's keys
// come out in registers as first factors of dv and dk. Only dq needs the ds of the other.
template <class T, int D>
__device__ void consume_by_keys(const Call& call, Shared<T, D>& shared, const Work& work, int consumer) {
    const AttentionParams& p = call.p;
    const Sequence& s = work.sequence;
    const int first_row = consumer * 64;
    const int keys_left = static_cast<int>(s.n_k) - work.first_key, n_q = static_cast<int>(s.n_q);
    const TileBand first_band(work.band, 0, work.first_key + first_row);
    const float scale = static_cast<float>(p.softmax_scale), log2_scale = scale * kLog2E;
    RegisterTile<D> dk, dv;
    bool add = false;

    wait_for_keys<T, D>(p, shared, keys_left);
    Ring<kQueryStages> ring;
    work.for_steps([&](int, int block) {
        const int stage = ring.stage, first_query = block * kQueries;
        auto &q = shared.q[stage], &dout = shared.dout[stage];
        ptx::mbarrier_wait(&shared.q_full[stage], ring.parity, "q_full");
        const bool nan = shared.nan[stage];
        ptx::mbarrier_wait(&shared.dout_full[stage], ring.parity, "dout_full");
        if (p.cu_seqlens_q != nullptr && n_q - first_query < kQueries) {
            zero_tail(q, n_q - first_query);
            zero_tail(dout, n_q - first_query);
            ptx::bar_sync(kTail, kConsumerThreads);
        }
        if (nan) clear_nan(q);
        RegisterTile<kQueries> scores, dp;  // keys by queries
        const int here = made_here(static_cast<int>(threadIdx.x));
        const int own_row = (here / kWarpgroup - 1) * 64, own_thread = here % kWarpgroup;
        ptx::wgmma_fence();
#pragma unroll
        for (int column = 0; column < D; column += 16)
            ptx::wgmma<0, 0>(scores.element, shared.k.along_columns(own_row, column),
                             q.along_columns(0, column), column > 0, T{});
        ptx::wgmma_commit_group();
#pragma unroll
        for (int column = 0; column < D; column += 16)
            ptx::wgmma<0, 0>(dp.element, shared.v.along_columns(own_row, column),
                             dout.along_columns(0, column), column > 0, T{});
        ptx::wgmma_commit_group();

        const TileBand band = first_band.from_query(first_query);
        const bool cut = band.cuts(kQueries, 64);
        ptx::wgmma_wait_group<1>(scores.element);
        make_weights(scores, shared.lse[stage], log2_scale);
        if (cut) clear_hidden(scores, band);
        FactorTile<T, kQueries> weights;
        weights.round(scores);
        ptx::wgmma_fence();
#pragma unroll
        for (int query = 0; query < kQueries; query += 16)
            ptx::wgmma<1>(dv.element, weights.part[query / 16], dout.along_rows(query, 0), add || query > 0,
                          T{});
        ptx::wgmma_commit_group();

        ptx::wgmma_wait_group<1>(dp.element);
        make_ds(dp, scores, shared.delta[stage]);
        // A weight of 0 times what is not finite is not 0.
        if (cut) clear_hidden(dp, band);
        FactorTile<T, kQueries> ds;
        ds.round(dp);
        ptx::wgmma_fence();
#pragma unroll
        for (int query = 0; query < kQueries; query += 16)
            ptx::wgmma<1>(dk.element, ds.part[query / 16], q.along_rows(query, 0), add || query > 0, T{});
        ptx::wgmma_commit_group();
        add = true;

        const auto release = [&] {
            if (own_thread % 32 != 0) return;
            ptx::mbarrier_arrive(&shared.q_empty[stage]);
            ptx::mbarrier_arrive(&shared.dout_empty[stage]);
        };
        if (p.dq == nullptr) {
            ptx::wgmma_wait_group<0>(dk.element, dv.element);
            release();
            ring.next();
            return;
        }
        ptx::bar_sync(kDqEmpty, kDqThreads);
        store_factor(ds, shared.ds(), own_row, 0);
        ptx::fence_proxy_async();
        ptx::bar_sync(kDs, kConsumerThreads);
        RegisterTile<kDqColumns<D>> dq;
        ptx::wgmma_fence();
#pragma unroll
        for (int key = 0; key < kKeys<D>; key += 16)
            ptx::wgmma<1, 1>(dq.element, shared.ds().along_rows(key, 0),
                             shared.k.along_rows(key, own_row / 64 * kDqColumns<D>), key > 0, T{});
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<1>(dk.element, dv.element);
        release();
        ring.next();
        ptx::wgmma_wait_group<0>(dq.element);
        hand_over(dq, shared.dq[own_row / 64], own_thread);
    });

    // Without a query that sees the tile the sums were never begun: a factor of 0 writes zeros.
    const float once = add ? 1.0f : 0.0f, factors[2][2] = {{once * scale, once * scale}, {once, once}};
    const int64_t first_key = s.first_key + work.first_key + first_row, rows = keys_left - first_row;
    if (p.dk != nullptr)
        store_rows(dk, factors[0], at<T>(p.dk, p.dk_strides, s.batch, work.head_kv, first_key),
                   p.dk_strides.row, rows, static_cast<int>(p.head_dim));
    if (p.dv != nullptr)
        store_rows(dv, factors[1], at<T>(p.dv, p.dv_strides, s.batch, work.head_kv, first_key),
                   p.dv_strides.row, rows, static_cast<int>(p.head_dim));
}

}  // namespace lmkern::cuda
