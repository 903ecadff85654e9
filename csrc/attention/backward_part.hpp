// A part of attention's backward pass: the gradients that one thread makes of the queries, keys and heads it
// covers. Derivation: docs/kernels/attention.md.
//
//     P  = exp(S - lse)                 dV = P^T dO
//     dP = dO V^T                       dS = P (dP - delta),  delta = rowsum(dO O) - dlse
//     dQ = dS K softmax_scale           dK = dS^T Q softmax_scale
//
// dV and dK are summed transposed, dV^T = dO^T P and dK^T = Q^T dS, so that P and dS are right operands with
// keys in the lanes, as the scores come.
#pragma once

#include <algorithm>
#include <cmath>

#include "attention/row_products.hpp"
#include "attention/rows_ahead.hpp"
#include "attention/scores.hpp"
#include "attention/tasks.hpp"

namespace lmkern {

template <class E>
class BackwardPart {
    using T = typename E::T;
    using C = typename E::C;
    using Operand = typename E::Operand;
    using Exp = Exponential<T>;
    static constexpr int64_t lanes = kLanes<C>;
    static constexpr C infinity = std::numeric_limits<C>::infinity();
    static constexpr int64_t kScoreStride = E::kStrip + 64 / static_cast<int64_t>(sizeof(C));
    static constexpr int64_t kMostLines = 8;
    static_assert(E::kRows + E::kStrip <= ScoreRows<T>::kDiagonals);
    // Beyond it half a unit in the last place of lse in bits, or of a score that is scaled in the same
    // instruction in which lse is subtracted, would show as a factor of P.
    static constexpr C kLargeLse = sizeof(T) == 2 ? 2048 : 64;
    // Rows that lie a power of two apart would fight for the same cache lines.
    static constexpr int64_t kSumStride = E::kKeysTogether + 64 / static_cast<int64_t>(sizeof(C));
    static constexpr int64_t kRightStride = E::kKeysTogether;
    static constexpr int64_t kLeftStride =
        E::kOneLayout ? kRightStride
                      : E::kParts * E::kKeysTogether + 64 / static_cast<int64_t>(sizeof(Operand));

public:
    BackwardPart(const AttentionParams& p, const Part& part)
        : p_(p),
          part_(part),
          s_(sequence_of(p, part.sequence)),
          D_(p.head_dim),
          width_(E::width(p.head_dim)),
          columns_(E::columns(p.head_dim)) {
        queries_ = part.end_query - part.first_query;
        many_key_blocks_ = part.end_key - part.first_key > E::kKeysTogether;
        const int64_t heads = part.end_head - part.first_head, rows = E::kQueriesTogether,
                      keys = E::kKeysTogether;
        const int64_t dq_rows = many_key_blocks_ && part.dq ? heads * queries_ : 0;
        const int64_t transposed = E::left_transposed_size(rows, D_);
        Workspace& workspace = Workspace::of_this_thread();
        workspace.reserve(sizeof(Operand) *
                              (2 * E::right_transposed_size(keys, D_) + 2 * E::right_rows_size(keys, D_) +
                               3 * rows * width_ + 3 * transposed + 2 * E::kParts * rows * kRightStride +
                               rows * kLeftStride) +
                          sizeof(C) * (2 * columns_ * kSumStride + (dq_rows + rows) * columns_ +
                                       heads * queries_ + 3 * rows + 3 * E::kRows * kScoreStride) +
                          sizeof(uint16_t) * 2 * (E::kStrip + Dropout<C>::kChunk));
        auto operands = [&](int64_t count) { return workspace.take<Operand>(count); };
        k_transposed_ = operands(E::right_transposed_size(keys, D_));
        v_transposed_ = operands(E::right_transposed_size(keys, D_));
        k_rows_ = operands(E::right_rows_size(keys, D_));
        k_clean_ = operands(E::right_rows_size(keys, D_));
        q_ = operands(rows * width_);
        q_clean_ = operands(rows * width_);
        dout_ = operands(rows * width_);
        q_scratch_ = operands(transposed);
        dout_scratch_ = operands(transposed);
        weights_ = operands(E::kParts * rows * kRightStride);
        dscores_ = operands(E::kParts * rows * kRightStride);
        dscores_left_ = E::kOneLayout ? dscores_ : operands(rows * kLeftStride);
        dk_ = {workspace.take<C>(columns_ * kSumStride), kSumStride};
        dv_ = {workspace.take<C>(columns_ * kSumStride), kSumStride};
        dq_all_ = workspace.take<C>(dq_rows * columns_);
        dq_block_ = workspace.take<C>(rows * columns_);
        delta_all_ = workspace.take<C>(heads * queries_);
        lse_ = workspace.take<C>(rows);
        subtracted_ = workspace.take<C>(rows);
        delta_ = workspace.take<C>(rows);
        scores_ = {workspace.take<C>(E::kRows * kScoreStride), kScoreStride};
        dweights_ = {workspace.take<C>(E::kRows * kScoreStride), kScoreStride};
        slopes_ = {workspace.take<C>(E::kRows * kScoreStride), kScoreStride};
        bits_ = workspace.take<uint16_t>(2 * (E::kStrip + Dropout<C>::kChunk));
    }

