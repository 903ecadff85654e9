// What the warps of the backward kernel share, and its producers: the warps that copy tiles of q, k, v and
// dout, bring the statistics, and add dq to memory.
#pragma once

#include "attention/cuda_common.hpp"

namespace lmkern::cuda {

constexpr int kConsumers = 2, kConsumerThreads = kConsumers * kWarpgroup;
constexpr int kThreads = kConsumerThreads + kWarpgroup;

// A block's keys, and the queries of a step. Up to 128 columns each consumer owns the dk and dv of 64 keys;
// at 256 there is room for those of 64 keys in both together, and each owns half of the columns.
template <int D>
constexpr int kKeys = D <= 128 ? 128 : 64;
constexpr int kQueries = 64;

// Steps that are in shared memory at once. dout is read only by the first products of a step.
constexpr int kQueryStages = 2;
template <int D>
constexpr int kDoutStages = D <= 128 ? 2 : 1;

// The columns of dq that a consumer makes at a time, and how many times: what shared memory has room for.
template <int D>
constexpr int kDqColumns = D <= 128 ? D / kConsumers : 64;
template <int D>
constexpr int kDqParts = D / (kDqColumns<D> * kConsumers);
template <int D>
constexpr int kDqPart = kQueries * kDqColumns<D>;

// Named barriers. dq_empty: the sums written before are read (and everybody is done with the step's ds);
// dq_full: the next are written. ds and tail: among the consumers.
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
    SharedTile<T, kKeys<D>, D> k, v;
    SharedTile<T, kQueries, D> q[kQueryStages], dout[kDoutStages<D>];
    SharedTile<T, kKeys<D>, kQueries> factors[D <= 128 ? 1 : 2];
    // Each thread's elements four by four, not rows: [consumer][i / 4][thread][i % 4].
    alignas(128) float dq[kConsumers][kDqPart<D>];
    alignas(16) float lse[kQueryStages][kQueries];  // base 2; +inf without keys and beyond the last query
    alignas(16) float delta[kQueryStages][kQueries];
    int nan[kQueryStages];  // whether q may have one: an lse has, or is of no key
    // q_full: q, lse, delta and nan are there. empty: the consumers' warps are done with them.
    ptx::Barrier keys_full, q_full[kQueryStages], q_empty[kQueryStages];
    ptx::Barrier dout_full[kDoutStages<D>], dout_empty[kDoutStages<D>];

    __device__ auto& ds() { return factors[0]; }
    // Where the consumers need each other's.
    __device__ auto& weights() { return factors[1]; }

    __device__ void init_barriers() {
        ptx::mbarrier_init(&keys_full, 1);
        for (int i = 0; i < kQueryStages; ++i) {
            ptx::mbarrier_init(&q_full[i], 1 + 32);
            ptx::mbarrier_init(&q_empty[i], kConsumerThreads / 32);
        }
        for (int i = 0; i < kDoutStages<D>; ++i) {
            ptx::mbarrier_init(&dout_full[i], 1);
            ptx::mbarrier_init(&dout_empty[i], kConsumerThreads / 32);
        }
        ptx::fence_mbarrier_init();
    }
};

// One tile of keys, as all warps see it.
struct Work {
    Sequence sequence;
    Band band;
    int64_t key_block;
    int first_key;  // within the sequence
    int head_kv, group;
    int begin, end;  // blocks of queries

