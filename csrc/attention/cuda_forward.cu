// Attention forward on Hopper. Dao 2023, arXiv:2307.08691 (online softmax by tiles of queries); Shah et al.
// 2024, arXiv:2407.08608 (copies, products and softmax of one tile at the same time).
//
// A block has three warpgroups. The producer copies tiles of q, k and v into shared memory; each consumer
// owns 64 of the tile's 128 queries and holds their scores, weights and output in registers. The products of
// a consumer are issued while the other computes its softmax; they take turns.
#include "attention/cuda_common.hpp"
#include "tile/exp2.hpp"

namespace lmkern::cuda {
namespace {

constexpr int kConsumers = 2, kQueries = 64 * kConsumers;
constexpr int kConsumerThreads = kConsumers * kWarpgroup, kConsumerWarps = kConsumerThreads / 32;
constexpr int kThreads = kConsumerThreads + kWarpgroup;

// Of the registers that 384 threads may share out, 65,536: 24 * 128 + 2 * 240 * 128.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

// Named barriers: the turn of consumer 0 and of consumer 1 to issue products; a tail that was zeroed.
constexpr int kTurn = 1, kTail = 3;

// A row's maximum may grow by 2^8 before its sums are scaled anew: the weights stay below 2^8, and what they
// are divided by in the end is of the same scale.
constexpr float kMaxGrowth = 8.0f;

// At 64 columns 2^x, of which a processor makes 16 a clock, takes as long as the products. There the pairs of
// columns i with i % 5 = 4, 3 of 16, are made by multiplication: about 10 instructions beside 4 of each
// element then last as long as the rest.
template <int D>
constexpr int kPolynomialPairs = D <= 64 ? 5 : 0;

// A tile of keys: what 227 KB have room for twice, beside the queries, which are also held twice if they fit.
template <int D>
constexpr int kKeys = D <= 128 ? 128 : 64;
template <int D>
constexpr int kQueryStages = D <= 128 ? 2 : 1;
constexpr int kStages = 2;

struct Call {
    ptx::TensorMap q, k, v;
    AttentionParams p;
    TileSchedule schedule;
};

template <class T, int D>
struct Shared {
    SharedTile<T, kQueries, D> q[kQueryStages<D>];
    SharedTile<T, kKeys<D>, D> k[kStages], v[kStages];
    // full: the copy is there (the producer's thread arrives). empty: read (each of the consumers' warps
    // arrives: a product is done for the warp that waited for it).
    ptx::Barrier q_full[kQueryStages<D>], q_empty[kQueryStages<D>];
    ptx::Barrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

// One tile of queries, as both sides see it.
template <int KEYS>
struct Work {
    int64_t head;
    Sequence sequence;
    Band band;
    int64_t first_query;  // within the sequence
    KeyBlocks keys;

