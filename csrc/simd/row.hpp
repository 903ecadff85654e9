// A row in vectors: whole ones and a last part, and sums over it.
#pragma once

#include <algorithm>
#include <array>

#include "simd/vector.hpp"

namespace lmkern {

// A whole vector of a row: at(p) loads from there, at.store(p, v) stores.
template <class C>
struct Whole {
    int64_t column;

    template <class T>
    Vector<C> operator()(const T* p) const {
        return load(p + column);
    }
    template <class T>
    void store(T* p, Vector<C> v) const {
        lmkern::store(p + column, v);
    }
    template <class T>
    void stream(T* p, Vector<C> v) const {
        lmkern::stream(p + column, v);
    }
    // Asks for what lies there, on its way from memory to the second cache; it need not belong to a tensor.
    template <class T>
    void prefetch(const T* p) const {
        __builtin_prefetch(p + column, 0, 2);
    }
    Vector<C> inside(Vector<C> v) const { return v; }
};

// Two vectors of a row: its elements of even index in these columns, and those of odd index. What is C is
// scratch memory and has the ones before the others.
template <class C>
struct WholePair {
    int64_t column;

    EvenOdd<C> operator()(const bfloat16* p) const { return load_pairs(p + column); }
    EvenOdd<C> operator()(const C* p) const { return {load(p + column), load(p + column + kLanes<C>)}; }
    void store(bfloat16* p, EvenOdd<C> v) const {
        const Halves halves = narrow_pairs(v);
        std::memcpy(p + column, &halves, sizeof halves);
    }
    void store(C* p, EvenOdd<C> v) const {
        lmkern::store(p + column, v.even);
        lmkern::store(p + column + kLanes<C>, v.odd);
    }
    void stream(bfloat16* p, EvenOdd<C> v) const {
        const Halves halves = narrow_pairs(v);
        stream_vector(p + column, &halves);
    }
    template <class T>
    void prefetch(const T* p) const {
        Whole<C>{column}.prefetch(p);
    }
    EvenOdd<C> inside(EvenOdd<C> v) const { return v; }
};

// Where a column stands in such scratch memory.
template <class C>
inline int64_t place_in_pairs(int64_t column) {
    const int64_t lanes = kLanes<C>, within = column % (2 * lanes);
    return column - within + within / 2 + within % 2 * lanes;
}

// The last columns of a row, fewer than a vector; lanes beyond them load zero and are not stored.
template <class C>
struct Tail {
    int64_t column, count;

    template <class T>
    Vector<C> operator()(const T* p) const {
        return load(p + column, count);
    }
    template <class T>
    void store(T* p, Vector<C> v) const {
        lmkern::store(p + column, v, count);
    }
    // Rows that are streamed have no last part.
    template <class T>
    void stream(T* p, Vector<C> v) const {
        store(p, v);
    }
    template <class T>
    void prefetch(const T*) const {}
    // v with zero in the lanes beyond the row.
    Vector<C> inside(Vector<C> v) const {
        return lane_indices<C>() < static_cast<typename IntegerOf<C>::type>(count) ? v : Vector<C>{};
    }
};

// The last vector of a row that is no whole number of them: it begins in columns that were done before, whose
// lanes `inside` clears. Cheaper than Tail, where a row has a vector, and what is computed there may be
// again.
template <class C>
struct Last {
    int64_t columns;

    template <class T>
    Vector<C> operator()(const T* p) const {
        return load(p + columns - kLanes<C>);
    }
    template <class T>
    void store(T* p, Vector<C> v) const {
        lmkern::store(p + columns - kLanes<C>, v);
    }
    // Rows that are streamed have no last part.
    template <class T>
    void stream(T* p, Vector<C> v) const {
        store(p, v);
    }
    template <class T>
    void prefetch(const T*) const {}
    Vector<C> inside(Vector<C> v) const {
        const auto before = static_cast<typename IntegerOf<C>::type>(kLanes<C> - columns % kLanes<C>);
        return lane_indices<C>() >= before ? v : Vector<C>{};
    }
};

// in_pairs: the columns are whole pairs of vectors, and body takes those.
template <class C, bool in_pairs = false, class Body>
inline void for_row(int64_t columns, const Body& body) {
    int64_t column = 0;
    if constexpr (in_pairs) {
        for (; column < columns; column += 2 * kLanes<C>) body(WholePair<C>{column});
    } else {
        for (; column + kLanes<C> <= columns; column += kLanes<C>) body(Whole<C>{column});
        if (column < columns) body(Tail<C>{column, columns - column});
    }
}

// The same for a body that writes what it has not read: it may see a column twice.
template <class C, bool in_pairs = false, class Body>
[[gnu::always_inline]] inline void for_row_anew(int64_t columns, const Body& body) {
    int64_t column = 0;
    if constexpr (in_pairs) {
        for (; column < columns; column += 2 * kLanes<C>) body(WholePair<C>{column});
    } else {
        for (; column + kLanes<C> <= columns; column += kLanes<C>) body(Whole<C>{column});
        if (column < columns && columns >= kLanes<C>)
            body(Last<C>{columns});
        else if (column < columns)
            body(Tail<C>{column, columns - column});
    }
}

// The sums over the columns of what body(at, add) adds: add(which, vector). Running sums take turns and start
// anew every 32 additions: short chains are fast, and their rounding errors small; the total of the chains
// carries its own (Kahan's summation). The order of the additions does not depend on count.
template <class C, int count, int turns, bool in_pairs = false, class Body>
inline std::array<C, count> sums_over_row(int64_t columns, const Body& body) {
    constexpr int64_t lanes = kLanes<C>, block = 32 * turns * lanes;
    Vector<C> total[count] = {}, lost[count] = {};
    for (int64_t column = 0; column < columns;) {
        const int64_t end = std::min(columns, column + block);
        Vector<C> running[turns][count] = {};
        auto step = [&](auto at, int turn) {
            body(at, [&](int which, auto v) {
                if constexpr (in_pairs) {
                    running[0][which] += v.even;
                    running[turns - 1][which] += v.odd;
                } else {
                    running[turn][which] += v;
                }
            });
        };
        if constexpr (in_pairs) {
            for (; column < end; column += 2 * lanes) step(WholePair<C>{column}, 0);
        } else {
            for (; column + turns * lanes <= end; column += turns * lanes)
#pragma GCC unroll 4
                for (int turn = 0; turn < turns; ++turn) step(Whole<C>{column + turn * lanes}, turn);
            for (; column + lanes <= end; column += lanes) step(Whole<C>{column}, 0);
            if (column < end && columns >= lanes)
                step(Last<C>{columns}, turns - 1);
            else if (column < end)
                step(Tail<C>{column, end - column}, turns - 1);
        }
        column = end;
        // Unrolled: else all of these stay in memory.
#pragma GCC unroll 4
        for (int turn = 0; turn < turns; ++turn)
#pragma GCC unroll 4
            for (int which = 0; which < count; ++which) {
                const Vector<C> more = running[turn][which] - lost[which], grown = total[which] + more;
                lost[which] = (grown - total[which]) - more;
                total[which] = grown;
            }
    }
    std::array<C, count> sums;
#pragma GCC unroll 4
    for (int which = 0; which < count; ++which) sums[which] = sum<C>(total[which]);
    return sums;
}

}  // namespace lmkern
