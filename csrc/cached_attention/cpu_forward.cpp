// Attention of few queries over a cache: every key and value is read from memory once, by one task, whatever
// the number of query heads that share it.
//
// The keys of a sequence fall into ranges of fixed size (flash decoding, Dao et al. 2023, with splits that
// depend on nothing but the key's index). A task takes one range of one key/value head and leaves the maximum
// and sum of its weights and the values under them; then the ranges of a query join in order. So the bits
// depend neither on the threads nor on what else is in the batch.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "cached_attention/cpu.hpp"
#include "core/parallel_for.hpp"
#include "core/workspace.hpp"
#include "simd/few_rows.hpp"
#include "simd/tanh.hpp"

namespace lmkern {
namespace {

// Query rows that are taken through a range of keys together.
constexpr int64_t kRowBlock = 16;
// Sums over values run over so many keys before they join the others.
constexpr int64_t kSumBlock = 32;
// Values are read in tiles of so many vectors, what is left of a row in the smallest.
constexpr int kValueVectors = 4;
// How far ahead of its use a row is asked for, into the first cache and into the second: pages end every
// 4 KiB, and the processor's own prefetching with them.
constexpr int64_t kNearBytes = 3072, kFarBytes = 16384;
// A cache of so many bytes lies in memory; what is smaller is near enough without the second.
constexpr int64_t kLarge = int64_t{16} << 20;
// A multiple of every vector width, in the layout of partials.
constexpr int64_t kWidthStep = 16;

template <class C>
constexpr C kInfinity = std::numeric_limits<C>::infinity();

// The sequence of one batch element, as its queries see it.
struct CachedKeys {
    int64_t length;
    int64_t first_position;  // of query 0; below zero it sees no key
    int64_t first_key;       // the first that any query sees

    CachedKeys(const CachedAttentionParams& p, int64_t batch)
        : length(p.lengths == nullptr ? p.n_max : p.lengths[batch]),
          first_position(length - p.n_q),
          first_key(p.left < 0 ? 0 : std::min(length, std::max<int64_t>(0, first_position - p.left))) {}

    int64_t first_split(const CachedAttentionParams& p) const { return first_key / p.split; }
    int64_t splits(const CachedAttentionParams& p) const {
        return ceil_div(length, p.split) - first_split(p);
    }
};

// What a range of keys leaves for `rows` query rows.
template <class C>
struct Partial {
    C* row_max;
    C* row_sum;
    Block<C> acc;

