// Attention forward on the CPU. Online softmax over key blocks (Dao et al. 2022, arXiv:2205.14135), queries
// in the lanes.
#include "attention/common.hpp"
#include "attention/cpu.hpp"

namespace lmkern {
namespace {

// The running state of kQueryBlock queries.
template <class C>
struct SoftmaxState {
    C row_max[kQueryBlock];
    C row_sum[kQueryBlock];
    C correction[kQueryBlock];
};

// Turns a (keys, queries) block of scores into weights exp(score - row_max) and brings the running state up
// to date.
template <class C, int degree>
void softmax_block(Block<C> scores, int64_t keys, int64_t queries, SoftmaxState<C>& state) {
    for (int64_t i = 0; i < queries; i += kLanes<C>) {
        C* column = scores.data + i;
        const Vector<C> old_max = load(state.row_max + i);
        Vector<C> row_max = old_max;
        for (int64_t j = 0; j < keys; ++j) row_max = max(row_max, load(column + j * scores.stride));
        // A row with no visible key has row_max = -inf; subtracting 0 instead keeps exp(-inf) = 0 and no NaN.
        const Vector<C> reference = row_max == -std::numeric_limits<C>::infinity() ? Vector<C>{} : row_max;
        const Vector<C> correction = exp<C, degree>(old_max - reference);
        Vector<C> block_sum{};
        for (int64_t j = 0; j < keys; ++j) {
            const Vector<C> weight = exp<C, degree>(load(column + j * scores.stride) - reference);
            block_sum += weight;
            store(column + j * scores.stride, weight);
        }
        store(state.row_max + i, row_max);
        store(state.row_sum + i, load(state.row_sum + i) * correction + block_sum);
        store(state.correction + i, correction);
    }
}

template <class T>
void forward_query_block(const AttentionParams& p, int64_t batch, int64_t head, int64_t first_query) {
    using C = Compute<T>;
    constexpr int degree = kExpDegree<T>;
    const int64_t D = p.head_dim, width = padded<C>(D);
    const int64_t queries = std::min(kQueryBlock, p.n_q - first_query), lanes = padded<C>(queries);
    const int64_t head_kv = head / (p.heads / p.heads_kv);
    const auto q = head_of<const T>(p.q, p.q_strides, batch, head);
    const auto k = head_of<const T>(p.k, p.k_strides, batch, head_kv);
    const auto v = head_of<const T>(p.v, p.v_strides, batch, head_kv);
    const auto out = head_of<T>(p.out, p.out_strides, batch, head);

    Workspace& workspace = Workspace::of_this_thread();
    workspace.reserve(sizeof(C) * static_cast<size_t>((2 * kQueryBlock + 2 * kKeyBlock) * width +
                                                      D * kQueryBlock + kKeyBlock * kQueryBlock));
    const Block<C> q_rows{workspace.take<C>(kQueryBlock * width), width};
    const Block<C> q_transposed{workspace.take<C>(D * kQueryBlock), kQueryBlock};
    const Block<C> k_rows{workspace.take<C>(kKeyBlock * width), width};
    const Block<C> v_rows{workspace.take<C>(kKeyBlock * width), width};
    const Block<C> acc{workspace.take<C>(kQueryBlock * width), width};
    const Block<C> scores{workspace.take<C>(kKeyBlock * kQueryBlock), kQueryBlock};
    SoftmaxState<C> state;
    for (int64_t i = 0; i < kQueryBlock; ++i) {
        state.row_max[i] = -std::numeric_limits<C>::infinity();
        state.row_sum[i] = 0;
    }
    std::fill_n(acc.data, queries * width, C(0));

    pack(q.row(first_query), q.row_stride, q.column_stride, queries, D, q_rows);
    transpose(q_rows, queries, D, static_cast<C>(p.softmax_scale), q_transposed);

    const int64_t end_key = visible_keys(p, first_query + queries - 1);
    const int64_t all_see = visible_keys(p, first_query);
    for (int64_t first_key = 0; first_key < end_key; first_key += kKeyBlock) {
        const int64_t keys = std::min(kKeyBlock, end_key - first_key);
        pack(k.row(first_key), k.row_stride, k.column_stride, keys, D, k_rows);
        pack(v.row(first_key), v.row_stride, v.column_stride, keys, D, v_rows);

        product<false>(Left<C>{k_rows.data, k_rows.stride, 1}, q_transposed, keys, lanes, D, scores);
        if (first_key + keys > all_see)
            mask_diagonal(scores, first_key, keys, first_query, lanes, p.diagonal,
                          -std::numeric_limits<C>::infinity());
        softmax_block<C, degree>(scores, keys, lanes, state);
        for (int64_t i = 0; i < queries; ++i) {
            if (state.correction[i] == C(1)) continue;
            C* row = acc.data + i * width;
            for (int64_t d = 0; d < width; d += kLanes<C>)
                store(row + d, load(row + d) * state.correction[i]);
        }
        product<true>(Left<C>{scores.data, 1, scores.stride}, v_rows, queries, D, keys, acc);
    }

    // A row that saw no key has row_sum = 0 and acc = 0.
    unpack(acc, queries, D, out.row(first_query), out.row_stride, out.column_stride,
           [&](int64_t i) { return state.row_sum[i] == C(0) ? C(1) : C(1) / state.row_sum[i]; });
    C* lse = static_cast<C*>(p.lse) + (batch * p.heads + head) * p.n_q + first_query;
    for (int64_t i = 0; i < queries; ++i) lse[i] = state.row_max[i] + std::log(state.row_sum[i]);
}

}  // namespace

void attention_forward(const AttentionParams& p) {
    const int64_t blocks = ceil_div(p.n_q, kQueryBlock), heads = p.batch * p.heads;
    with_type(static_cast<Dtype>(p.dtype), [&](auto type) {
        using T = typename decltype(type)::type;
        // The last query blocks see most keys: they go first, so that no thread is left with a long one at
        // the end.
        parallel_for(blocks * heads, p.threads, [&](int64_t task) {
            const int64_t head = task % heads, block = blocks - 1 - task / heads;
            forward_query_block<T>(p, head / p.heads, head % p.heads, block * kQueryBlock);
        });
    });
}

}  // namespace lmkern
