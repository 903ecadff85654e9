// Matrix blocks in scratch memory: packing them, and the one product under every kernel.
//
// A block is rows of Compute<T> values, `stride` apart, padded with zeros to whole vectors.
#pragma once

#include <algorithm>

#include "simd/vector.hpp"

namespace lmkern {

template <class C>
struct Block {
    C* data;
    int64_t stride;
};

template <class C>
constexpr int64_t padded(int64_t columns) {
    return (columns + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}

// Copies a (rows, columns) matrix with free strides into a block. Returns whether some of it is not finite.
template <class T>
bool pack(const T* from, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns,
          Block<Compute<T>> to) {
    using C = Compute<T>;
    constexpr int64_t lanes = kLanes<C>;
    Integers<C> odd{};
    for (int64_t row = 0; row < rows; ++row) {
        const T* source = from + row * row_stride;
        C* target = to.data + row * to.stride;
        for (int64_t column = 0; column < columns; column += lanes) {
            const int64_t count = columns - column < lanes ? columns - column : lanes;
            Vector<C> v;
            if (column_stride != 1) {
                T gathered[lanes] = {};
                for (int64_t lane = 0; lane < count; ++lane)
                    gathered[lane] = source[(column + lane) * column_stride];
                v = load(gathered);
            } else {
                v = count == lanes ? load(source + column) : load(source + column, count);
            }
            odd |= v - v != Vector<C>{};
            store(target + column, v);
        }
    }
    bool any = false;
    for (int lane = 0; lane < lanes; ++lane) any |= odd[lane] != 0;
    return any;
}

// The block with 0 for every NaN and infinity.
template <class C>
void clear_non_finite(Block<C> from, int64_t rows, int64_t columns, Block<C> to) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t column = 0; column < padded<C>(columns); column += kLanes<C>) {
            const Vector<C> v = load(from.data + row * from.stride + column);
            store(to.data + row * to.stride + column, v - v == Vector<C>{} ? v : Vector<C>{});
        }
}

// Writes a block's rows, each times its factor, to a (rows, columns) matrix with free strides.
template <class T, class Factor>
void unpack(Block<Compute<T>> from, int64_t rows, int64_t columns, T* to, int64_t row_stride,
            int64_t column_stride, const Factor& factor) {
    using C = Compute<T>;
    constexpr int64_t lanes = kLanes<C>;
    for (int64_t row = 0; row < rows; ++row) {
        const C scale = factor(row);
        T* target = to + row * row_stride;
        for (int64_t column = 0; column < columns; column += lanes) {
            const int64_t count = columns - column < lanes ? columns - column : lanes;
            const Vector<C> v = load(from.data + row * from.stride + column) * scale;
            if (column_stride != 1)
                for (int64_t lane = 0; lane < count; ++lane)
                    store_one(target + (column + lane) * column_stride, v[lane]);
            else if (count == lanes)
                store(target + column, v);
            else
                store(target + column, v, count);
        }
    }
}

// The left factor of a product, element (row, k) at data[row * row_stride + k * k_stride]: any layout serves,
// because the product broadcasts one element at a time.
template <class C>
struct Left {
    const C* data;
    int64_t row_stride, k_stride;
};

// Rows x vectors of the result that stay in registers: 6 x 4 of 32 registers, 6 x 2 of 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
constexpr int kTileRows = 6;

// Steps along the depth between two branches: the end of a longer run of them is foretold.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kDepthUnroll = 4;
#else
constexpr int kDepthUnroll = 1;
#endif

template <int rows, int vectors, bool accumulate, class C>
inline void product_tile(Left<C> a, Block<C> b, int64_t depth, Block<C> c) {
    Vector<C> acc[rows][vectors];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) acc[i][j] = Vector<C>{};
#pragma GCC unroll kDepthUnroll
    for (int64_t k = 0; k < depth; ++k) {
        Vector<C> right[vectors];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) right[j] = load(b.data + k * b.stride + j * kLanes<C>);
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) {
            const Vector<C> left = load_broadcast(a.data + i * a.row_stride + k * a.k_stride);
#pragma GCC unroll 4
            for (int j = 0; j < vectors; ++j) acc[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) {
            C* place = c.data + i * c.stride + j * kLanes<C>;
            store(place, accumulate ? load(place) + acc[i][j] : acc[i][j]);
        }
}

template <int vectors, bool accumulate, class C>
inline void product_rows(Left<C> a, Block<C> b, int64_t rows, int64_t depth, Block<C> c) {
    int64_t row = 0;
    auto at = [&](int64_t i) { return Left<C>{a.data + i * a.row_stride, a.row_stride, a.k_stride}; };
    auto to = [&](int64_t i) { return Block<C>{c.data + i * c.stride, c.stride}; };
    for (; row + kTileRows <= rows; row += kTileRows)
        product_tile<kTileRows, vectors, accumulate>(at(row), b, depth, to(row));
    if (row + 4 <= rows) {
        product_tile<4, vectors, accumulate>(at(row), b, depth, to(row));
        row += 4;
    }
    if (row + 2 <= rows) {
        product_tile<2, vectors, accumulate>(at(row), b, depth, to(row));
        row += 2;
    }
    if (row < rows) product_tile<1, vectors, accumulate>(at(row), b, depth, to(row));
}

// A sum runs over so many terms before it joins the others: its errors grow with this, not with the depth.
template <class C>
constexpr int64_t kPartDepth = sizeof(C) == 8 ? 16 : 32;

// All rows of `vectors` vectors of the result, part by part: they stay in the nearest cache meanwhile.
template <int vectors, class C>
void product_columns(Left<C> a, Block<C> b, int64_t rows, int64_t depth, Block<C> c, bool accumulate) {
    int64_t k = 0;
    do {
        const Left<C> left{a.data + k * a.k_stride, a.row_stride, a.k_stride};
        const Block<C> right{b.data + k * b.stride, b.stride};
        const int64_t part = std::min(depth - k, kPartDepth<C>);
        if (accumulate)
            product_rows<vectors, true>(left, right, rows, part, c);
        else
            product_rows<vectors, false>(left, right, rows, part, c);
        k += kPartDepth<C>;
        accumulate = true;
    } while (k < depth);
}

// c (rows, columns) = a (rows, depth) @ b (depth, columns), added to c with `accumulate`; whole vectors. The
// depth is at least 1.
template <class C>
void product(Left<C> a, Block<C> b, int64_t rows, int64_t columns, int64_t depth, Block<C> c,
             bool accumulate) {
    int64_t vectors = padded<C>(columns) / kLanes<C>;
    int64_t column = 0;
    auto right = [&] { return Block<C>{b.data + column, b.stride}; };
    auto result = [&] { return Block<C>{c.data + column, c.stride}; };
    for (; vectors >= kTileVectors; vectors -= kTileVectors, column += kTileVectors * kLanes<C>)
        product_columns<kTileVectors>(a, right(), rows, depth, result(), accumulate);
    for (; vectors >= 2; vectors -= 2, column += 2 * kLanes<C>)
        product_columns<2>(a, right(), rows, depth, result(), accumulate);
    if (vectors == 1) product_columns<1>(a, right(), rows, depth, result(), accumulate);
}

}  // namespace lmkern