    // next_part(): what this thread will do next, or null.
    template <class Next>
    void run(const Next& next_part) {
        [[maybe_unused]] const typename E::Session session;
        bool first = true;
        for (int64_t key = part_.first_key; key < part_.end_key; key += E::kKeysTogether) {
            first_key_ = key;
            keys_ = std::min(E::kKeysTogether, part_.end_key - key);
            last_keys_ = key + keys_ == part_.end_key;
            pack_keys();
            summed_keys_ = 0;
            for (int64_t head = part_.first_head; head < part_.end_head; ++head) {
                const ScoreRows<T> rows(p_, s_, head);
                for (int64_t query = part_.first_query; query < part_.end_query;
                     query += E::kQueriesTogether) {
                    look_ahead(head, query, first, next_part);
                    queries(rows, head, query, std::min(E::kQueriesTogether, part_.end_query - query), first);
                }
            }
            if (part_.dk || part_.dv) begin_sums(round_up(keys_, E::kStep));
            if (part_.dk) write_keys(dk_, p_.dk, p_.dk_strides, static_cast<C>(p_.softmax_scale));
            if (part_.dv) write_keys(dv_, p_.dv, p_.dv_strides, C(1));
            first = false;
        }
        // Without a key there is no block that would have written dq.
        if (first && part_.dq)
            for (int64_t head = part_.first_head; head < part_.end_head; ++head)
                write_queries(head, part_.first_query, queries_, nullptr);
    }

private:
    Matrix<const T> matrix(const void* tensor, const Strides& strides, int64_t head, int64_t row) const {
        return head_of<const T>(tensor, strides, s_.batch, head, row);
    }

    C* delta_of(int64_t head, int64_t query) const {
        return delta_all_ + (head - part_.first_head) * queries_ + query - part_.first_query;
    }

