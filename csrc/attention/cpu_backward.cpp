// Attention backward on the CPU, deterministic: every sum has one owner and one order. How the work is cut
// into parts.
#include "attention/backward_part.hpp"
#include "attention/cpu.hpp"
#include "attention/tasks.hpp"

namespace lmkern {
namespace {

template <class E>
void run_parts(const AttentionParams& p, const std::vector<Part>& parts) {
    const auto count = static_cast<int64_t>(parts.size());
    parallel_for_ahead(count, p.threads, [&](int64_t index, const auto& next) {
        BackwardPart<E>(p, parts[index]).run([&]() -> const Part* {
            const int64_t after = next();
            return after < count ? &parts[after] : nullptr;
        });
    });
}

// Tiles of the bias's gradient: each sums over the heads and batch elements that its bias was broadcast to.
template <class E>
void bias_gradient(const AttentionParams& p) {
    const Strides& s = p.dbias_strides;
    const int64_t batches = s.batch == 0 ? 1 : p.batch, heads = s.head == 0 ? 1 : p.heads;
    const int64_t step = s.row == 0 ? p.n_q : E::kQueriesTogether,
                  blocks = ceil_div(p.n_q, std::max<int64_t>(step, 1));
    parallel_for(batches * heads * blocks, p.threads, [&](int64_t task) {
        const int64_t batch = task / blocks / heads, head = task / blocks % heads,
                      query = task % blocks * step;
        for (int64_t b = batch; b < (s.batch == 0 ? p.batch : batch + 1); ++b)
            for (int64_t h = head; h < (s.head == 0 ? p.heads : head + 1); ++h)
                BackwardPart<E>(p, Part{b, h / (p.heads / p.heads_kv), h, h + 1, query,
                                        std::min(query + step, p.n_q), 0, p.n_k, false, false, false, true})
                    .run([]() -> const Part* { return nullptr; });
    });
}

template <class E>
void backward(const AttentionParams& p) {
    const bool dq = p.dq != nullptr, dk = p.dk != nullptr, dv = p.dv != nullptr;
    if (p.dbias != nullptr) bias_gradient<E>(p);
    if (!dq && !dk && !dv && p.drelative_bias == nullptr) return;
    if (p.heads == 0) return;
    const int64_t group = p.heads / p.heads_kv, heads = p.sequences * p.heads_kv;
    // A whole head is one task when that keeps the threads busy: 5 products a block. Split in two passes the
    // scores are computed twice, 7 products, but there is work for every thread.
    const int64_t rounds = ceil_div(heads, p.threads);
    const bool whole =
        p.drelative_bias != nullptr || !dq || !(dk || dv) || 7 * heads >= 5 * rounds * p.threads;
    std::vector<Part> parts, query_parts;
    for (int64_t index = 0; index < p.sequences; ++index) {
        const Sequence s = sequence_of(p, index);
        for (int64_t head = 0; head < p.heads_kv; ++head) {
            const Part all{index, head, head * group, (head + 1) * group, 0, s.n_q, 0, s.n_k, dq,
                           dk,    dv,   false};
            if (whole) {
                parts.push_back(all);
                continue;
            }
            for (int64_t key = 0; key < s.n_k; key += E::kKeysTogether) {
                Part part = all;
                part.first_key = key, part.end_key = std::min(key + E::kKeysTogether, s.n_k), part.dq = false;
                parts.push_back(part);
            }
            for (int64_t query = 0; query < s.n_q; query += 2 * E::kQueriesTogether) {
                Part part = all;
                part.first_query = query, part.end_query = std::min(query + 2 * E::kQueriesTogether, s.n_q);
                part.dk = part.dv = false;
                query_parts.push_back(part);
            }
        }
    }
    for (auto* list : {&parts, &query_parts}) {
        for (Part& part : *list) part.count_scores(p);
        longest_first(*list);
    }
    run_parts<E>(p, parts);
    run_parts<E>(p, query_parts);
}

}  // namespace

void attention_backward(const AttentionParams& p) {
    with_engine(p, [&](auto engine) { backward<typename decltype(engine)::type>(p); });
}

}  // namespace lmkern
