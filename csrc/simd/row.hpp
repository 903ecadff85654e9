// A row in vectors: whole ones, and the tail that is shorter than one.
#pragma once

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

}  // namespace lmkern
