// The consumers of the backward kernel at 256 columns: each owns half of them, for all keys of the block.
#pragma once

#include "attention/cuda_backward_parts.hpp"

namespace lmkern::cuda {

// dk and dv of 64 keys fill the registers of both consumers. Each makes the transposed scores, weights and ds
// of half of a step's queries and leaves the latter two in shared memory, where both read them: those of all
// queries are the first factor of its columns of dv, dk and dq.
template <class T, int D>
__device__ void consume_by_columns(const Call& call, Shared<T, D>& shared, const Work& work, int consumer) {
    constexpr int kOwnQueries = kQueries / kConsumers, kOwnColumns = D / kConsumers;
    static_assert(kDqParts<D> == 2, "consume_by_columns: dq in two parts");
    const AttentionParams& p = call.p;
    const Sequence& s = work.sequence;
    const int keys_left = static_cast<int>(s.n_k) - work.first_key, n_q = static_cast<int>(s.n_q);
    const TileBand first_band(work.band, consumer * kOwnQueries, work.first_key);
    const float scale = static_cast<float>(p.softmax_scale), log2_scale = scale * kLog2E;
    RegisterTile<kOwnColumns> dk, dv;
    bool add = false;

    wait_for_keys<T, D>(p, shared, keys_left);
    Ring<kQueryStages> q_ring;
    Ring<kDoutStages<D>> dout_ring;
    work.for_steps([&](int, int block) {
        const int first_query = block * kQueries;
        const bool tail = p.cu_seqlens_q != nullptr && n_q - first_query < kQueries;
        auto &q = shared.q[q_ring.stage], &dout = shared.dout[dout_ring.stage];
        auto* q_empty = &shared.q_empty[q_ring.stage];
        auto* dout_empty = &shared.dout_empty[dout_ring.stage];
        const int here = made_here(static_cast<int>(threadIdx.x)), own_thread = here % kWarpgroup;
        const int own = here / kWarpgroup - 1, own_query = own * kOwnQueries;
        const float *lse = &shared.lse[q_ring.stage][own_query],
                    *delta = &shared.delta[q_ring.stage][own_query];
        RegisterTile<kOwnQueries> scores, dp;  // keys by queries
        ptx::mbarrier_wait(&shared.q_full[q_ring.stage], q_ring.parity, "q_full");
        const bool nan = shared.nan[q_ring.stage];
        if (tail) {
            ptx::mbarrier_wait(&shared.dout_full[dout_ring.stage], dout_ring.parity, "dout_full");
            zero_tail(q, n_q - first_query);
            zero_tail(dout, n_q - first_query);
            ptx::bar_sync(kTail, kConsumerThreads);
        }
        if (nan) clear_nan(q);
        ptx::wgmma_fence();
#pragma unroll
        for (int column = 0; column < D; column += 16)
            ptx::wgmma<0, 0>(scores.element, shared.k.along_columns(0, column),
                             q.along_columns(own_query, column), column > 0, T{});
        ptx::wgmma_commit_group();
        ptx::mbarrier_wait(&shared.dout_full[dout_ring.stage], dout_ring.parity, "dout_full");
        ptx::wgmma_fence();
#pragma unroll
        for (int column = 0; column < D; column += 16)
            ptx::wgmma<0, 0>(dp.element, shared.v.along_columns(0, column),
                             dout.along_columns(own_query, column), column > 0, T{});
        ptx::wgmma_commit_group();

        const TileBand band = first_band.from_query(first_query);
        const bool cut = band.cuts(kOwnQueries, kKeys<D>);
        ptx::wgmma_wait_group<1>(scores.element);
        make_weights(scores, lse, log2_scale);
        if (cut) clear_hidden(scores, band);
        FactorTile<T, kOwnQueries> weights, ds;
        weights.round(scores);
        store_factor(weights, shared.weights(), 0, own_query);
        ptx::wgmma_wait_group<0>(dp.element);
        make_ds(dp, scores, delta);
        // A weight of 0 times what is not finite is not 0.
        if (cut) clear_hidden(dp, band);
        ds.round(dp);
        store_factor(ds, shared.ds(), 0, own_query);
        ptx::fence_proxy_async();
        ptx::bar_sync(kDs, kConsumerThreads);

        ptx::wgmma_fence();
#pragma unroll
        for (int query = 0; query < kQueries; query += 16)
            ptx::wgmma<0, 1>(dv.element, shared.weights().along_columns(0, query),
                             dout.along_rows(query, own * kOwnColumns), add || query > 0, T{});
        ptx::wgmma_commit_group();
#pragma unroll
        for (int query = 0; query < kQueries; query += 16)
            ptx::wgmma<0, 1>(dk.element, shared.ds().along_columns(0, query),
                             q.along_rows(query, own * kOwnColumns), add || query > 0, T{});
        ptx::wgmma_commit_group();
        add = true;
        q_ring.next();
        dout_ring.next();
        const auto release = [&](ptx::Barrier* empty) {
            if (own_thread % 32 == 0) ptx::mbarrier_arrive(empty);
        };
        if (p.dq == nullptr) {
            ptx::wgmma_wait_group<1>(dv.element);
            release(dout_empty);
            ptx::wgmma_wait_group<0>(dk.element);
            release(q_empty);
            // Before the next step's weights and ds.
            ptx::bar_sync(kDqEmpty, kConsumerThreads);
            return;
        }
        RegisterTile<kDqColumns<D>> dq[kDqParts<D>];
        ptx::wgmma_fence();
#pragma unroll
        for (int part = 0; part < kDqParts<D>; ++part) {
#pragma unroll
            for (int key = 0; key < kKeys<D>; key += 16)
                ptx::wgmma<1, 1>(dq[part].element, shared.ds().along_rows(key, 0),
                                 shared.k.along_rows(key, (part * kConsumers + own) * kDqColumns<D>), key > 0,
                                 T{});
            ptx::wgmma_commit_group();
        }
        ptx::wgmma_wait_group<3>(dv.element);
        release(dout_empty);
        ptx::wgmma_wait_group<2>(dk.element);
        release(q_empty);
        ptx::wgmma_wait_group<1>(dq[0].element);
        ptx::bar_sync(kDqEmpty, kDqThreads);
        hand_over(dq[0], shared.dq[own], own_thread);
        ptx::wgmma_wait_group<0>(dq[1].element);
        // Whoever has passed knows that all products of the step are done.
        ptx::bar_sync(kDqEmpty, kDqThreads);
        hand_over(dq[1], shared.dq[own], own_thread);
    });

    // Without a query that sees the tile the sums were never begun: a factor of 0 writes zeros.
    const float once = add ? 1.0f : 0.0f, factors[2][2] = {{once * scale, once * scale}, {once, once}};
    const int64_t first_key = s.first_key + work.first_key;
    const int first_column = consumer * kOwnColumns, columns = static_cast<int>(p.head_dim) - first_column;
    if (p.dk != nullptr)
        store_rows(dk, factors[0], at<T>(p.dk, p.dk_strides, s.batch, work.head_kv, first_key) + first_column,
                   p.dk_strides.row, keys_left, columns);
    if (p.dv != nullptr)
        store_rows(dv, factors[1], at<T>(p.dv, p.dv_strides, s.batch, work.head_kv, first_key) + first_column,
                   p.dv_strides.row, keys_left, columns);
}

}  // namespace lmkern::cuda
