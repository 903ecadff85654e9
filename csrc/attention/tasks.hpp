// How attention's work is shared out: by sequence, key/value head and range of queries, longest first.
#pragma once

#include <algorithm>
#include <vector>

#include "attention/bf16_operands.hpp"
#include "attention/cpu.hpp"
#include "core/parallel_for.hpp"

namespace lmkern {

// body(Type<engine>{}): products of bfloat16 pairs where the module has them.
template <class Body>
void with_engine(const AttentionParams& p, const Body& body) {
    if (p.head_dim > kMaxHeadDim) throw std::invalid_argument("lmkern: head_dim beyond what attention takes");
    with_any_type(static_cast<Dtype>(p.dtype), [&](auto type) {
        using T = typename decltype(type)::type;
        if constexpr ((kAttentionTypes >> static_cast<int64_t>(kDtype<T>) & 1) == 0)
            throw std::invalid_argument("lmkern: this module does not compute in that dtype");
#if defined(__AVX512BF16__)
        else
            body(Type<Bf16Engine<T>>{});
#else
        else
            body(Type<VectorEngine<T>>{});
#endif
    });
}

// The queries of one sequence for the heads of one key/value head.
struct QueryTask {
    int64_t sequence, head_kv;
    int64_t first_query, end_query;
    int64_t scores;
};

// About the scores of some queries that are seen, of the keys in a range.
inline int64_t seen_scores(const Band& band, int64_t first_query, int64_t end_query, int64_t first_key,
                           int64_t end_key) {
    int64_t seen = 0;
    for (int64_t query = first_query; query < end_query; ++query)
        seen +=
            std::max<int64_t>(std::min(band.end(query), end_key) - std::max(band.begin(query), first_key), 0);
    return seen;
}

// Backward: a part of the work on one key/value head: the query heads, queries and keys it covers, and what
// it makes.
struct Part {
    int64_t sequence, head_kv;
    int64_t first_head, end_head;
    int64_t first_query, end_query;
    int64_t first_key, end_key;
    bool dq, dk, dv, dbias;
    int64_t scores = 0;

    void count_scores(const AttentionParams& p) {
        const Band band(p, sequence_of(p, sequence));
        scores = seen_scores(band, first_query, end_query, first_key, end_key) * (end_head - first_head);
    }
};

// So that no thread is left with a long one at the end. scores: of a task, what the time goes with.
template <class Task>
void longest_first(std::vector<Task>& tasks) {
    std::stable_sort(tasks.begin(), tasks.end(),
                     [](const Task& a, const Task& b) { return a.scores > b.scores; });
}

// Whole heads where there are enough of them to go round; else heads cut into ranges of about equal work,
// each a multiple of `step` queries, so that the blocks within are the same however many threads there are.
inline std::vector<QueryTask> query_tasks(const AttentionParams& p, int64_t step) {
    std::vector<QueryTask> tasks;
    const int64_t heads = p.sequences * p.heads_kv;
    // One task too many on a thread costs a quarter of its time at most.
    const bool whole = p.threads == 1 || heads % p.threads == 0 || heads >= 4 * p.threads;
    const int64_t parts = whole ? 1 : ceil_div(4 * p.threads, std::max<int64_t>(heads, 1));
    for (int64_t index = 0; index < p.sequences; ++index) {
        const Sequence s = sequence_of(p, index);
        const Band band(p, s);
        const int64_t total = seen_scores(band, 0, s.n_q, 0, s.n_k);
        int64_t first = 0, sum = 0;
        for (int64_t query = 0; query < s.n_q; query += step) {
            const int64_t end = std::min(query + step, s.n_q);
            sum += seen_scores(band, query, end, 0, s.n_k);
            if (end < s.n_q && sum * parts < total) continue;
            for (int64_t head = 0; head < p.heads_kv; ++head) tasks.push_back({index, head, first, end, sum});
            first = end;
            sum = 0;
        }
    }
    longest_first(tasks);
    return tasks;
}

}  // namespace lmkern