    __device__ Work(const AttentionParams& p, const QueryTile& tile)
        : head(tile.head),
          sequence(sequence_of(p, tile.sequence)),
          band(p, sequence),
          first_query(tile.block * kQueries),
          keys(band, first_query, min(first_query + kQueries, sequence.n_q) - 1, KEYS) {}
};

template <class T, int D>
__device__ void produce(const Call& call, Shared<T, D>& shared) {
    constexpr int KEYS = kKeys<D>;
    const AttentionParams& p = call.p;
    Ring<kQueryStages<D>> q_ring;
    Ring<kStages> k_ring, v_ring;
    for (int64_t t = blockIdx.x; t < call.schedule.tiles; t += gridDim.x) {
        const QueryTile tile = call.schedule.at(p, t);
        if (tile.block < 0) continue;
        const Work<KEYS> work(p, tile);
        if (work.keys.begin == work.keys.end) continue;
        const int batch = static_cast<int>(work.sequence.batch), head = static_cast<int>(tile.head);
        const int head_kv = static_cast<int>(tile.head / (p.heads / p.heads_kv));

        ptx::mbarrier_wait(&shared.q_empty[q_ring.stage], q_ring.parity ^ 1, "q_empty");
        ptx::mbarrier_arrive_expect_tx(&shared.q_full[q_ring.stage], sizeof(shared.q[0].bytes));
        shared.q[q_ring.stage].load(&call.q, &shared.q_full[q_ring.stage],
                                    static_cast<int>(work.sequence.first_query + work.first_query), head,
                                    batch);
        q_ring.next();

        // From the last block to the first. The consumers read a block's keys one step before its values.
        const auto load = [&](auto& tiles, const ptx::TensorMap& map, ptx::Barrier* full, ptx::Barrier* empty,
                              Ring<kStages>& ring, int64_t block, const char* name) {
            ptx::mbarrier_wait(&empty[ring.stage], ring.parity ^ 1, name);
            ptx::mbarrier_arrive_expect_tx(&full[ring.stage], sizeof(tiles[0].bytes));
            tiles[ring.stage].load(&map, &full[ring.stage],
                                   static_cast<int>(work.sequence.first_key + block * KEYS), head_kv, batch);
            ring.next();
        };
        load(shared.k, call.k, shared.k_full, shared.k_empty, k_ring, work.keys.end - 1, "k_empty");
        for (int64_t block = work.keys.end - 1; block >= work.keys.begin; --block) {
            if (block > work.keys.begin)
                load(shared.k, call.k, shared.k_full, shared.k_empty, k_ring, block - 1, "k_empty");
            load(shared.v, call.v, shared.v_full, shared.v_empty, v_ring, block, "v_empty");
        }
    }
}

// The running softmax of the thread's two rows. Scores become weights 2^(scale (score - row_max)).
template <int KEYS, int POLYNOMIAL_PAIRS>
struct OnlineSoftmax {
    float scale;  // softmax_scale log2(e)
    float row_max[2] = {-INFINITY, -INFINITY};
    float row_sum[2] = {0.0f, 0.0f};  // over the thread's columns

    // scores -> weights; factor: what earlier sums are to be multiplied by, 1 for most tiles.
    __device__ void step(RegisterTile<KEYS>& scores, float (&factor)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float highest = row_max[half];
#pragma unroll
            for (int pair = 0; pair < KEYS / 8; ++pair)
                highest = fmaxf(highest, fmaxf(scores.at(half, pair, 0), scores.at(half, pair, 1)));
            highest = quad_max(highest);
            factor[half] = 1.0f;
            if ((highest - row_max[half]) * scale > kMaxGrowth) {
                factor[half] = ptx::ex2((row_max[half] - highest) * scale);
                row_max[half] = highest;
            }
            // A row that has seen no key yet has row_max = -inf; 0 keeps 2^-inf = 0 and no NaN.
            const float shift = row_max[half] == -INFINITY ? 0.0f : row_max[half] * scale;
            float sum = 0.0f;
#pragma unroll
            for (int pair = 0; pair < KEYS / 8; ++pair)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& score = scores.at(half, pair, i);
                    const bool polynomial =
                        POLYNOMIAL_PAIRS > 0 && (pair + 1) % max(POLYNOMIAL_PAIRS, 1) == 0;
                    score = polynomial ? exp2_by_polynomial(score * scale - shift)
                                       : ptx::ex2(score * scale - shift);
                    sum += score;
                }
            row_sum[half] = row_sum[half] * factor[half] + sum;
        }
    }
};

template <int D>
using Softmax = OnlineSoftmax<kKeys<D>, kPolynomialPairs<D>>;

template <int KEYS>
__device__ void hide(RegisterTile<KEYS>& scores, const TileBand& band) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int pair = 0; pair < KEYS / 8; ++pair)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                if (band.hides(RegisterTile<KEYS>::column(pair) + i, RegisterTile<KEYS>::row(half)))
                    scores.at(half, pair, i) = -INFINITY;
}

template <class T, int D>
__device__ void write(const AttentionParams& p, const Work<kKeys<D>>& work, int consumer,
                      RegisterTile<D>& acc, const Softmax<D>& softmax) {
    const Sequence& s = work.sequence;
    const int64_t first_query = work.first_query + consumer * 64;
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float sum = quad_sum(softmax.row_sum[half]);
        // A sum of 0 is that of a row without keys.
        inverse[half] = sum == 0.0f ? 0.0f : 1.0f / sum;
        const int64_t query = first_query + RegisterTile<D>::row(half);
        if (query >= s.n_q || threadIdx.x % 4 != 0) continue;
        float* lse = static_cast<float*>(p.lse) + (s.batch * p.heads + work.head) * p.n_q;
        // scale is in base 2, lse in base e.
        lse[s.first_query + query] =
            sum == 0.0f ? -INFINITY : (softmax.row_max[half] * softmax.scale + log2f(sum)) * kLn2;
    }
    T* out = at<T>(p.out, p.out_strides, s.batch, work.head, s.first_query + first_query);
    store_rows(acc, inverse, out, p.out_strides.row, s.n_q - first_query, static_cast<int>(p.head_dim));
}

