// What the passes of layer norm share: a row in vectors, and the types of x and its parameters.
#pragma once

#include <algorithm>

#include "core/parallel_for.hpp"
#include "layer_norm/params.hpp"
#include "simd/vector.hpp"

namespace lmkern {

// Rows handed to a thread at a time.
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

// The sum over a row of the vectors that body gives, four running sums wide: shorter chains, smaller errors.
template <class C, class Body>
inline C sum_over_row(int64_t columns, const Body& body) {
    constexpr int64_t lanes = kLanes<C>;
    Vector<C> s0{}, s1{}, s2{}, s3{};
    int64_t column = 0;
    for (; column + 4 * lanes <= columns; column += 4 * lanes) {
        s0 += body(Whole<C>{column});
        s1 += body(Whole<C>{column + lanes});
        s2 += body(Whole<C>{column + 2 * lanes});
        s3 += body(Whole<C>{column + 3 * lanes});
    }
    for (; column + lanes <= columns; column += lanes) s0 += body(Whole<C>{column});
    if (column < columns) s1 += body(Tail<C>{column, columns - column});
    return sum<C>((s0 + s1) + (s2 + s3));
}

}  // namespace lmkern