    // What comes after a block of queries is asked for meanwhile.
    template <class Next>
    void look_ahead(int64_t head, int64_t query, bool first_keys, const Next& next_part) {
        ahead_.clear();
        const Band band(p_, s_);
        if (query + E::kQueriesTogether < part_.end_query) {
            queries_ahead(part_, head, query + E::kQueriesTogether, first_keys);
        } else if (head + 1 < part_.end_head) {
            queries_ahead(part_, head + 1, std::max(part_.first_query, first_visible(band, first_key_)),
                          first_keys);
        } else if (!last_keys_) {
            const int64_t key = first_key_ + keys_;
            keys_ahead(part_, key);
            queries_ahead(part_, part_.first_head, std::max(part_.first_query, first_visible(band, key)),
                          false);
        } else if (const Part* next = next_part()) {
            keys_ahead(*next, next->first_key);
            queries_ahead(*next, next->first_head, next->first_query, true);
        }
        const int64_t keys_seen = std::min(band.end(query + E::kQueriesTogether - 1), first_key_ + keys_) -
                                  std::max(band.begin(query), first_key_);
        // Two rows of a strip at a time.
        const int64_t times = E::kQueriesTogether / 2 * ceil_div(std::max<int64_t>(keys_seen, 1), E::kStrip);
        lines_at_a_time_ = std::min(kMostLines, ceil_div(ahead_.lines(), times));
    }
    static int64_t first_visible(const Band& band, int64_t key) {
        return band.first_query(key) / E::kQueriesTogether * E::kQueriesTogether;
    }
    void keys_ahead(const Part& part, int64_t key) {
        const Sequence s = sequence_of(p_, part.sequence);
        const int64_t n = std::min(E::kKeysTogether, part.end_key - key);
        ahead_.add(head_of<const T>(p_.k, p_.k_strides, s.batch, part.head_kv, s.first_key + key), n, D_);
        ahead_.add(head_of<const T>(p_.v, p_.v_strides, s.batch, part.head_kv, s.first_key + key), n, D_);
    }
    void queries_ahead(const Part& part, int64_t head, int64_t query, bool with_out) {
        const Sequence s = sequence_of(p_, part.sequence);
        const int64_t n = std::min(E::kQueriesTogether, part.end_query - query);
        for (const auto& [tensor, strides] :
             {std::pair(p_.q, p_.q_strides), std::pair(p_.dout, p_.dout_strides),
              std::pair(static_cast<const void*>(p_.out), p_.out_strides)})
            if (tensor != p_.out || with_out)
                ahead_.add(head_of<const T>(tensor, strides, s.batch, head, s.first_query + query), n, D_);
    }

    // Of the queries from `query` on, `count` of them.
    void make_delta(int64_t head, int64_t query, int64_t count) {
        const int64_t row = s_.first_query + query;
        const auto out = matrix(p_.out, p_.out_strides, head, row),
                   dout = matrix(p_.dout, p_.dout_strides, head, row);
        const C* dlse = p_.dlse == nullptr
                            ? nullptr
                            : static_cast<const C*>(p_.dlse) + (s_.batch * p_.heads + head) * p_.n_q + row;
        C* delta = delta_of(head, query);
        RowProducts<E>(D_, dout_, q_clean_, scores_)(out, dout, count, delta);
        for (int64_t i = 0; i < count && dlse != nullptr; ++i) delta[i] -= dlse[i];
    }

    void pack_keys() {
        const auto k = matrix(p_.k, p_.k_strides, part_.head_kv, s_.first_key + first_key_);
        const auto v = matrix(p_.v, p_.v_strides, part_.head_kv, s_.first_key + first_key_);
        keys_finite_ = true;
        for (int64_t key = 0; key < keys_; key += E::kKeys) {
            const int64_t n = std::min(E::kKeys, keys_ - key);
            const Matrix<const T> k_part{k.row(key), k.row_stride, k.column_stride};
            const Matrix<const T> v_part{v.row(key), v.row_stride, v.column_stride};
            keys_finite_ &= E::pack_right_transposed(k_part, n, D_, key, k_transposed_).finite;
            E::pack_right_transposed(v_part, n, D_, key, v_transposed_);
            if (part_.dq) E::template pack_right_rows<E::kKeysTogether>(k_part, n, D_, key, k_rows_);
        }
        // What is not finite in k reaches the queries that see it through their scores; those that do not see
        // it meet it as 0 * NaN in dS K where some key is masked, and there it must count as 0. The same
        // holds for q in dS^T Q.
        if (!keys_finite_ && part_.dq)
            for (int64_t key = 0; key < keys_; key += E::kKeys)
                E::template pack_right_rows<E::kKeysTogether>({k.row(key), k.row_stride, k.column_stride},
                                                              std::min(E::kKeys, keys_ - key), D_, key,
                                                              k_clean_, true);
    }

