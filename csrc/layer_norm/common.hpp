// What the passes of layer norm share: a row in vectors, and the types of x and its parameters.
#pragma once

#include <algorithm>
#include <array>

#include "core/parallel_for.hpp"
#include "layer_norm/params.hpp"
#include "simd/vector.hpp"

namespace lmkern {

// Fewer rows than this are not worth another thread.
constexpr int64_t kRowsPerTask = 16;

// body(type of x, type of weight and bias): the same, or float32 parameters beside a 16-bit x.
template <class Body>
void with_types(const LayerNormParams& p, const Body& body) {
    with_type(static_cast<Dtype>(p.dtype), [&](auto type) {
        if constexpr (sizeof(typename decltype(type)::type) == 2)
            if (p.parameter_dtype == static_cast<int64_t>(Dtype::float32)) return body(type, Type<float>{});
        body(type, type);
    });
}

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
    Vector<C> inside(Vector<C> v) const { return v; }
};

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
    // v with zero in the lanes beyond the row.
    Vector<C> inside(Vector<C> v) const {
        return lane_indices<C>() < static_cast<typename IntegerOf<C>::type>(count) ? v : Vector<C>{};
    }
};

template <class C, class Body>
inline void for_row(int64_t columns, const Body& body) {
    int64_t column = 0;
    for (; column + kLanes<C> <= columns; column += kLanes<C>) body(Whole<C>{column});
    if (column < columns) body(Tail<C>{column, columns - column});
}

// The sums over a row of what body(at, add) adds: add(which, vector). Running sums take turns, four each, and
// start anew every block of columns: short chains are fast, and their rounding errors small.
template <class C, int count, class Body>
inline std::array<C, count> sums_over_row(int64_t columns, const Body& body) {
    constexpr int64_t lanes = kLanes<C>, turns = 4, block = 32 * turns * lanes;
    Vector<C> total[count] = {};
    for (int64_t column = 0; column < columns;) {
        const int64_t end = std::min(columns, column + block);
        Vector<C> running[turns][count] = {};
        auto step = [&](auto at, int turn) {
            body(at, [&](int which, Vector<C> v) { running[turn][which] += v; });
        };
        for (; column + turns * lanes <= end; column += turns * lanes) {
            step(Whole<C>{column}, 0);
            step(Whole<C>{column + lanes}, 1);
            step(Whole<C>{column + 2 * lanes}, 2);
            step(Whole<C>{column + 3 * lanes}, 3);
        }
        for (; column + lanes <= end; column += lanes) step(Whole<C>{column}, 0);
        if (column < end) step(Tail<C>{column, end - column}, 1);
        column = end;
        for (int which = 0; which < count; ++which)
            total[which] += (running[0][which] + running[1][which]) + (running[2][which] + running[3][which]);
    }
    std::array<C, count> sums;
    for (int which = 0; which < count; ++which) sums[which] = sum<C>(total[which]);
    return sums;
}

}  // namespace lmkern