    __device__ Work(const AttentionParams& p, const KeyTile& tile, int keys)
        : sequence(sequence_of(p, tile.sequence)),
          band(p, sequence),
          key_block(tile.block),
          first_key(static_cast<int>(tile.block * keys)),
          head_kv(static_cast<int>(tile.head_kv)),
          group(static_cast<int>(p.heads / p.heads_kv)) {
        const QueryBlocks queries(band, sequence.n_q, first_key, keys, kQueries);
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
    Ring<kQueryStages> q_ring;
    Ring<kDoutStages<D>> dout_ring;
    work.for_steps([&](int head, int block) {
        const int row = static_cast<int>(s.first_query) + block * kQueries;
        const auto load = [&](auto& tiles, const ptx::TensorMap& map, ptx::Barrier* full, ptx::Barrier* empty,
                              auto& ring, const char* name) {
            ptx::mbarrier_wait(&empty[ring.stage], ring.parity ^ 1, name);
            ptx::mbarrier_arrive_expect_tx(&full[ring.stage], sizeof(tiles[0].bytes));
            tiles[ring.stage].load(&map, &full[ring.stage], row, head, batch);
            ring.next();
        };
        load(shared.q, call.q, shared.q_full, shared.q_empty, q_ring, "q_empty");
        load(shared.dout, call.dout, shared.dout_full, shared.dout_empty, dout_ring, "dout_empty");
    });
}

template <class T, int D>
__device__ void bring_statistics(const Call& call, Shared<T, D>& shared, const Work& work) {
    const AttentionParams& p = call.p;
    const Sequence& s = work.sequence;
    Ring<kQueryStages> ring;
    work.for_steps([&](int head, int block) {
        const int i = ring.stage;
        ptx::mbarrier_wait(&shared.q_empty[i], ring.parity ^ 1, "q_empty");
        const int64_t row = (s.batch * p.heads + head) * p.n_q + s.first_query;
        bool nan = false;
        for (int j = static_cast<int>(threadIdx.x) % 32; j < kQueries; j += 32) {
            const int query = block * kQueries + j;
            const bool there = query < s.n_q;
            const float lse = there ? static_cast<const float*>(p.lse)[row + query] : -INFINITY;
            nan = nan || (there && !(lse > -INFINITY));
            shared.lse[i][j] = lse == -INFINITY ? INFINITY : lse * kLog2E;
            shared.delta[i][j] = there ? call.delta[row + query] : 0.0f;
        }
        shared.nan[i] = __any_sync(0xFFFFFFFFu, nan);
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
        const int64_t index = (s.batch * p.heads + head) * all + before + block;
#pragma unroll 1
        for (int part = 0; part < kDqParts<D>; ++part) {
            ptx::bar_sync(kDqFull, kDqThreads);
            if (threadIdx.x % 32 == 0) {
                if (part == 0) {
                    const int64_t turn = turn_of(work.band, block * kQueries, work.key_block, kKeys<D>);
                    ptx::wait_for(call.turns + index, static_cast<int>(turn), "the turn to add dq");
                    ptx::fence_proxy_async_global();
                }
                const int64_t place = (index * kDqParts<D> + part) * kConsumers * kDqPart<D>;
                ptx::cp_reduce_async_bulk_add(call.dq_sum + place, shared.dq[0], sizeof(shared.dq));
                ptx::cp_async_bulk_commit_group();
                ptx::cp_async_bulk_wait_group_read();
            }
            __syncwarp();
            ptx::bar_arrive(kDqEmpty, kDqThreads);
        }
        if (threadIdx.x % 32 == 0) {
            // Not only read: in memory, before the next tile may add.
            ptx::cp_async_bulk_wait_group();
            ptx::red_release_add(call.turns + index, 1);
        }
        __syncwarp();
    });
}

// The elements of a tile (keys, queries) that are hidden become 0. band: counted from the tile's first.
template <int COLUMNS>
__device__ void clear_hidden(RegisterTile<COLUMNS>& tile, const TileBand& band) {
    const int key = made_here(RegisterTile<COLUMNS>::row(0)),
              query = made_here(RegisterTile<COLUMNS>::column(0));
#pragma unroll
    for (int pair = 0; pair < COLUMNS / 8; ++pair)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                if (band.hides(key + half * 8, query + pair * 8 + i)) tile.at(half, pair, i) = 0.0f;
}

// Scores become weights. lse: of the tile's queries, base 2.
template <int COLUMNS>
__device__ void make_weights(RegisterTile<COLUMNS>& scores, const float* lse, float log2_scale) {
#pragma unroll
    for (int pair = 0; pair < COLUMNS / 8; ++pair) {
        const float* own = lse + RegisterTile<COLUMNS>::column(pair);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float& score = scores.at(half, pair, i);
                score = ptx::ex2(score * log2_scale - own[i]);
            }
    }
}