    // One block of queries against the packed keys.
    void queries(const ScoreRows<T>& score_rows, int64_t head, int64_t query, int64_t count,
                 bool first_keys) {
        if (first_keys) make_delta(head, query, count);
        const Band& band = score_rows.band();
        const int64_t begin = std::max(first_key_, band.begin(query)) - first_key_;
        const int64_t end = std::min(first_key_ + keys_, band.end(query + count - 1)) - first_key_;
        const int64_t first = begin / E::kStrip * E::kStrip, keys = round_up(end - first, E::kStep);
        C* dq = many_key_blocks_
                    ? dq_all_ + ((head - part_.first_head) * queries_ + query - part_.first_query) * columns_
                    : dq_block_;
        if (end <= begin) {
            if (part_.dq && first_keys) std::fill_n(dq, count * columns_, C(0));
        } else {
            pack_queries(head, query, count);
            const bool masked = make_gradients(score_rows, head, query, count, first, keys);
            const int64_t depth = round_up(count, E::kRowStep);
            begin_sums(first);
            if (part_.dv) add_to_sums(dv_, dout_transposed_, weights_, first, keys, depth);
            if (part_.dk) {
                const bool cleans = masked && !E::finite_left(q_rows_, depth, D_);
                const auto q = cleans ? clean_queries(count) : q_transposed_;
                add_to_sums(dk_, q, dscores_, first, keys, depth);
            }
            summed_keys_ = std::max(summed_keys_, first + keys);
            if (part_.dq) multiply_dq(dq, count, first, keys, first_keys, masked && !keys_finite_);
        }
        if (part_.dq && last_keys_) write_queries(head, query, count, dq);
    }

    // dk_ and dv_ hold sums for the keys up to summed_keys_; zeros for those from there to `key`, which no
    // query has seen.
    void begin_sums(int64_t key) {
        for (int64_t d = 0; d < columns_ && summed_keys_ < key; ++d)
            for (const Block<C>& sums : {dk_, dv_})
                std::fill(sums.data + d * sums.stride + summed_keys_, sums.data + d * sums.stride + key,
                          C(0));
        summed_keys_ = std::max(summed_keys_, key);
    }

    void add_to_sums(Block<C> sums, typename E::Left left, const Operand* block, int64_t first, int64_t keys,
                     int64_t depth) {
        const int64_t end = first + keys, middle = std::clamp(summed_keys_, first, end);
        auto product = [&](int64_t begin, int64_t end, bool accumulate) {
            if (begin < end)
                E::product(left, right(block, begin), columns_, end - begin, depth,
                           Block<C>{sums.data + begin, sums.stride}, accumulate);
        };
        product(first, middle, true);
        product(middle, end, false);
    }

    static typename E::Right right(const Operand* block, int64_t column) {
        return E::right_column(E::scores_right(block, kRightStride), column);
    }

    void multiply_dq(C* dq, int64_t count, int64_t first, int64_t keys, bool first_keys, bool clean) {
        const auto dscores = E::scores_left(dscores_left_ + E::kParts * first, kLeftStride);
        const auto k = E::template right_rows<E::kKeysTogether>(clean ? k_clean_ : k_rows_, first, D_);
        const int64_t rows = round_up(count, E::kRowStep);
        // The rows that fill up a tile lie beyond this block's in dq_all_.
        C* const target = rows == count ? dq : dq_block_;
        E::product(dscores, k, rows, columns_, keys, Block<C>{target, columns_}, !first_keys && target == dq);
        if (target == dq) return;
        for (int64_t i = 0; i < count * columns_; i += lanes)
            store(dq + i, first_keys ? load(target + i) : load(dq + i) + load(target + i));
    }