    Partial(const CachedAttentionParams& p, int64_t batch, int64_t head_kv, int64_t split) {
        const int64_t rows = p.heads / p.heads_kv * p.n_q, width = round_up(p.head_dim, kWidthStep);
        const int64_t index = (batch * p.heads_kv + head_kv) * ceil_div(p.n_max, p.split) + split;
        row_max = static_cast<C*>(p.partials) + index * rows * (width + 2);
        row_sum = row_max + rows;
        acc = {row_sum + rows, width};
    }
};

// The addresses of a range of one head's rows; the places up to a whole vector repeat the last one. Returns
// the place behind them.
template <class T>
const T** find_rows(const CachedAttentionParams& p, const void* cache, const Strides& strides, int64_t batch,
                    int64_t head_kv, int64_t begin, int64_t end, const T** rows) {
    const T* data = static_cast<const T*>(cache) + head_kv * strides.head;
    if (p.page_table == nullptr) {
        data += batch * strides.batch;
        for (int64_t key = begin; key < end; ++key) rows[key - begin] = data + key * strides.row;
    } else {
        const int32_t* pages = p.page_table + batch * p.page_table_stride;
        for (int64_t key = begin; key < end;) {
            const int64_t page = key / p.page_size, next = std::min(end, (page + 1) * p.page_size);
            const T* row = data + pages[page] * strides.batch + (key - page * p.page_size) * strides.row;
            for (; key < next; ++key, row += strides.row) rows[key - begin] = row;
        }
    }
    const int64_t count = end - begin, room = padded<Compute<T>>(count);
    std::fill_n(rows + count, room - count, rows[count - 1]);
    return rows + room;
}

// Rows whose elements are apart, copied to where they lie together; `rows` then has their new addresses.
template <class T>
void gather_rows(const T** rows, int64_t count, int64_t column_stride, int64_t D, T* room) {
    for (int64_t j = 0; j < count; ++j) {
        for (int64_t d = 0; d < D; ++d) room[j * D + d] = rows[j][d * column_stride];
        rows[j] = room + j * D;
    }
    std::fill_n(rows + count, padded<Compute<T>>(count) - count, rows[count - 1]);
}

template <class Order, class T, class C = Compute<T>>
void weigh_values(Block<C> weights, int64_t rows, const T* const* values, int64_t count, Ahead ahead,
                  int64_t D, Block<C> acc) {
    for (int64_t first_key = 0; first_key < count; first_key += kSumBlock) {
        const int64_t keys = std::min(kSumBlock, count - first_key);
        for (int64_t column = 0; column < D;) {
            const bool wide = column + kValueVectors * kLanes<C> <= D;
            const int64_t step = (wide ? kValueVectors : Order::kVectors) * kLanes<C>;
            for_query_rows<C>(rows, [&](int64_t row, auto queries) {
                const Block<C> from{weights.data + row * weights.stride + first_key, weights.stride};
                const Block<C> to{acc.data + row * acc.stride, acc.stride};
                const T* const* places = values + first_key;
                const Ahead next = row == 0 ? ahead : Ahead{0, 0};
                if (wide)
                    add_values<Order, queries, kValueVectors>(from, places, next, keys, column, D, to);
                else
                    add_values<Order, queries, Order::kVectors>(from, places, next, keys, column, D, to);
            });
            column += step;
        }
    }
}

// Turns one row of scores into weights e^(score - max); places up to a whole vector get 0. position: of the
// query; keys: of the row, from first_key on.
template <class C>
void softmax_row(const CachedAttentionParams& p, C* scores, int64_t first_key, int64_t keys, int64_t position,
                 C slope, C& row_max, C& row_sum) {
    constexpr int64_t lanes = kLanes<C>;
    using I = typename IntegerOf<C>::type;
    const int64_t first_seen = p.left < 0 ? 0 : std::max<int64_t>(0, position - p.left - first_key);
    const int64_t end_seen = std::min(keys, position + 1 - first_key);
    const C softcap = static_cast<C>(p.softcap);
    Vector<C> top = broadcast(-kInfinity<C>);
    for (int64_t j = 0; j < keys; j += lanes) {
        Vector<C> score = load(scores + j);
        if (softcap != C(0)) score = tanh<C>(score / softcap) * softcap;
        if (slope != C(0)) {
            const C distance = static_cast<C>(first_key + j - position);
            score += (__builtin_convertvector(lane_indices<C>(), Vector<C>) + distance) * slope;
        }
        if (j < first_seen || j + lanes > end_seen) {
            const Integers<C> lane = lane_indices<C>();
            const I from = static_cast<I>(std::min(lanes, std::max<int64_t>(0, first_seen - j)));
            const I to = static_cast<I>(std::min(lanes, std::max<int64_t>(0, end_seen - j)));
            score = lane >= from ? score : broadcast(-kInfinity<C>);
            score = lane < to ? score : broadcast(-kInfinity<C>);
        }
        store(scores + j, score);
        top = max(top, score);
    }
    row_max = top[0];
    for (int lane = 1; lane < lanes; ++lane) row_max = row_max > top[lane] ? row_max : top[lane];
    // A row that sees no key has row_max = -inf; subtracting 0 instead keeps e^-inf = 0 and no NaN.
    const C reference = row_max == -kInfinity<C> ? C(0) : row_max;
    Vector<C> total{};
    for (int64_t j = 0; j < keys; j += lanes) {
        const Vector<C> weight = exp<C>(load(scores + j) - reference);
        total += weight;
        store(scores + j, weight);
    }
    row_sum = sum<C>(total);
}

template <class T, class Order>
void forward_split(const CachedAttentionParams& p, int64_t batch, int64_t head_kv, int64_t split) {
    using C = Compute<T>;
    const CachedKeys sequence(p, batch);
    const int64_t begin = std::max(sequence.first_key, split * p.split);
    const int64_t end = std::min(sequence.length, (split + 1) * p.split), keys = end - begin;
    const int64_t group = p.heads / p.heads_kv, rows = group * p.n_q, D = p.head_dim, width = padded<C>(D);
    const Partial<C> partial(p, batch, head_kv, split);
    const bool gather_k = p.k_strides.column != 1, gather_v = p.v_strides.column != 1;

    Workspace& workspace = Workspace::of_this_thread();
    const int64_t used_bytes = D * static_cast<int64_t>(sizeof(T));
    auto rows_of = [&](int64_t bytes) { return std::clamp<int64_t>(bytes / used_bytes, 1, p.split); };
    const bool large = 2 * p.batch * p.heads_kv * p.n_max * used_bytes >= kLarge;
    const Ahead ahead{rows_of(kNearBytes), large ? rows_of(kFarBytes) : 0};
    const int64_t beyond = std::max(ahead.near, ahead.far);
    workspace.reserve(static_cast<size_t>(2 * p.split + beyond) * sizeof(T*) +
                      static_cast<size_t>(p.split * (gather_k + gather_v) * D) * sizeof(T) +
                      static_cast<size_t>((kRowBlock + 1) * width + kRowBlock * p.split) * sizeof(C));
    // One list, keys before values: looking ahead from the last keys finds the first values.
    const T** k_rows = workspace.take<const T*>(2 * p.split + beyond);
    const Block<C> q{workspace.take<C>(kRowBlock * width), width};
    const Block<C> ordered{workspace.take<C>(width), width};
    const Block<C> scores{workspace.take<C>(kRowBlock * p.split), p.split};
    const T** v_rows = find_rows(p, p.k, p.k_strides, batch, head_kv, begin, end, k_rows);
    const T** end_rows = find_rows(p, p.v, p.v_strides, batch, head_kv, begin, end, v_rows);
    // And from the last values what follows the keys in memory: the next range, or nothing; it is not read.
    const int64_t row_bytes = p.k_strides.row * static_cast<int64_t>(sizeof(T));
    for (int64_t j = 0; j < beyond; ++j)
        end_rows[j] =
            reinterpret_cast<const T*>(reinterpret_cast<intptr_t>(k_rows[keys - 1]) + (j + 1) * row_bytes);
    if (gather_k) gather_rows(k_rows, keys, p.k_strides.column, D, workspace.take<T>(p.split * D));
    if (gather_v) gather_rows(v_rows, keys, p.v_strides.column, D, workspace.take<T>(p.split * D));

    for (int64_t first = 0; first < rows; first += kRowBlock) {
        const int64_t here = std::min(kRowBlock, rows - first);
        auto head_of_row = [&](int64_t row) { return head_kv * group + (first + row) / p.n_q; };
        for (int64_t row = 0; row < here; ++row) {
            const T* data = static_cast<const T*>(p.q) + batch * p.q_strides.batch +
                            head_of_row(row) * p.q_strides.head + (first + row) % p.n_q * p.q_strides.row;
            pack(data, 0, p.q_strides.column, 1, D, ordered);
            C* to = q.data + row * width;
            for (int64_t d = 0; d < width; ++d)
                to[place_of<Order>(d, kLanes<C>)] = ordered.data[d] * static_cast<C>(p.softmax_scale);
        }
        score_rows<Order>(q, here, k_rows, keys, ahead, D, scores);
        for (int64_t row = 0; row < here; ++row) {
            const int64_t position = sequence.first_position + (first + row) % p.n_q;
            const C slope =
                p.alibi_slopes == nullptr ? C(0) : static_cast<const C*>(p.alibi_slopes)[head_of_row(row)];
            softmax_row<C>(p, scores.data + row * scores.stride, begin, keys, position, slope,
                           partial.row_max[first + row], partial.row_sum[first + row]);
        }
        const Block<C> acc{partial.acc.data + first * partial.acc.stride, partial.acc.stride};
        std::fill_n(acc.data, here * acc.stride, C(0));
        weigh_values<Order>(scores, here, v_rows, keys, ahead, D, acc);
    }
}

// Joins the ranges of a key/value head's query rows in order, and writes out and lse.
template <class T, class Order>
void join_splits(const CachedAttentionParams& p, int64_t batch, int64_t head_kv) {
    using C = Compute<T>;
    const CachedKeys sequence(p, batch);
    const int64_t first_split = sequence.first_split(p), end_split = first_split + sequence.splits(p);
    const int64_t group = p.heads / p.heads_kv, width = padded<C>(p.head_dim);
    Workspace& workspace = Workspace::of_this_thread();
    workspace.reserve(2 * sizeof(C) * static_cast<size_t>(width));
    const Block<C> acc{workspace.take<C>(width), width}, ordered{workspace.take<C>(width), width};
    for (int64_t row = 0; row < group * p.n_q; ++row) {
        const int64_t head = head_kv * group + row / p.n_q, query = row % p.n_q;
        C row_max = p.sinks == nullptr ? -kInfinity<C> : static_cast<const C*>(p.sinks)[head];
        for (int64_t split = first_split; split < end_split; ++split)
            row_max = std::max(row_max, Partial<C>(p, batch, head_kv, split).row_max[row]);
        const C reference = row_max == -kInfinity<C> ? C(0) : row_max;
        C row_sum = p.sinks == nullptr ? C(0) : std::exp(static_cast<const C*>(p.sinks)[head] - reference);
        std::fill_n(acc.data, width, C(0));
        for (int64_t split = first_split; split < end_split; ++split) {
            const Partial<C> partial(p, batch, head_kv, split);
            if (partial.row_sum[row] == C(0)) continue;
            const C factor = std::exp(partial.row_max[row] - reference);
            row_sum += partial.row_sum[row] * factor;
            const C* from = partial.acc.data + row * partial.acc.stride;
            for (int64_t d = 0; d < width; d += kLanes<C>)
                store(acc.data + d, load(acc.data + d) + load(from + d) * factor);
        }
        T* out = static_cast<T*>(p.out) + batch * p.out_strides.batch + head * p.out_strides.head +
                 query * p.out_strides.row;
        // A row that saw no key has row_sum = 0 and acc = 0.
        const C scale = row_sum == C(0) ? C(1) : C(1) / row_sum;
        for (int64_t d = 0; d < width; ++d) ordered.data[d] = acc.data[place_of<Order>(d, kLanes<C>)];
        unpack(ordered, 1, p.head_dim, out, 0, p.out_strides.column, [&](int64_t) { return scale; });
        static_cast<C*>(p.lse)[(batch * p.heads + head) * p.n_q + query] = row_max + std::log(row_sum);
    }
}

// body(element type, order in which its rows are read).
template <class Body>
void with_order(const CachedAttentionParams& p, const Body& body) {
    with_type(static_cast<Dtype>(p.dtype), [&](auto type) {
        using T = typename decltype(type)::type;
        if constexpr (std::is_same_v<T, bfloat16>)
            if (p.head_dim % (2 * kLanes<float>) == 0) return body(type, EvenThenOdd{});
        body(type, InOrder<T>{});
    });
}

}  // namespace

void cached_attention_forward(const CachedAttentionParams& p) {
    if (p.heads == 0 || p.n_q == 0) return;
    // Of each sequence, the number of ranges in it and in those before it; of each head, those still to come.
    std::vector<int64_t> ends(static_cast<size_t>(p.batch) + 1, 0);
    std::vector<std::atomic<int64_t>> to_come(static_cast<size_t>(p.batch * p.heads_kv));
    for (int64_t batch = 0; batch < p.batch; ++batch) {
        const int64_t splits = CachedKeys(p, batch).splits(p);
        ends[batch + 1] = ends[batch] + splits * p.heads_kv;
        for (int64_t head_kv = 0; head_kv < p.heads_kv; ++head_kv)
            to_come[batch * p.heads_kv + head_kv] = splits;
    }
    const int64_t total = ends.back();
    // Neighbouring ranges go to one thread, whose reads then run on through memory: those of a head, or,
    // where the heads of a key lie side by side, those of the same keys.
    const int64_t tasks = std::min(total, p.threads * 8);
    const bool heads_beside = p.k_strides.head < p.k_strides.row;
    with_order(p, [&](auto type, auto order) {
        using T = typename decltype(type)::type;
        using Order = decltype(order);
        for (int64_t head = 0; head < p.batch * p.heads_kv; ++head)
            if (to_come[head] == 0) join_splits<T, Order>(p, head / p.heads_kv, head % p.heads_kv);
        parallel_for(tasks, p.threads, [&](int64_t task) {
            int64_t batch = 0;
            for (int64_t index = task * total / tasks; index < (task + 1) * total / tasks; ++index) {
                while (index >= ends[batch + 1]) ++batch;
                const CachedKeys sequence(p, batch);
                const int64_t place = index - ends[batch], splits = sequence.splits(p);
                const int64_t head_kv = heads_beside ? place % p.heads_kv : place / splits;
                const int64_t split = heads_beside ? place / p.heads_kv : place % splits;
                forward_split<T, Order>(p, batch, head_kv, sequence.first_split(p) + split);
                // Whoever comes last joins them, in their order.
                if (to_come[batch * p.heads_kv + head_kv].fetch_sub(1, std::memory_order_acq_rel) == 1)
                    join_splits<T, Order>(p, batch, head_kv);
            }
        });
    });
}

}  // namespace lmkern
