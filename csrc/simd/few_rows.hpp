// Products of a few rows, the queries, with many others, keys and values, each at an address of its own.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd/tile.hpp"

namespace lmkern {

// Lane l of (a, b) by `bit`: lanes where it is 0 add a[l] + a[l ^ bit], the others b[l] + b[l ^ bit].
template <class C, int bit>
inline Vector<C> fold(Vector<C> a, Vector<C> b) {
    constexpr int lanes = kLanes<C>;
    Integers<C> own, other;
    for (int lane = 0; lane < lanes; ++lane) {
        const int from = lane & bit ? lanes : 0;
        own[lane] = from + lane;
        other[lane] = from + (lane ^ bit);
    }
#if defined(__clang__)
    Vector<C> sum;
    for (int lane = 0; lane < lanes; ++lane)
        sum[lane] = lane & bit ? b[lane] + b[lane ^ bit] : a[lane] + a[lane ^ bit];
    return sum;
#else
    return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
#endif
}

// Lane l of the result is the sum over the lanes of rows[l].
template <class C, int bit = 1>
inline Vector<C> sums_of_rows(const Vector<C>* rows) {
    if constexpr (bit == kLanes<C>) {
        return rows[0];
    } else {
        Vector<C> folded[kLanes<C> / bit / 2];
#pragma GCC unroll 8
        for (int i = 0; i < kLanes<C> / bit / 2; ++i) folded[i] = fold<C, bit>(rows[2 * i], rows[2 * i + 1]);
        return sums_of_rows<C, 2 * bit>(folded);
    }
}

// How a row of stored S becomes vectors: read(p, add) calls add(i, vector) for its kVectors vectors i.
template <class S>
struct InOrder {
    static constexpr int kVectors = 1;
    template <class Add>
    static void read(const S* p, const Add& add) {
        add(0, load(p));
    }
};

// Elements of even index, then those of odd index: half of the instructions that order takes, for rows of
// whole pairs of vectors.
struct EvenThenOdd {
    static constexpr int kVectors = 2;
    template <class Add>
    static void read(const bfloat16* p, const Add& add) {
        Vector<uint32_t> bits;
        std::memcpy(&bits, p, sizeof bits);
        add(0, bit_cast<Vector<float>>(bits << 16));
        add(1, bit_cast<Vector<float>>(bits & 0xffff0000u));
    }
};

// Where element d of a row stands when it is read so.
template <class Order>
inline int64_t place_of(int64_t d, int64_t lanes) {
    if constexpr (Order::kVectors == 1) return d;
    const int64_t within = d % (2 * lanes);
    return d - within + within % 2 * lanes + within / 2;
}

// How many rows of a list ahead of the one that is read a row is asked for: into the first cache, and before
// that into the second (0: it is not).
struct Ahead {
    int64_t near, far;
};

// Asks for the elements from `offset` on of the rows ahead of *row, once a cache line.
template <class S>
inline void prefetch(const S* const* row, Ahead ahead, int64_t offset) {
    if (offset * static_cast<int64_t>(sizeof(S)) % 64 != 0) return;
    __builtin_prefetch(row[ahead.near] + offset);
    if (ahead.far != 0) __builtin_prefetch(row[ahead.far] + offset, 0, 2);
}

// scores[m][j] = q[m] . keys[j] for `queries` rows of q and kLanes<C> keys, while the rows `ahead` come
// nearer. q stands in Order, padded with zeros to whole vectors.
template <class Order, int queries, class S, class C = Compute<S>>
inline void score_keys(Block<C> q, const S* const* keys, Ahead ahead, int64_t D, Block<C> scores) {
    constexpr int lanes = kLanes<C>, keys_at_once = lanes / queries, step = Order::kVectors * lanes;
    const int64_t whole = D / step * step;
    for (int first = 0; first < lanes; first += keys_at_once) {
        Vector<C> products[lanes];
#pragma GCC unroll 16
        for (int j = 0; j < keys_at_once; ++j) {
            const S* key = keys[first + j];
            Vector<C> acc[queries] = {}, part[queries] = {};
            auto add = [&](int64_t d, Vector<C> k) {
#pragma GCC unroll 4
                for (int m = 0; m < queries; ++m) part[m] += k * load(q.data + m * q.stride + d);
            };
            for (int64_t d = 0; d < whole;) {
                const int64_t end = std::min(whole, d + kPartDepth<C> * lanes);
#pragma GCC unroll 8
                for (; d < end; d += step) {
                    prefetch(keys + first + j, ahead, d);
                    Order::read(key + d, [&](int i, Vector<C> k) { add(d + i * lanes, k); });
                }
#pragma GCC unroll 4
                for (int m = 0; m < queries; ++m) {
                    acc[m] += part[m];
                    part[m] = Vector<C>{};
                }
            }
            if (whole < D) add(whole, load(key + whole, D - whole));
#pragma GCC unroll 4
            for (int m = 0; m < queries; ++m) products[m * keys_at_once + j] = acc[m] + part[m];
        }
        const Vector<C> sums = sums_of_rows<C>(products);
#pragma GCC unroll 4
        for (int m = 0; m < queries; ++m)
            std::memcpy(scores.data + m * scores.stride + first,
                        reinterpret_cast<const char*>(&sums) + m * keys_at_once * sizeof(C),
                        keys_at_once * sizeof(C));
    }
}

// body(row, constant) for as many query rows as fit into registers at once, until there are none left.
template <class C, class Body>
void for_query_rows(int64_t rows, const Body& body) {
    int64_t row = 0;
    if constexpr (kLanes<C> >= 4)
        for (; row + 4 <= rows; row += 4) body(row, std::integral_constant<int, 4>{});
    for (; row + 2 <= rows; row += 2) body(row, std::integral_constant<int, 2>{});
    if (row < rows) body(row, std::integral_constant<int, 1>{});
}

// score_keys for any numbers of queries and of keys, a multiple of kLanes<C>.
template <class Order, class S, class C = Compute<S>>
void score_rows(Block<C> q, int64_t rows, const S* const* keys, int64_t count, Ahead ahead, int64_t D,
                Block<C> scores) {
    for (int64_t j = 0; j < count; j += kLanes<C>)
        for_query_rows<C>(rows, [&](int64_t row, auto queries) {
            const Block<C> from{q.data + row * q.stride, q.stride};
            const Block<C> to{scores.data + row * scores.stride + j, scores.stride};
            score_keys<Order, queries>(from, keys + j, row == 0 ? ahead : Ahead{0, 0}, D, to);
        });
}

// acc[m] += weights[m][j] * values[j] over the rows j, for `queries` rows of weights; `vectors` vectors from
// the column `first` on, of rows of D elements: a single vector may end there. acc stands in Order. `ahead`
// as in score_keys.
template <class Order, int queries, int vectors, class S, class C = Compute<S>>
inline void add_values(Block<C> weights, const S* const* values, Ahead ahead, int64_t rows, int64_t first,
                       int64_t D, Block<C> acc) {
    constexpr int lanes = kLanes<C>, step = Order::kVectors;
    const bool ragged = vectors == 1 && first + lanes > D;
    Vector<C> part[queries][vectors] = {};
    for (int64_t j = 0; j < rows; ++j) {
        const S* value = values[j] + first;
        Vector<C> weight[queries];
#pragma GCC unroll 4
        for (int m = 0; m < queries; ++m) weight[m] = broadcast(weights.data[m * weights.stride + j]);
        auto add = [&](int i, Vector<C> v) {
#pragma GCC unroll 4
            for (int m = 0; m < queries; ++m) part[m][i] += weight[m] * v;
        };
        if (ragged) {
            add(0, load(value, D - first));
            continue;
        }
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i += step) {
            prefetch(values + j, ahead, first + i * lanes);
            Order::read(value + i * lanes, [&](int place, Vector<C> v) { add(i + place, v); });
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < queries; ++m)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; ++i) {
            C* place = acc.data + m * acc.stride + first + i * lanes;
            store(place, load(place) + part[m][i]);
        }
}

}  // namespace lmkern
