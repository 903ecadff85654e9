// Attention backward on the CPU, deterministic: every sum has one owner and one order. Derivation:
// docs/kernels/attention.md.
//
//     P  = exp(S - lse)                 dV = P^T dO
//     dP = dO V^T                       dS = P (dP - delta),  delta = rowsum(dO O) - dlse
//     dQ = dS K softmax_scale           dK = dS^T Q softmax_scale
#include "attention/common.hpp"
#include "attention/cpu.hpp"

namespace lmkern {
namespace {

// A part of one key/value head's work: the queries and keys it covers, and which gradients it sums.
struct Part {
    int64_t batch, head_kv;
    int64_t first_query, end_query;
    int64_t first_key, end_key;
    bool dq, dk, dv;
};

// lse and delta of a block's queries, a lane each; a query with no visible key, or past the end, has lse =
// +inf, so that its weights are exp(-inf) = 0.
template <class C>
struct RowStatistics {
    C lse[kQueryBlock];
    C delta[kQueryBlock];
};

// The packed forms of one query block.
template <class C>
struct QueryBlock {
    Block<C> q;
    Block<C> q_transposed;  // times softmax_scale
    Block<C> q_clean;       // 0 for what is not finite
    Block<C> dout, dout_transposed;
};

template <class T>
class BackwardPart {
    using C = Compute<T>;
    static constexpr int degree = kExpDegree<T>;

public:
    BackwardPart(const AttentionParams& p, const Part& part)
        : p_(p),
          part_(part),
          D_(p.head_dim),
          width_(padded<C>(p.head_dim)),
          keys_(part.end_key - part.first_key) {
        const int64_t group = kQueryBlock * width_, across = D_ * kQueryBlock,
                      square = kKeyBlock * kQueryBlock;
        Workspace& workspace = Workspace::of_this_thread();
        workspace.reserve(sizeof(C) *
                          static_cast<size_t>(5 * keys_ * width_ + 5 * group + 2 * across + 2 * square));
        auto rows = [&](int64_t count) { return Block<C>{workspace.take<C>(count * width_), width_}; };
        auto lanes = [&](int64_t count) {
            return Block<C>{workspace.take<C>(count * kQueryBlock), kQueryBlock};
        };
        k_ = rows(keys_), k_clean_ = rows(keys_), v_ = rows(keys_), dk_ = rows(keys_), dv_ = rows(keys_);
        q_clean_ = rows(kQueryBlock);
        block_ = {rows(kQueryBlock), lanes(D_), q_clean_, rows(kQueryBlock), lanes(D_)};
        dq_ = rows(kQueryBlock);
        out_ = rows(kQueryBlock);
        weights_ = lanes(kKeyBlock), dscores_ = lanes(kKeyBlock);
    }

    void run() {
        pack_keys();
        if (part_.dk) std::fill_n(dk_.data, keys_ * width_, C(0));
        if (part_.dv) std::fill_n(dv_.data, keys_ * width_, C(0));
        const int64_t group = p_.heads / p_.heads_kv;
        for (int64_t head = part_.head_kv * group; head < (part_.head_kv + 1) * group; ++head)
            for (int64_t query = part_.first_query; query < part_.end_query; query += kQueryBlock)
                query_block(head, query, std::min(kQueryBlock, part_.end_query - query));
        auto write = [&](Block<C> from, void* to, const Strides& strides, C factor) {
            const auto matrix = head_of<T>(to, strides, part_.batch, part_.head_kv);
            unpack(from, keys_, D_, matrix.row(part_.first_key), matrix.row_stride, matrix.column_stride,
                   [&](int64_t) { return factor; });
        };
        if (part_.dk) write(dk_, p_.dk, p_.dk_strides, static_cast<C>(p_.softmax_scale));
        if (part_.dv) write(dv_, p_.dv, p_.dv_strides, C(1));
    }

private:
    void pack_keys() {
        auto read = [&](const void* from, const Strides& strides, Block<C> to) {
            const auto matrix = head_of<const T>(from, strides, part_.batch, part_.head_kv);
            return pack(matrix.row(part_.first_key), matrix.row_stride, matrix.column_stride, keys_, D_, to);
        };
        const bool finite = !read(p_.k, p_.k_strides, k_);
        read(p_.v, p_.v_strides, v_);
        // What is not finite in k reaches the queries that see it through their scores; those that do not see
        // it meet it as 0 * NaN in dS K of a masked tile, where it must count as 0. The same holds for q in
        // dS^T Q.
        if (!finite) clear_non_finite(k_, keys_, D_, k_clean_);
        if (finite) k_clean_ = k_;
    }