// dp becomes ds.
template <int COLUMNS>
__device__ void make_ds(RegisterTile<COLUMNS>& dp, RegisterTile<COLUMNS>& weights, const float* delta) {
#pragma unroll
    for (int pair = 0; pair < COLUMNS / 8; ++pair) {
        const float* own = delta + RegisterTile<COLUMNS>::column(pair);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float& grad = dp.at(half, pair, i);
                grad = weights.at(half, pair, i) * (grad - own[i]);
            }
    }
}

// A consumer's part of dq for the warp that adds it.
template <int COLUMNS>
__device__ void hand_over(const RegisterTile<COLUMNS>& dq, float* to, int own_thread) {
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i += 4)
        *reinterpret_cast<float4*>(&to[(i / 4 * kWarpgroup + own_thread) * 4]) =
            float4{dq.element[i], dq.element[i + 1], dq.element[i + 2], dq.element[i + 3]};
    ptx::fence_proxy_async();
    ptx::bar_arrive(kDqFull, kDqThreads);
}

// Rows of another document need not be finite, and then would not vanish under weights of 0.
template <class T, int ROWS, int COLUMNS>
__device__ void zero_tail(SharedTile<T, ROWS, COLUMNS>& tile, int rows) {
    zero_rows(tile, rows, static_cast<int>(threadIdx.x) - kWarpgroup, kConsumerThreads);
}

// Every NaN of q or k becomes 0, before the consumers go on: of a hidden pair it would come through under a
// ds of 0. Where it is seen, lse is NaN, and with it the weights.
template <class T, int ROWS, int COLUMNS>
__device__ void clear_nan(SharedTile<T, ROWS, COLUMNS>& tile) {
    // Of the 15 bits below the sign a NaN's are more than an infinity's; what is added carries those into the
    // sign.
    constexpr uint32_t kInfinity = std::is_same_v<T, bfloat16> ? 0x7F80 : 0x7C00;
    constexpr uint32_t kCarry = (0x7FFF - kInfinity) * 0x10001;
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x) - kWarpgroup; i < tile.kBytes / 16; i += kConsumerThreads) {
        uint4& four = reinterpret_cast<uint4*>(tile.bytes)[i];
        const auto nan = [](uint32_t pair) { return (pair & 0x7FFF7FFF) + kCarry & 0x80008000; };
        const uint4 found{nan(four.x), nan(four.y), nan(four.z), nan(four.w)};
        if ((found.x | found.y | found.z | found.w) == 0) continue;
        const auto cleared = [](uint32_t pair, uint32_t nan) { return pair & ~((nan >> 15) * 0xFFFF); };
        four = uint4{cleared(four.x, found.x), cleared(four.y, found.y), cleared(four.z, found.z),
                     cleared(four.w, found.w)};
    }
    ptx::fence_proxy_async();
    ptx::bar_sync(kTail, kConsumerThreads);
}

// The consumers' first step. keys_left: of the document, from the tile's first on.
template <class T, int D>
__device__ void wait_for_keys(const AttentionParams& p, Shared<T, D>& shared, int keys_left) {
    ptx::mbarrier_wait(&shared.keys_full, 0, "keys_full");
    if (p.cu_seqlens_k != nullptr && keys_left < kKeys<D>) {
        zero_tail(shared.k, keys_left);
        zero_tail(shared.v, keys_left);
        ptx::bar_sync(kTail, kConsumerThreads);
    }
    clear_nan(shared.k);
}

}  // namespace lmkern::cuda
