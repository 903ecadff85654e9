// Attention backward on Hopper. Derivation: docs/kernels/attention.md. With s = softmax_scale q k^T:
//
//     p = exp(s - lse)      ds = p (dout v^T - delta)      delta = rowsum(dout out) - dlse
//     dv = p^T dout         dk = softmax_scale ds^T q      dq = softmax_scale ds k
//
// Three kernels: delta; then a block for each tile of keys, which keeps dk and dv in registers, goes over the
// queries and adds its part of dq to float32 sums in memory; then dq in its own type. The tiles of keys add
// to a block of dq in their order, so the bits are the same every time.
#include "attention/cuda_common.hpp"

namespace lmkern::cuda {
namespace {

// Warpgroup 0: warp 0 copies, warp 1 brings lse and delta, warp 2 adds dq to memory. Each consumer owns 64
// keys.
constexpr int kConsumers = 2, kKeys = 64 * kConsumers;
constexpr int kConsumerThreads = kConsumers * kWarpgroup, kThreads = kConsumerThreads + kWarpgroup;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

// A step's queries. Of ds k each consumer makes half the columns.
constexpr int kQueries = 64, kStages = 2;
template <int D>
constexpr int kPart = kQueries * (D / kConsumers);

// Named barriers. dq_empty: the sums of the step before are read (and everybody is done with its ds);
// dq_full: this step's are written. ds and tail: among the consumers.
enum : int { kDqEmpty = 1, kDqFull, kDs, kTail };
constexpr int kDqThreads = kConsumerThreads + 32;

struct Call {
    ptx::TensorMap q, k, v, dout;
    AttentionParams p;
    KeySchedule schedule;
    const float* delta;
    float* dq_sum;
    int* turns;
};

template <class T, int D>
struct Shared {
    SharedTile<T, kKeys, D> k, v;
    SharedTile<T, kQueries, D> q[kStages], dout[kStages];
    SharedTile<T, kKeys, kQueries> ds;
    // Each thread's elements four by four, not rows: [consumer][i / 4][thread][i % 4].
    alignas(128) float dq[kConsumers][kPart<D>];
    alignas(16) float lse[kStages][kQueries];  // base 2; +inf for a query without keys and beyond the last
    alignas(16) float delta[kStages][kQueries];
    // q_full: q, lse and delta are there. empty: both consumers are done with the step's q and dout.
    ptx::Barrier keys_full, q_full[kStages], dout_full[kStages], empty[kStages];
};

// One tile of keys, as all warps see it.
struct Work {
    Sequence sequence;
    Band band;
    int64_t key_block;
    int first_key;  // within the sequence
    int head_kv, group;
    int begin, end;  // blocks of queries

    __device__ Work(const AttentionParams& p, const KeyTile& tile)
        : sequence(sequence_of(p, tile.sequence)),
          band(p, sequence),
          key_block(tile.block),
          first_key(static_cast<int>(tile.block * kKeys)),
          head_kv(static_cast<int>(tile.head_kv)),
          group(static_cast<int>(p.heads / p.heads_kv)) {
        const QueryBlocks queries(band, sequence.n_q, first_key, kKeys, kQueries);
        begin = static_cast<int>(queries.begin);
        end = static_cast<int>(queries.end);
    }