    void query_block(int64_t head, int64_t first_query, int64_t queries) {
        const int64_t end_key = std::min(part_.end_key, visible_keys(p_, first_query + queries - 1));
        if (end_key <= part_.first_key && !part_.dq) return;
        RowStatistics<C> rows;
        pack_queries(head, first_query, queries, rows);
        if (part_.dq) std::fill_n(dq_.data, queries * width_, C(0));
        for (int64_t key = part_.first_key; key < end_key; key += kKeyBlock)
            tile(first_query, queries, key, std::min(kKeyBlock, end_key - key), rows);
        if (part_.dq) {
            const auto dq = head_of<T>(p_.dq, p_.dq_strides, part_.batch, head);
            unpack(dq_, queries, D_, dq.row(first_query), dq.row_stride, dq.column_stride,
                   [&](int64_t) { return static_cast<C>(p_.softmax_scale); });
        }
    }

    void pack_queries(int64_t head, int64_t first_query, int64_t queries, RowStatistics<C>& rows) {
        auto read = [&](const void* from, const Strides& strides, Block<C> to) {
            const auto matrix = head_of<const T>(from, strides, part_.batch, head);
            return pack(matrix.row(first_query), matrix.row_stride, matrix.column_stride, queries, D_, to);
        };
        const bool finite = !read(p_.q, p_.q_strides, block_.q);
        transpose(block_.q, queries, D_, static_cast<C>(p_.softmax_scale), block_.q_transposed);
        block_.q_clean = finite ? block_.q : q_clean_;
        if (!finite) clear_non_finite(block_.q, queries, D_, q_clean_);
        read(p_.dout, p_.dout_strides, block_.dout);
        transpose(block_.dout, queries, D_, C(1), block_.dout_transposed);
        read(p_.out, p_.out_strides, out_);

        const int64_t first_row = (part_.batch * p_.heads + head) * p_.n_q + first_query;
        const C* lse = static_cast<const C*>(p_.lse) + first_row;
        const C* dlse = p_.dlse == nullptr ? nullptr : static_cast<const C*>(p_.dlse) + first_row;
        constexpr C infinity = std::numeric_limits<C>::infinity();
        for (int64_t i = 0; i < kQueryBlock; ++i) {
            rows.lse[i] = infinity;
            rows.delta[i] = 0;
            if (i >= queries) continue;
            if (lse[i] != -infinity) rows.lse[i] = lse[i];
            Vector<C> products{};
            for (int64_t d = 0; d < width_; d += kLanes<C>)
                products += load(out_.data + i * width_ + d) * load(block_.dout.data + i * width_ + d);
            rows.delta[i] = sum<C>(products) - (dlse == nullptr ? C(0) : dlse[i]);
        }
    }