template <class T, int D>
__device__ void consume(const Call& call, Shared<T, D>& shared, int consumer) {
    constexpr int KEYS = kKeys<D>;
    const AttentionParams& p = call.p;
    const bool speaker = threadIdx.x % 32 == 0;
    const auto wait_turn = [&] { ptx::bar_sync(kTurn + consumer, kConsumerThreads); };
    const auto pass_turn = [&] { ptx::bar_arrive(kTurn + (consumer ^ 1), kConsumerThreads); };
    const auto release = [&](ptx::Barrier* empty) {
        if (speaker) ptx::mbarrier_arrive(empty);
    };
    if (consumer == 1) pass_turn();

    Ring<kQueryStages<D>> q_ring;
    Ring<kStages> k_ring, v_ring;
    for (int64_t t = blockIdx.x; t < call.schedule.tiles; t += gridDim.x) {
        const QueryTile tile = call.schedule.at(p, t);
        if (tile.block < 0) continue;
        const Work<KEYS> work(p, tile);
        const int64_t first_query = work.first_query + consumer * 64;
        Softmax<D> softmax{static_cast<float>(p.softmax_scale) * kLog2E};
        RegisterTile<D> acc;

        // scores = q k^T of one block, started.
        const auto start_scores = [&](RegisterTile<KEYS>& scores) {
            ptx::wgmma_fence();
#pragma unroll
            for (int column = 0; column < D; column += 16)
                ptx::wgmma<0, 0>(scores.element, shared.q[q_ring.stage].along_columns(consumer * 64, column),
                                 shared.k[k_ring.stage].along_columns(0, column), column > 0, T{});
            ptx::wgmma_commit_group();
        };
        // acc (+)= weights v of one block, started.
        const auto start_values = [&](const FactorTile<T, KEYS>& weights, bool add) {
            ptx::wgmma_fence();
#pragma unroll
            for (int key = 0; key < KEYS; key += 16)
                ptx::wgmma<1>(acc.element, weights.part[key / 16], shared.v[v_ring.stage].along_rows(key, 0),
                              add || key > 0, T{});
            ptx::wgmma_commit_group();
        };
        // Most blocks lie within every query's band.
        const auto mask = [&](RegisterTile<KEYS>& scores, int64_t block) {
            const TileBand band(work.band, first_query, block * KEYS);
            if (band.cuts(64, KEYS)) hide(scores, band);
        };

        if (work.keys.begin == work.keys.end) {
            write<T, D>(p, work, consumer, acc, softmax);
            continue;
        }
        int64_t block = work.keys.end - 1;
        FactorTile<T, KEYS> weights;
        float factor[2];
        ptx::mbarrier_wait(&shared.q_full[q_ring.stage], q_ring.parity, "q_full");
        if (p.cu_seqlens_k != nullptr && work.sequence.n_k < (block + 1) * KEYS) {
            ptx::mbarrier_wait(&shared.v_full[v_ring.stage], v_ring.parity, "v_full");
            // A value of another document would not vanish under a weight of 0 if it were not finite.
            zero_rows(shared.v[v_ring.stage], static_cast<int>(work.sequence.n_k - block * KEYS),
                      static_cast<int>(threadIdx.x) - kWarpgroup, kConsumerThreads);
            ptx::bar_sync(kTail, kConsumerThreads);
        }
        {
            RegisterTile<KEYS> scores;
            ptx::mbarrier_wait(&shared.k_full[k_ring.stage], k_ring.parity, "k_full");
            wait_turn();
            start_scores(scores);
            pass_turn();
            ptx::wgmma_wait_group<0>(scores.element);
            release(&shared.k_empty[k_ring.stage]);
            k_ring.next();
            mask(scores, block);
            softmax.step(scores, factor);
            weights.round(scores);
        }
        bool add = false;
        while (--block >= work.keys.begin) {
            RegisterTile<KEYS> scores;
            ptx::mbarrier_wait(&shared.k_full[k_ring.stage], k_ring.parity, "k_full");
            wait_turn();
            start_scores(scores);
            ptx::mbarrier_wait(&shared.v_full[v_ring.stage], v_ring.parity, "v_full");
            start_values(weights, add);
            pass_turn();
            ptx::wgmma_wait_group<1>(scores.element);
            release(&shared.k_empty[k_ring.stage]);
            k_ring.next();
            mask(scores, block);
            softmax.step(scores, factor);
            ptx::wgmma_wait_group<0>(acc.element);
            release(&shared.v_empty[v_ring.stage]);
            v_ring.next();
            add = true;
            if (__any_sync(0xFFFFFFFFu, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
                for (int pair = 0; pair < D / 8; ++pair)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
#pragma unroll
                        for (int i = 0; i < 2; ++i) acc.at(half, pair, i) *= factor[half];
            }
            weights.round(scores);
        }
        release(&shared.q_empty[q_ring.stage]);
        q_ring.next();
        ptx::mbarrier_wait(&shared.v_full[v_ring.stage], v_ring.parity, "v_full");
        start_values(weights, add);
        ptx::wgmma_wait_group<0>(acc.element);
        release(&shared.v_empty[v_ring.stage]);
        v_ring.next();
        write<T, D>(p, work, consumer, acc, softmax);
    }
}

// Grid: one block a processor. Products: 4 N_q N_k D of a head, half of it if causal.
template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ Call call) {
    Shared<T, D>& shared = *reinterpret_cast<Shared<T, D>*>(ptx::dynamic_shared());
    if (threadIdx.x == 0) {
        for (int i = 0; i < kQueryStages<D>; ++i) {
            ptx::mbarrier_init(&shared.q_full[i], 1);
            ptx::mbarrier_init(&shared.q_empty[i], kConsumerWarps);
        }
        for (int i = 0; i < kStages; ++i) {
            ptx::mbarrier_init(&shared.k_full[i], 1);
            ptx::mbarrier_init(&shared.k_empty[i], kConsumerWarps);
            ptx::mbarrier_init(&shared.v_full[i], 1);
            ptx::mbarrier_init(&shared.v_empty[i], kConsumerWarps);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x < kWarpgroup) {
        ptx::setmaxnreg_dec<kProducerRegisters>();
        if (threadIdx.x == 0) produce<T, D>(call, shared);
    } else {
        ptx::setmaxnreg_inc<kConsumerRegisters>();
        consume<T, D>(call, shared, static_cast<int>(threadIdx.x) / kWarpgroup - 1);
    }
}

}  // namespace