    void pack_queries(int64_t head, int64_t query, int64_t count) {
        const int64_t padded_count = round_up(count, E::kRowStep), row = s_.first_query + query;
        auto rows = [&](const void* tensor, const Strides& strides, Operand* room) {
            return E::template as_left<false>(matrix(tensor, strides, head, row), count, D_, padded_count,
                                              room)
                .data;
        };
        q_rows_ = rows(p_.q, p_.q_strides, q_);
        dout_rows_ = rows(p_.dout, p_.dout_strides, dout_);
        q_transposed_ = E::left_transposed(q_rows_, padded_count, D_, q_scratch_);
        dout_transposed_ = E::left_transposed(dout_rows_, padded_count, D_, dout_scratch_);
        const C* lse = static_cast<const C*>(p_.lse) + (s_.batch * p_.heads + head) * p_.n_q + row;
        const C* delta = delta_of(head, query);
        large_lse_ = std::any_of(lse, lse + count, [](C x) { return std::abs(x) > kLargeLse; });
        for (int64_t i = 0; i < padded_count; ++i) {
            // A query with no visible key, or none at all, has lse = +inf here: its weights are exp(-inf) =
            // 0.
            const C own = i < count && lse[i] != -infinity ? lse[i] : infinity;
            const bool apart = large_lse_ && std::isfinite(own);
            subtracted_[i] = apart ? own : C(0);
            lse_[i] = apart ? C(0) : own * static_cast<C>(Exp::unit);
            delta_[i] = i < count ? delta[i] : C(0);
        }
    }

    typename E::Left clean_queries(int64_t count) {
        const int64_t rows = round_up(count, E::kRowStep);
        std::copy_n(q_rows_, rows * width_, q_clean_);
        E::clear_left(q_clean_, rows, D_);
        return E::left_transposed(q_clean_, rows, D_, q_scratch_);
    }

    // P and dS of a block of queries and the keys from `first` on, counted from first_key_. Returns whether
    // some key is hidden from some query.
    bool make_gradients(const ScoreRows<T>& score_rows, int64_t head, int64_t query, int64_t count,
                        int64_t first, int64_t keys) {
        const Band& band = score_rows.band();
        const Dropout<C> dropout(p_, s_.index, head);
        bool any_masked = false;
        for (int64_t row = 0; row < count; row += E::kRows) {
            const int64_t n = std::min(E::kRows, count - row);
            const int64_t begin = band.begin(query + row) - first_key_,
                          end = band.end(query + row + n - 1) - first_key_;
            for (int64_t j = first; j < first + keys; j += E::kStrip) {
                const BlockPlace at{query + row, n, first_key_ + j, std::min(E::kStrip, first + keys - j)};
                if (j + at.keys <= begin || j >= end) {
                    any_masked = true;
                    clear(row, round_up(n, E::kRowStep), j, at.keys);
                } else {
                    any_masked |= strip(score_rows, dropout, head, row, j, at);
                }
            }
        }
        return any_masked;
    }

    void clear(int64_t row, int64_t rows, int64_t column, int64_t columns) {
        const Vector<C> zeros[4] = {};
        for (int64_t i = row; i < row + rows; i += 2)
            for (int64_t j = column; j < column + columns; j += 2 * lanes) {
                E::put_right(weights_, kRightStride, i, j, zeros);
                E::put_right(dscores_, kRightStride, i, j, zeros);
                if constexpr (!E::kOneLayout) {
                    E::put_left(dscores_left_ + i * kLeftStride + E::kParts * j, zeros[0], zeros[0]);
                    E::put_left(dscores_left_ + (i + 1) * kLeftStride + E::kParts * j, zeros[0], zeros[0]);
                }
            }
    }