    void tile(int64_t first_query, int64_t queries, int64_t key, int64_t keys, const RowStatistics<C>& rows) {
        const int64_t offset = (key - part_.first_key) * width_, lanes = padded<C>(queries);
        product<false>(Left<C>{k_.data + offset, width_, 1}, block_.q_transposed, keys, lanes, D_, weights_);
        if (part_.dq || part_.dk)
            product<false>(Left<C>{v_.data + offset, width_, 1}, block_.dout_transposed, keys, lanes, D_,
                           dscores_);
        for (int64_t j = 0; j < keys; ++j)
            for (int64_t i = 0; i < lanes; i += kLanes<C>) {
                C* weight = weights_.data + j * kQueryBlock + i;
                C* dscore = dscores_.data + j * kQueryBlock + i;
                const Vector<C> p = exp<C, degree>(load(weight) - load(rows.lse + i));
                store(weight, p);
                store(dscore, p * (load(dscore) - load(rows.delta + i)));
            }
        const bool masked = key + keys > visible_keys(p_, first_query);
        if (masked) {
            mask_diagonal(weights_, key, keys, first_query, lanes, p_.diagonal, C(0));
            mask_diagonal(dscores_, key, keys, first_query, lanes, p_.diagonal, C(0));
        }
        auto keys_of = [&](Block<C> all) { return Block<C>{all.data + offset, width_}; };
        const Left<C> weights{weights_.data, kQueryBlock, 1}, dscores{dscores_.data, kQueryBlock, 1};
        if (part_.dv) product<true>(weights, block_.dout, keys, D_, queries, keys_of(dv_));
        if (part_.dk)
            product<true>(dscores, masked ? block_.q_clean : block_.q, keys, D_, queries, keys_of(dk_));
        if (part_.dq)
            product<true>(Left<C>{dscores_.data, 1, kQueryBlock}, keys_of(masked ? k_clean_ : k_), queries,
                          D_, keys, dq_);
    }

    const AttentionParams& p_;
    const Part part_;
    const int64_t D_, width_, keys_;
    Block<C> k_, k_clean_, v_, dk_, dv_;  // the part's keys
    QueryBlock<C> block_;
    Block<C> q_clean_;
    Block<C> dq_, out_;
    Block<C> weights_, dscores_;  // (keys, queries)
};

// Keys of a part that sums dK and dV alone.
constexpr int64_t kKeyPart = 256;

template <class T>
void backward(const AttentionParams& p) {
    const int64_t heads = p.batch * p.heads_kv;
    const bool dq = p.dq != nullptr, dk = p.dk != nullptr, dv = p.dv != nullptr;
    auto part = [&](int64_t head) {
        return Part{head / p.heads_kv, head % p.heads_kv, 0, p.n_q, 0, p.n_k, dq, dk, dv};
    };
    // A whole head is one task when that keeps the threads busy: 5 products a tile. Split in two passes the
    // scores are computed twice, 7 products, but there is work for every thread.
    const int64_t rounds = ceil_div(heads, p.threads);
    if (!dq || !(dk || dv) || 7 * heads >= 5 * rounds * p.threads) {
        if (dq || dk || dv)
            parallel_for(heads, p.threads, [&](int64_t head) { BackwardPart<T>(p, part(head)).run(); });
        return;
    }
    const int64_t key_parts = ceil_div(p.n_k, kKeyPart);
    parallel_for(heads * key_parts, p.threads, [&](int64_t task) {
        Part keys = part(task % heads);
        keys.first_key = task / heads * kKeyPart;
        keys.end_key = std::min(keys.first_key + kKeyPart, p.n_k);
        keys.dq = false;
        BackwardPart<T>(p, keys).run();
    });
    const int64_t query_parts = ceil_div(p.n_q, kQueryBlock);
    parallel_for(heads * query_parts, p.threads, [&](int64_t task) {
        Part queries = part(task % heads);
        queries.first_query = (query_parts - 1 - task / heads) * kQueryBlock;
        queries.end_query = std::min(queries.first_query + kQueryBlock, p.n_q);
        queries.end_key = visible_keys(p, queries.end_query - 1);
        queries.dk = queries.dv = false;
        BackwardPart<T>(p, queries).run();
    });
}

}  // namespace

void attention_backward(const AttentionParams& p) {
    with_type(static_cast<Dtype>(p.dtype), [&](auto type) { backward<typename decltype(type)::type>(p); });
}

}  // namespace lmkern
