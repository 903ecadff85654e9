// Embedding backward on the CPU: dweight[v] = the sum of the rows of dy whose token is v, in their order.
//
// A counting sort brings equal tokens together. A task owns a range of tokens, so that every row of dweight
// has one owner and one order of sums, whatever the number of threads.
#include <algorithm>
#include <cstring>

#include "core/parallel_for.hpp"
#include "embedding/cpu.hpp"
#include "simd/vector.hpp"

namespace lmkern {
namespace {

// starts[v] to starts[v + 1]: where in `order` the positions of token v stand, ascending.
void sort_positions(const EmbeddingParams& p) {
    std::fill_n(p.starts, p.vocabulary + 1, int64_t{0});
    for (int64_t i = 0; i < p.count; ++i)
        if (p.tokens[i] != p.padding_idx) ++p.starts[p.tokens[i] + 1];
    for (int64_t v = 0; v < p.vocabulary; ++v) p.starts[v + 1] += p.starts[v];
    // Each start moves on to the next one's place as its positions are put down; then all move back.
    for (int64_t i = 0; i < p.count; ++i)
        if (p.tokens[i] != p.padding_idx) p.order[p.starts[p.tokens[i]]++] = i;
    for (int64_t v = p.vocabulary; v > 0; --v) p.starts[v] = p.starts[v - 1];
    p.starts[0] = 0;
}

// The columns [column, column + vectors * lanes), cut off at the row's end, of one row of dweight.
template <class T, int vectors>
void sum_strip(const EmbeddingParams& p, int64_t v, int64_t column) {
    using C = Compute<T>;
    constexpr int64_t lanes = kLanes<C>;
    // Rounding errors grow with the block, not with the number of positions.
    constexpr int64_t block = 32;
    const int64_t tail = std::min(lanes, p.columns - column);
    Vector<C> total[vectors] = {};
    for (int64_t first = p.starts[v]; first < p.starts[v + 1]; first += block) {
        const int64_t end = std::min(p.starts[v + 1], first + block);
        Vector<C> running[vectors] = {};
        for (int64_t i = first; i < end; ++i) {
            const T* dy = static_cast<const T*>(p.dy) + p.order[i] * p.dy_stride + column;
            if constexpr (vectors == 1)
                running[0] += tail < lanes ? load(dy, tail) : load(dy);
            else
                for (int k = 0; k < vectors; ++k) running[k] += load(dy + k * lanes);
        }
        for (int k = 0; k < vectors; ++k) total[k] += running[k];
    }
    T* dweight = static_cast<T*>(p.dweight) + v * p.columns + column;
    if (tail < lanes)
        store(dweight, total[0], tail);
    else
        for (int k = 0; k < vectors; ++k) store(dweight + k * lanes, total[k]);
}

template <class T>
void sum_tokens(const EmbeddingParams& p, int64_t first, int64_t end) {
    constexpr int64_t lanes = kLanes<Compute<T>>, strip = 8 * lanes;
    for (int64_t v = first; v < end;) {
        // Most of a large vocabulary is not in a batch: one fill for each run of tokens that are not.
        int64_t seen = v;
        while (seen < end && p.starts[seen] == p.starts[seen + 1]) ++seen;
        std::memset(static_cast<T*>(p.dweight) + v * p.columns, 0,
                    static_cast<size_t>((seen - v) * p.columns) * sizeof(T));
        v = seen;
        if (v == end) return;
        int64_t column = 0;
        for (; column + strip <= p.columns; column += strip) sum_strip<T, 8>(p, v, column);
        for (; column < p.columns; column += lanes) sum_strip<T, 1>(p, v, column);
        ++v;
    }
}

// The first token v with at least `cost` rows to read and write before it.
int64_t token_at_cost(const EmbeddingParams& p, int64_t cost) {
    int64_t low = 0, high = p.vocabulary;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (p.starts[middle] + middle < cost)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

}  // namespace

void embedding_backward(const EmbeddingParams& p) {
    with_type(static_cast<Dtype>(p.dtype), [&](auto type) {
        using T = typename decltype(type)::type;
        sort_positions(p);
        // More tasks than threads even out tokens that are frequent.
        const int64_t tasks = p.threads <= 1 ? 1 : 4 * p.threads;
        const int64_t cost = p.starts[p.vocabulary] + p.vocabulary;
        parallel_for(tasks, p.threads, [&](int64_t task) {
            const int64_t first = token_at_cost(p, ceil_div(cost * task, tasks));
            const int64_t last = token_at_cost(p, ceil_div(cost * (task + 1), tasks));
            sum_tokens<T>(p, first, task + 1 == tasks ? p.vocabulary : last);
        });
    });
}

}  // namespace lmkern