    // step(query head, block of queries): every warp's loop. The last block first: under a causal mask all
    // tiles of keys need it, and begin with it one after the other.
    template <class Step>
    __device__ void for_steps(const Step& step) const {
        for (int head = head_kv * group; head < (head_kv + 1) * group; ++head)
            for (int block = end - 1; block >= begin; --block) step(head, block);
    }
};

template <class T, int D>
__device__ void copy(const Call& call, Shared<T, D>& shared, const Work& work) {
    const Sequence& s = work.sequence;
    const int batch = static_cast<int>(s.batch), head_kv = work.head_kv;
    const int first_key = static_cast<int>(s.first_key + work.first_key);
    ptx::mbarrier_arrive_expect_tx(&shared.keys_full, 2 * sizeof(shared.k.bytes));
    shared.k.load(&call.k, &shared.keys_full, first_key, head_kv, batch);
    shared.v.load(&call.v, &shared.keys_full, first_key, head_kv, batch);
    Ring<kStages> ring;
    work.for_steps([&](int head, int block) {
        const int i = ring.stage, row = static_cast<int>(s.first_query) + block * kQueries;
        ptx::mbarrier_wait(&shared.empty[i], ring.parity ^ 1, "empty");
        ptx::mbarrier_arrive_expect_tx(&shared.q_full[i], sizeof(shared.q[i].bytes));
        shared.q[i].load(&call.q, &shared.q_full[i], row, head, batch);
        ptx::mbarrier_arrive_expect_tx(&shared.dout_full[i], sizeof(shared.dout[i].bytes));
        shared.dout[i].load(&call.dout, &shared.dout_full[i], row, head, batch);
        ring.next();
    });
}

template <class T, int D>
__device__ void bring_statistics(const Call& call, Shared<T, D>& shared, const Work& work) {
    const AttentionParams& p = call.p;
    const Sequence& s = work.sequence;
    Ring<kStages> ring;
    work.for_steps([&](int head, int block) {
        const int i = ring.stage;
        ptx::mbarrier_wait(&shared.empty[i], ring.parity ^ 1, "empty");
        const int64_t row = (s.batch * p.heads + head) * p.n_q + s.first_query;
        for (int j = static_cast<int>(threadIdx.x) % 32; j < kQueries; j += 32) {
            const int query = block * kQueries + j;
            const bool there = query < s.n_q;
            const float lse = there ? static_cast<const float*>(p.lse)[row + query] : -INFINITY;
            shared.lse[i][j] = lse == -INFINITY ? INFINITY : lse * kLog2E;
            shared.delta[i][j] = there ? call.delta[row + query] : 0.0f;
        }
        ptx::mbarrier_arrive(&shared.q_full[i]);
        ring.next();
    });
}

// Adds what the consumers left of dq to memory, when the tiles of keys before this one have.
template <class T, int D>
__device__ void add_dq(const Call& call, Shared<T, D>& shared, const Work& work) {
    const AttentionParams& p = call.p;
    const Sequence& s = work.sequence;
    const int64_t before = blocks_before(p, s.index, kQueries), all = blocks_of_head(p, kQueries);
    ptx::bar_arrive(kDqEmpty, kDqThreads);
    work.for_steps([&](int head, int block) {
        ptx::bar_sync(kDqFull, kDqThreads);
        if (threadIdx.x % 32 == 0) {
            const int64_t index = (s.batch * p.heads + head) * all + before + block;
            const int64_t turn = turn_of(work.band, block * kQueries, work.key_block, kKeys);
            ptx::wait_for(call.turns + index, static_cast<int>(turn));
            ptx::cp_reduce_async_bulk_add(call.dq_sum + index * kConsumers * kPart<D>, shared.dq[0],
                                          sizeof(shared.dq));
            ptx::cp_async_bulk_commit_group();
            // Not only read: in memory, before the next tile may add.
            ptx::cp_async_bulk_wait_group();
            ptx::red_release_add(call.turns + index, 1);
        }
        __syncwarp();
        ptx::bar_arrive(kDqEmpty, kDqThreads);
    });
}

// The elements of scores (keys, queries) that are hidden become `value`.
__device__ inline void fill_hidden(RegisterTile<kQueries>& tile, const TileBand& band, float value) {
    const int key = made_here(RegisterTile<kQueries>::row(0)),
              query = made_here(RegisterTile<kQueries>::column(0));
#pragma unroll
    for (int pair = 0; pair < kQueries / 8; ++pair)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                if (band.hides(key + half * 8, query + pair * 8 + i)) tile.at(half, pair, i) = value;
}

template <class T, int D>
__device__ void consume(const Call& call, Shared<T, D>& shared, const Work& work, int consumer) {
    const AttentionParams& p = call.p;
    const Sequence& s = work.sequence;
    const int first_row = consumer * 64;
    const int keys_left = static_cast<int>(s.n_k) - work.first_key, n_q = static_cast<int>(s.n_q);
    const TileBand first_band(work.band, 0, work.first_key + first_row);
    const float scale = static_cast<float>(p.softmax_scale), log2_scale = scale * kLog2E;
    RegisterTile<D> dk, dv;
    bool add = false;
    // Rows of another document need not be finite, and then would not vanish under weights of 0.
    const auto zero_tail = [&](auto& tile, int rows) {
        zero_rows(tile, rows, static_cast<int>(threadIdx.x) - kWarpgroup, kConsumerThreads);
    };

    ptx::mbarrier_wait(&shared.keys_full, 0, "keys_full");
    if (p.cu_seqlens_k != nullptr && keys_left < kKeys) {
        zero_tail(shared.k, keys_left);
        zero_tail(shared.v, keys_left);
        ptx::bar_sync(kTail, kConsumerThreads);
    }
    Ring<kStages> ring;
    work.for_steps([&](int, int block) {
        const int stage = ring.stage, first_query = block * kQueries;
        auto &q = shared.q[stage], &dout = shared.dout[stage];
        ptx::mbarrier_wait(&shared.q_full[stage], ring.parity, "q_full");
        ptx::mbarrier_wait(&shared.dout_full[stage], ring.parity, "dout_full");
        if (p.cu_seqlens_q != nullptr && n_q - first_query < kQueries) {
            zero_tail(q, n_q - first_query);
            zero_tail(dout, n_q - first_query);
            ptx::bar_sync(kTail, kConsumerThreads);
        }
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
        if (cut) fill_hidden(scores, band, -INFINITY);
#pragma unroll
        for (int pair = 0; pair < kQueries / 8; ++pair) {
            const float* lse = &shared.lse[stage][RegisterTile<kQueries>::column(pair)];
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& score = scores.at(half, pair, i);
                    score = ptx::ex2(score * log2_scale - lse[i]);
                }
        }
        FactorTile<T, kQueries> weights;
        weights.round(scores);
        ptx::wgmma_fence();
#pragma unroll
        for (int query = 0; query < kQueries; query += 16)
            ptx::wgmma<1>(dv.element, weights.part[query / 16], dout.along_rows(query, 0), add || query > 0,
                          T{});
        ptx::wgmma_commit_group();

        ptx::wgmma_wait_group<1>(dp.element);
        // A weight of 0 times what is not finite is not 0.
        if (cut) fill_hidden(dp, band, 0.0f);
#pragma unroll
        for (int pair = 0; pair < kQueries / 8; ++pair) {
            const float* delta = &shared.delta[stage][RegisterTile<kQueries>::column(pair)];
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& grad = dp.at(half, pair, i);
                    grad = scores.at(half, pair, i) * (grad - delta[i]);
                }
        }
        FactorTile<T, kQueries> ds;
        ds.round(dp);
        ptx::wgmma_fence();
#pragma unroll
        for (int query = 0; query < kQueries; query += 16)
            ptx::wgmma<1>(dk.element, ds.part[query / 16], q.along_rows(query, 0), add || query > 0, T{});
        ptx::wgmma_commit_group();
        add = true;

        const auto release = [&] {
            if (own_thread == 0) ptx::mbarrier_arrive(&shared.empty[stage]);
        };
        if (p.dq == nullptr) {
            ptx::wgmma_wait_group<0>(dk.element, dv.element);
            release();
            ring.next();
            return;
        }
        ptx::bar_sync(kDqEmpty, kDqThreads);
        store_factor(ds, shared.ds, own_row);
        ptx::fence_proxy_async();
        ptx::bar_sync(kDs, kConsumerThreads);
        RegisterTile<D / kConsumers> dq;
        ptx::wgmma_fence();
#pragma unroll
        for (int key = 0; key < kKeys; key += 16)
            ptx::wgmma<1, 1>(dq.element, shared.ds.along_rows(key, 0),
                             shared.k.along_rows(key, own_row * D / 128), key > 0, T{});
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<1>(dk.element, dv.element);
        release();
        ring.next();
        ptx::wgmma_wait_group<0>(dq.element);
#pragma unroll
        for (int i = 0; i < D / kConsumers / 2; i += 4)
            *reinterpret_cast<float4*>(&shared.dq[own_row / 64][(i / 4 * kWarpgroup + own_thread) * 4]) =
                float4{dq.element[i], dq.element[i + 1], dq.element[i + 2], dq.element[i + 3]};
        ptx::fence_proxy_async();
        ptx::bar_arrive(kDqFull, kDqThreads);
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

// Grid: a block for each tile of the schedule; one that adds to dq later than another comes later. Products:
// 10 N_q N_k D of a query head, half of it if causal.
template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(const __grid_constant__ Call call) {
    Shared<T, D>& shared = *reinterpret_cast<Shared<T, D>*>(ptx::dynamic_shared());
    const KeyTile tile = call.schedule.at(call.p, blockIdx.x);
    if (tile.block < 0) return;
    const Work work(call.p, tile);
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&shared.keys_full, 1);
        for (int i = 0; i < kStages; ++i) {
            ptx::mbarrier_init(&shared.q_full[i], 1 + 32);
            ptx::mbarrier_init(&shared.dout_full[i], 1);
            ptx::mbarrier_init(&shared.empty[i], kConsumers);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x < kWarpgroup) {
        ptx::setmaxnreg_dec<kProducerRegisters>();
        const int warp = static_cast<int>(threadIdx.x) / 32;
        if (threadIdx.x == 0) copy<T, D>(call, shared, work);
        if (warp == 1) bring_statistics<T, D>(call, shared, work);
        if (warp == 2 && call.p.dq != nullptr) add_dq<T, D>(call, shared, work);
    } else {
        ptx::setmaxnreg_inc<kConsumerRegisters>();
        consume<T, D>(call, shared, work, static_cast<int>(threadIdx.x) / kWarpgroup - 1);
    }
}

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
    const int part = static_cast<int>(threadIdx.x) / kWarpgroup,
              thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    const int64_t index = (s.batch * p.heads + head) * blocks_of_head(p, kQueries) +
                          blocks_before(p, s.index, kQueries) + block;
    const float* from = call.dq_sum + (index * kConsumers + part) * kPart<D>;
    RegisterTile<D / kConsumers> dq;
#pragma unroll
    for (int i = 0; i < D / kConsumers / 2; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(from + (i / 4 * kWarpgroup + thread) * 4);
        dq.element[i] = four.x, dq.element[i + 1] = four.y, dq.element[i + 2] = four.z,
        dq.element[i + 3] = four.w;
    }
    const int64_t first_query = block * kQueries;
    const int first_column = part * (D / kConsumers);
    const float scale = static_cast<float>(p.softmax_scale), factor[2] = {scale, scale};
    store_rows(dq, factor,
               at<T>(p.dq, p.dq_strides, s.batch, head, s.first_query + first_query) + first_column,
               p.dq_strides.row, s.n_q - first_query, static_cast<int>(p.head_dim) - first_column);
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
        if constexpr (D > 128) {
            throw std::invalid_argument("attention: the CUDA backward takes head_dim up to 128");
        } else {
            const auto count = [](int64_t n) { return static_cast<unsigned>(n); };
            float* delta = static_cast<float*>(c.delta);
            float* dq_sum = static_cast<float*>(c.dq_sum);
            if (const int64_t rows = p.batch * p.heads * p.n_q; rows > 0)
                launch(delta_kernel<T>, dim3(count(ceil_div(rows, kDeltaRows))), dim3(kDeltaThreads),
                       c.stream, DeltaCall{p, delta}, what);
            const KeySchedule schedule(p, kKeys);
            const Call call{map_of(p.q, p.q_strides, p.batch, p.heads, p.n_q, p.head_dim, kQueries),
                            map_of(p.k, p.k_strides, p.batch, p.heads_kv, p.n_k, p.head_dim, kKeys),
                            map_of(p.v, p.v_strides, p.batch, p.heads_kv, p.n_k, p.head_dim, kKeys),
                            map_of(p.dout, p.dout_strides, p.batch, p.heads, p.n_q, p.head_dim, kQueries),
                            p,
                            schedule,
                            delta,
                            dq_sum,
                            static_cast<int*>(c.turns)};
            if (schedule.tiles > 0)
                launch(backward_kernel<T, D>, dim3(count(schedule.tiles)), dim3(kThreads), c.stream, call,
                       what, sizeof(Shared<T, D>));
            if (p.dq != nullptr && p.n_q > 0)
                launch(dq_kernel<T, D>,
                       dim3(count(ceil_div(p.n_q, kQueries)), count(p.heads), count(p.sequences)),
                       dim3(kConsumerThreads), c.stream, DqCall{p, dq_sum}, what);
        }
    });
}

}  // namespace lmkern::cuda