void attention_forward(const CudaAttentionParams& c) {
    const auto what = [&] { return describe("forward", c); };
    const AttentionParams& p = c.attention;
    if (p.sequences * p.heads * p.n_q == 0) return;
    const DeviceGuard guard(c.device, what);
    with_tile(p, [&](auto type, auto head_dim) {
        using T = typename decltype(type)::type;
        constexpr int D = decltype(head_dim)::value;
        // Half of the L2 cache for the keys and values of the heads that are taken together.
        const int64_t bytes = std::max<int64_t>(p.n_k * p.head_dim * 4 / (p.heads / p.heads_kv), 1);
        const TileSchedule schedule(p, kQueries, (int64_t{24} << 20) / bytes);
        const Call call{map_of(what, p.q, p.q_strides, p.batch, p.heads, p.n_q, p.head_dim, kQueries),
                        map_of(what, p.k, p.k_strides, p.batch, p.heads_kv, p.n_k, p.head_dim, kKeys<D>),
                        map_of(what, p.v, p.v_strides, p.batch, p.heads_kv, p.n_k, p.head_dim, kKeys<D>), p,
                        schedule};
        const int64_t blocks = std::min(schedule.tiles, c.processors);
        launch(forward_kernel<T, D>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), c.stream, call,
               what, sizeof(Shared<T, D>));
    });
}

}  // namespace lmkern::cuda
