// What the forward and the backward pass of attention share: block sizes, and matrices seen as blocks.
#pragma once

#include <algorithm>
#include <limits>

#include "attention/params.hpp"
#include "core/parallel_for.hpp"
#include "core/workspace.hpp"
#include "simd/tile.hpp"

namespace lmkern {

// Queries stand in the lanes of the scores (S^T = K Q^T): a row's maximum and sum need no step across lanes,
// and K is read as it lies. Both counts are multiples of every vector width.
constexpr int64_t kQueryBlock = 64;
constexpr int64_t kKeyBlock = 64;

// Of e^r's polynomial, by the type of q, k and v: 16-bit results need no more than 2e-6.
template <class T>
constexpr int kExpDegree = sizeof(T) == 2 ? 5 : ExpConstants<Compute<T>>::degree;

// One head's (N, D) matrix.
template <class T>
struct Matrix {
    T* data;
    int64_t row_stride, column_stride;

    T* row(int64_t index) const { return data + index * row_stride; }
};

template <class T>
Matrix<T> head_of(const void* tensor, const Strides& strides, int64_t batch, int64_t head) {
    T* data = static_cast<T*>(const_cast<void*>(tensor));
    return {data + batch * strides.batch + head * strides.head, strides.row, strides.column};
}

// Hides from each query lane the keys past its diagonal: sets `hidden` in the (keys, queries) block.
template <class C>
void mask_diagonal(Block<C> scores, int64_t first_key, int64_t keys, int64_t first_query, int64_t queries,
                   int64_t diagonal, C hidden) {
    const Integers<C> lane = lane_indices<C>();
    for (int64_t j = 0; j < keys; ++j) {
        // Query lane i sees key j when first_key + j <= first_query + i + diagonal.
        const int64_t first_seeing = first_key + j - first_query - diagonal;
        const int64_t bounded = std::min<int64_t>(std::max<int64_t>(first_seeing, 0), kQueryBlock);
        for (int64_t i = 0; i < queries; i += kLanes<C>) {
            C* place = scores.data + j * scores.stride + i;
            const auto first = static_cast<typename IntegerOf<C>::type>(bounded - i);
            store(place, lane < first ? broadcast(hidden) : load(place));
        }
    }
}

}  // namespace lmkern