    // One block of scores: rows of the block of queries from `row` on, keys from column `j` on.
    bool strip(const ScoreRows<T>& score_rows, const Dropout<C>& dropout, int64_t head, int64_t row,
               int64_t j, const BlockPlace& at) {
        const int64_t rows = round_up(at.queries, E::kRowStep);
        E::product(E::left(q_rows_ + row * width_, D_), E::right_transposed(k_transposed_, j, D_), rows,
                   at.keys, D_, scores_, false, true);
        E::product(E::left(dout_rows_ + row * width_, D_), E::right_transposed(v_transposed_, j, D_), rows,
                   at.keys, D_, dweights_, false, true);
        C factor = static_cast<C>(p_.softmax_scale * Exp::unit);
        const bool sloped = p_.softcap > 0;
        if (score_rows.adjusts()) {
            score_rows.adjust(scores_, at, sloped ? slopes_.data : nullptr);
            factor = static_cast<C>(Exp::unit);
        } else if (factor <= 0 || large_lse_) {
            // Times a negative factor -inf would be seen, and times 0 it would be NaN.
            scale(scores_, at.queries, at.keys, static_cast<C>(p_.softmax_scale));
            factor = static_cast<C>(Exp::unit);
        }
        if (large_lse_) subtract_lse(row, at);
        const bool masked =
            score_rows.outside_band(scores_, at, -infinity) || p_.mask != nullptr || p_.bias != nullptr;
        if (p_.dropout_threshold > 0 || part_.dbias || p_.drelative_bias != nullptr || sloped)
            gradients<true, true>(score_rows, dropout, head, row, j, at, factor);
        else if (masked)
            gradients<true, false>(score_rows, dropout, head, row, j, at, factor);
        else
            gradients<false, false>(score_rows, dropout, head, row, j, at, factor);
        return masked;
    }

    // Of scores in natural units, as the forward pass rounded them: a score that is all of lse leaves 0.
    void subtract_lse(int64_t row, const BlockPlace& at) {
        for (int64_t i = 0; i < at.queries; ++i)
            for (int64_t j = 0; j < at.keys; j += lanes) {
                C* place = scores_.data + i * kScoreStride + j;
                store(place, load(place) - subtracted_[row + i]);
            }
    }

    // Turns scores and dP into P and dS, two rows at a time. masked: some scores may be -inf. all: with
    // dropout, and with dS kept in C for what else follows from it.
    template <bool masked, bool all>
    void gradients(const ScoreRows<T>& score_rows, const Dropout<C>& dropout, int64_t head, int64_t row,
                   int64_t column, const BlockPlace& at, C factor) {
        const int64_t rows = round_up(at.queries, E::kRowStep);
        const C scale = dropout.scale();
        const bool drops = all && p_.dropout_threshold > 0;
        constexpr int64_t bits_stride = E::kStrip + Dropout<C>::kChunk;
        for (int64_t i = 0; i < rows; i += 2) {
            if (drops)
                for (int64_t r = 0; r < 2; ++r)
                    dropout.draw(at.first_query + i + r, at.first_key, at.keys, bits_ + r * bits_stride);
            for (int64_t j = 0; j < at.keys; j += 2 * lanes) {
                Vector<C> weights[4], dscores[4];
#pragma GCC unroll 4
                for (int n = 0; n < 4; ++n) {
                    const int64_t r = i + n / 2, place = r * kScoreStride + j + n % 2 * lanes;
                    const Vector<C> score = load(scores_.data + place);
                    Vector<C> weight = Exp::of(score * factor - lse_[row + r], C(1));
                    // Also in a row whose lse is NaN.
                    if (masked) weight = score == -infinity ? Vector<C>{} : weight;
                    Vector<C> dweight = load(dweights_.data + place);
                    Vector<C> kept = weight;
                    if (drops) {
                        const uint16_t* bits = bits_ + n / 2 * bits_stride + j + n % 2 * lanes;
                        const Vector<C> keep = dropout.keep(broadcast(scale), bits);
                        kept = weight * keep;
                        dweight = dweight * keep;
                    }
                    Vector<C> dscore = weight * (dweight - delta_[row + r]);
                    if (masked) dscore = weight == 0 ? Vector<C>{} : dscore;
                    if (all) store(dweights_.data + place, dscore);
                    if (all && p_.softcap > 0)
                        dscore = weight == 0 ? Vector<C>{} : dscore * load(slopes_.data + place);
                    weights[n] = kept;
                    dscores[n] = dscore;
                }
                if (part_.dv) E::put_right(weights_, kRightStride, row + i, column + j, weights);
                put_dscores(row + i, column + j, dscores);
            }
            ahead_.ask(lines_at_a_time_);
        }
        if (all && part_.dbias) score_rows.add_bias_gradient(dweights_, at, static_cast<C*>(p_.dbias));
        if (all && !part_.dbias && p_.drelative_bias != nullptr)
            score_rows.add_relative_gradient(dweights_, at,
                                             static_cast<double*>(p_.drelative_bias) +
                                                 (s_.index * p_.heads + head) * (2 * p_.relative_radius + 1));
    }

    void put_dscores(int64_t row, int64_t column, const Vector<C> dscores[4]) {
        if (part_.dk || (E::kOneLayout && part_.dq))
            E::put_right(dscores_, kRightStride, row, column, dscores);
        if constexpr (!E::kOneLayout)
            if (part_.dq) {
                Operand* place = dscores_left_ + row * kLeftStride + E::kParts * column;
                E::put_left(place, dscores[0], dscores[1]);
                E::put_left(place + kLeftStride, dscores[2], dscores[3]);
            }
    }

    // Rows of keys out of their transposed sums.
    void write_keys(Block<C> sums, void* to, const Strides& strides, C factor) {
        const auto rows = head_of<T>(to, strides, s_.batch, part_.head_kv, s_.first_key + first_key_);
        E::write_transposed(sums, keys_, D_, rows, streams(rows, D_, p_.batch * p_.heads_kv * p_.n_k * D_),
                            factor);
    }

    // dq: (count, columns_), null for zeros.
    void write_queries(int64_t head, int64_t query, int64_t count, const C* dq) {
        const auto rows = head_of<T>(p_.dq, p_.dq_strides, s_.batch, head, s_.first_query + query);
        if (dq != nullptr)
            return E::write_rows(Block<C>{const_cast<C*>(dq), columns_}, count, D_, rows,
                                 streams(rows, D_, p_.batch * p_.heads * p_.n_q * D_),
                                 [&](int64_t) { return static_cast<C>(p_.softmax_scale); });
        for (int64_t i = 0; i < count; ++i)
            for (int64_t d = 0; d < D_; ++d) store_one(rows.row(i) + d * rows.column_stride, C(0));
    }

    const AttentionParams& p_;
    const Part part_;
    const Sequence s_;
    const int64_t D_, width_, columns_;  // width_: of a packed row
    int64_t queries_, first_key_ = 0, keys_ = 0, summed_keys_ = 0;
    bool many_key_blocks_, last_keys_ = false, keys_finite_ = true;
    Operand *k_transposed_, *v_transposed_, *k_rows_, *k_clean_;  // the packed keys
    Operand *q_, *q_clean_, *dout_, *q_scratch_, *dout_scratch_;  // room for a block of queries
    const Operand *q_rows_ = nullptr, *dout_rows_ = nullptr;      // left operands
    typename E::Left q_transposed_{}, dout_transposed_{};
    Operand *weights_, *dscores_, *dscores_left_;  // (queries, keys)
    Block<C> dk_{}, dv_{};                         // (D, keys)
    C *dq_all_, *dq_block_, *delta_all_, *delta_;
    C *lse_, *subtracted_;  // what is subtracted from scores in units of Exp, and from natural ones before
    bool large_lse_ = false;
    Block<C> scores_{}, dweights_{}, slopes_{};
    uint16_t* bits_;
    RowsAhead ahead_;
    int64_t lines_at_a_time_ = 0;
};

}  // namespace lmkern
