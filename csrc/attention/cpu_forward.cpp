// Attention forward on the CPU: softmax over key blocks (Dao et al. 2022, arXiv:2205.14135), keys in the
// lanes.
//
// Where |q| |k| bounds every score of a block of queries, exp(score) can neither overflow nor vanish: no
// maximum is looked for, and nothing is ever rescaled. Elsewhere the softmax is online.
#include <cmath>

#include "attention/cpu.hpp"
#include "attention/scores.hpp"
#include "attention/tasks.hpp"

namespace lmkern {
namespace {

// Bits: weights of scores between -kBound and kBound, times values up to kLargestValue, sum far inside
// float32.
constexpr float kBound = 32, kLargestValue = 0x1p40f;

// Keys packed at a time are at most so many bytes: more are read again for every few hundred queries.
constexpr int64_t kPackedBytes = int64_t{8} << 20;
// So many stay in the cache of a core while all queries pass by; of more, each part serves several blocks of
// queries.
constexpr int64_t kCachedBytes = int64_t{1} << 20;

// Of so few keys the errors of exponentials do not cancel in the lse: with a maximum the largest weight is 1.
constexpr int64_t kKeysOfMaximum = 16;
// Of few keys one may have nearly all of the weight. Without a maximum, whose weight would be 1, that weight
// is rounded; the error goes where the rounded weights are what out is divided by. Of many keys the errors
// cancel.
constexpr int64_t kFewKeys = 128;
// Words round every weight, and lse is that of the rounded ones but the largest: of so many keys that each
// query sees the errors cancel, or one has nearly all of the weight.
constexpr int64_t kFewestKeysOfWords = 32;

// Blocks of kQueries queries that are worked on together; more where the keys are packed in parts.
constexpr int64_t kBlocksTogether = 8, kBlocksTogetherInParts = 32;

template <class E>
class Forward {
    using T = typename E::T;
    using C = typename E::C;
    using Operand = typename E::Operand;
    // With AVX-512 a product in an exponent costs no rounding.
    using Exp = Exponential<T, sizeof(T) == 2 || (sizeof(T) == 4 && kVectorBytes == 64)>;
    static constexpr int64_t lanes = kLanes<C>;
    // Whether weights are rounded before they meet the values.
    static constexpr bool kRounds = E::kParts * sizeof(Operand) < sizeof(C);
    // Whether rows of weights, and of values, hold two halves of 32 keys by turns.
    static constexpr bool kTurns = E::kParts == 3 || E::kWords;
    static constexpr C infinity = std::numeric_limits<C>::infinity();
    // Operands of blocks that lie a power of two apart would fight for the same cache lines.
    static constexpr int64_t kScoreStride = E::kKeys + 64 / static_cast<int64_t>(sizeof(C));
    static constexpr int64_t kWeightStride =
        E::kParts * E::kKeysWeighed + 64 / static_cast<int64_t>(sizeof(Operand));

    static_assert(E::kKeys % E::kKeysWeighed == 0 || !E::kWords);

public:
    Forward(const AttentionParams& p, const QueryTask& task)
        : p_(p),
          task_(task),
          s_(sequence_of(p, task.sequence)),
          D_(p.head_dim),
          width_(E::width(p.head_dim)),
          columns_(E::columns(p.head_dim)) {
        const int64_t bytes_per_key = static_cast<int64_t>(sizeof(Operand)) * 2 * width_;
        keys_at_once_ = std::max<int64_t>(kPackedBytes / bytes_per_key / E::kKeys, 1) * E::kKeys;
        in_parts_ = s_.n_k > keys_at_once_;
        const int64_t blocks = in_parts_ ? kBlocksTogetherInParts : kBlocksTogether;
        rows_together_ =
            std::min(blocks * E::kQueries, round_up(task.end_query - task.first_query, E::kQueries));
        const int64_t keys = round_up(std::min(keys_at_once_, s_.n_k), E::kKeys);
        Workspace& workspace = Workspace::of_this_thread();
        workspace.reserve(sizeof(Operand) * (rows_together_ * width_ + E::right_transposed_size(keys, D_) +
                                             E::right_rows_size(keys, D_) + E::kQueries * kWeightStride) +
                          sizeof(C) * (rows_together_ * (columns_ + 2 * lanes + 2) +
                                       E::kQueries * (kScoreStride + lanes + 1)) +
                          sizeof(uint16_t) * (E::kKeys + Dropout<C>::kChunk));
        q_ = workspace.take<Operand>(rows_together_ * width_);
        k_ = workspace.take<Operand>(E::right_transposed_size(keys, D_));
        v_ = workspace.take<Operand>(E::right_rows_size(keys, D_));
        weights_ = workspace.take<Operand>(E::kQueries * kWeightStride);
        acc_ = workspace.take<C>(rows_together_ * columns_);
        row_sum_ = workspace.take<C>(rows_together_ * lanes);
        rounded_sum_ = workspace.take<C>(rows_together_ * lanes);
        row_max_ = workspace.take<C>(rows_together_);
        correction_ = workspace.take<C>(rows_together_);
        scores_ = {workspace.take<C>(E::kQueries * kScoreStride), kScoreStride};
        block_max_ = workspace.take<C>(E::kQueries * lanes);
        reference_ = workspace.take<C>(E::kQueries);
        bits_ = workspace.take<uint16_t>(E::kKeys + Dropout<C>::kChunk);
    }

    void run() {
        [[maybe_unused]] const typename E::Session session;
        const int64_t group = p_.heads / p_.heads_kv;
        for (int64_t head = task_.head_kv * group; head < (task_.head_kv + 1) * group; ++head)
            for (int64_t query = task_.first_query; query < task_.end_query; query += rows_together_)
                rows(head, query, std::min(rows_together_, task_.end_query - query));
    }

private:
    // A block of queries: which of the rows held together it is.
    struct QueryBlock {
        const Operand* q;
        int64_t row, first_query, queries;
        C largest_square;
        bool bounded = false, begun = false;
        bool rounds = false;  // out is divided by the sum of the rounded weights
        bool words = false;   // weights are made in words of 16 bits, of 2^(score - bound)
        C bound = 0;          // of the scores, bits
    };

    void rows(int64_t head, int64_t first_query, int64_t queries) {
        const ScoreRows<T> score_rows(p_, s_, head);
        // Times a negative scale -inf would be seen, and times 0 it would be NaN; a sink is no score.
        scales_ = !score_rows.adjusts() && (static_cast<C>(p_.softmax_scale) <= 0 || p_.sinks != nullptr);
        unit_ = score_rows.adjusts() || scales_ ? C(1) : static_cast<C>(p_.softmax_scale);
        factor_ = static_cast<C>((score_rows.adjusts() || scales_ ? 1 : p_.softmax_scale) * Exp::unit);
        const Dropout<C> dropout(p_, s_.index, head);
        const auto q = head_of<const T>(p_.q, p_.q_strides, s_.batch, head, s_.first_query + first_query);
        QueryBlock blocks[kBlocksTogetherInParts];
        int64_t count = 0;
        for (int64_t row = 0; row < queries; row += E::kQueries, ++count) {
            const int64_t n = std::min(E::kQueries, queries - row);
            const auto [rows, facts] =
                E::template as_left<true>({q.row(row), q.row_stride, q.column_stride}, n, D_,
                                          round_up(n, E::kRowStep), q_ + row * width_);
            const C largest_square = facts.finite ? facts.largest_square : infinity;
            blocks[count] = {rows, row, first_query + row, n, largest_square};
            start(head, blocks[count]);
        }
        const Band& band = score_rows.band();
        const int64_t begin = band.begin(first_query), end = band.end(first_query + queries - 1);
        // Packed from a multiple of the packing unit, so that strips do not depend on the task.
        for (int64_t packed = in_parts_ ? begin / keys_at_once_ * keys_at_once_ : 0; packed < end;
             packed += keys_at_once_) {
            pack_keys(packed);
            const bool boundable = !in_parts_ && !score_rows.adjusts() && !scales_ && bounds_;
            for (int64_t b = 0; b < count; ++b) {
                const int64_t seen = band.end(blocks[b].first_query + blocks[b].queries - 1) -
                                     band.begin(blocks[b].first_query);
                const bool drops = p_.dropout_threshold > 0;
                blocks[b].bound = std::ceil(bound(blocks[b].largest_square));
                blocks[b].bounded = boundable && seen > kKeysOfMaximum && blocks[b].bound <= kBound;
                blocks[b].words = E::kWords && blocks[b].bounded && blocks[b].bound <= E::kMostBits &&
                                  !drops && !p_.exact_lse &&
                                  fewest_seen(band, blocks[b]) >= kFewestKeysOfWords;
                blocks[b].rounds =
                    blocks[b].bounded && !blocks[b].words && kRounds && !drops && seen <= kFewKeys;
            }
            const int64_t end_packed = std::min(end, packed + keys_at_once_);
            const int64_t bytes = static_cast<int64_t>(sizeof(Operand)) * 2 * width_ * (end_packed - packed);
            cached_ = bytes <= kCachedBytes;
            const int64_t together = cached_ ? keys_at_once_ : E::kKeysWeighed;
            const int64_t first = begin / E::kKeysWeighed * E::kKeysWeighed;
            for (int64_t key = std::max(packed, first); key < end_packed; key += together)
                for (QueryBlock* b = blocks; b < blocks + count; ++b) {
                    const int64_t step = b->bounded ? E::kKeysWeighed : E::kKeys;
                    const int64_t end_together = std::min(end_packed, key + together);
                    for (int64_t j = key; j < end_together; j += step)
                        block(score_rows, dropout, *b, j, std::min(step, end_together - j));
                }
        }
        for (int64_t b = 0; b < count; ++b) finish(head, blocks[b], dropout.scale());
    }

    // Keys that a query of a block sees, at least: their number first grows from query to query, then falls.
    static int64_t fewest_seen(const Band& band, const QueryBlock& b) {
        const int64_t first = b.first_query, last = first + b.queries - 1;
        return std::min(band.end(first) - band.begin(first), band.end(last) - band.begin(last));
    }

    // Bits; not finite where the operands are not.
    C bound(C largest_square) const {
        // Squares that are subnormal count as zero in a norm.
        const C lost = static_cast<C>(D_) * std::numeric_limits<C>::min();
        return std::sqrt(largest_square + lost) * std::sqrt(k_square_ + lost) * std::abs(factor_);
    }

    void start(int64_t head, const QueryBlock& b) {
        const C sink = p_.sinks == nullptr ? -infinity : static_cast<const C*>(p_.sinks)[head];
        for (C* sums : {row_sum_, rounded_sum_}) std::fill_n(sums + b.row * lanes, E::kQueries * lanes, C(0));
        for (int64_t i = b.row; i < b.row + E::kQueries; ++i) {
            row_max_[i] = sink;
            row_sum_[i * lanes] = p_.sinks == nullptr ? C(0) : C(1);
        }
    }

    void pack_keys(int64_t first) {
        if (packed_from_ == first) return;
        packed_from_ = first;
        const int64_t end = std::min(s_.n_k, first + keys_at_once_);
        const auto k = head_of<const T>(p_.k, p_.k_strides, s_.batch, task_.head_kv, s_.first_key);
        const auto v = head_of<const T>(p_.v, p_.v_strides, s_.batch, task_.head_kv, s_.first_key);
        bounds_ = sizeof(T) == 2;
        values_finite_ = true;
        k_square_ = 0;
        for (int64_t key = first; key < end; key += E::kKeys) {
            const int64_t n = std::min(E::kKeys, end - key);
            const auto k_facts =
                E::pack_right_transposed({k.row(key), k.row_stride, k.column_stride}, n, D_, key - first, k_);
            const auto v_facts = E::template pack_right_rows<E::kKeysWeighed, kTurns>(
                {v.row(key), v.row_stride, v.column_stride}, n, D_, key - first, v_);
            k_square_ = std::max(k_square_, k_facts.largest_square);
            values_finite_ &= v_facts.finite;
            bounds_ = bounds_ && k_facts.finite && v_facts.finite && v_facts.largest <= kLargestValue;
        }
    }

    void block(const ScoreRows<T>& score_rows, const Dropout<C>& dropout, QueryBlock& b, int64_t key,
               int64_t count) {
        const Band& band = score_rows.band();
        const int64_t begin = std::max(key, band.begin(b.first_query));
        const int64_t end = std::min(key + count, band.end(b.first_query + b.queries - 1));
        if (end <= begin) return;
        const int64_t first = begin / E::kStep * E::kStep, keys = round_up(end - first, E::kStep);
        // With no maximum to look for, weights are made a strip at a time, whose scores stay in the nearest
        // cache.
        const int64_t strip = b.bounded ? E::kStrip : E::kKeys;
        for (int64_t j = 0; j < keys; j += strip)
            weigh(score_rows, dropout, b, first + j, std::min(strip, keys - j), weights_ + E::kParts * j);
        const int64_t n = round_up(b.queries, E::kRowStep);
        const Block<C> acc{acc_ + b.row * columns_, columns_};
        const auto values = E::template right_rows<E::kKeysWeighed>(v_, first - packed_from_, D_);
        // A weight of 0 makes NaN of a value that is not finite: rows that see none of these keys stay as
        // they were.
        std::vector<C> before;
        if (!values_finite_) before.assign(acc.data, acc.data + b.queries * columns_);
        E::product(E::scores_left(weights_, kWeightStride), values, n, columns_, keys, acc, b.begun, cached_);
        for (int64_t i = 0; i < b.queries && !values_finite_; ++i) {
            const int64_t query = b.first_query + i;
            if (band.begin(query) < end && band.end(query) > begin) continue;
            if (b.begun)
                std::copy_n(before.data() + i * columns_, columns_, acc.data + i * columns_);
            else
                std::fill_n(acc.data + i * columns_, columns_, C(0));
        }
        b.begun = true;
    }

    // The weights of a block of queries for some keys, as a left operand.
    void weigh(const ScoreRows<T>& score_rows, const Dropout<C>& dropout, const QueryBlock& b, int64_t first,
               int64_t keys, Operand* out) {
        E::product(E::left(b.q, D_), E::right_transposed(k_, first - packed_from_, D_),
                   round_up(b.queries, E::kRowStep), keys, D_, scores_, false, cached_);
        const BlockPlace at{b.first_query, b.queries, first, keys};
        if (score_rows.adjusts()) score_rows.adjust(scores_, at);
        if (scales_) scale(scores_, b.queries, keys, static_cast<C>(p_.softmax_scale));
        if constexpr (E::kWords)
            if (b.words) {
                auto put = [&](auto hidden) {
                    E::template put_words<hidden.value>(
                        scores_, keys, b.queries, {factor_, b.bound},
                        [&](int64_t i) { return score_rows.seen(at, i); }, row_sum_ + b.row * lanes,
                        rounded_sum_ + b.row * lanes, out, kWeightStride);
                };
                return score_rows.band_hides(at) ? put(std::true_type()) : put(std::false_type());
            }
        score_rows.outside_band(scores_, at, -infinity);
        if (!b.bounded) bring_up_to_date(b, keys);
        const bool drops = p_.dropout_threshold > 0;
        if (b.rounds)
            weights<true, false, kRounds>(b, at, dropout, out);
        else if (b.bounded && drops)
            weights<true, true, false>(b, at, dropout, out);
        else if (b.bounded)
            weights<true, false, false>(b, at, dropout, out);
        else if (drops)
            weights<false, true, false>(b, at, dropout, out);
        else
            weights<false, false, false>(b, at, dropout, out);
    }

    // Finds the new maxima of a block's rows and rescales what was summed under the old ones.
    void bring_up_to_date(const QueryBlock& b, int64_t keys) {
        for (int64_t i = 0; i < b.queries; ++i) {
            const C* row = scores_.data + i * scores_.stride;
            Vector<C> even = load(row), odd = load(row + lanes);
            for (int64_t j = 2 * lanes; j < keys; j += 2 * lanes) {
                even = max(even, load(row + j));
                odd = max(odd, load(row + j + lanes));
            }
            store(block_max_ + i * lanes, max(even, odd));
        }
        for (int64_t i = 0; i < b.queries; i += lanes) {
            const Vector<C> block_max =
                across_rows(block_max_ + i * lanes, [](auto x, auto y) { return max(x, y); });
            C* place = row_max_ + b.row + i;
            const Vector<C> old_max = load(place), row_max = max(old_max, block_max);
            // A row with no visible key has row_max = -inf; subtracting 0 instead keeps exp(-inf) = 0 and no
            // NaN.
            const Vector<C> reference = row_max == -infinity ? Vector<C>{} : row_max;
            store(place, row_max);
            store(reference_ + i, reference);
            store(correction_ + i, Exp::of(old_max - reference, factor_));
        }
        for (int64_t i = 0; i < b.queries; ++i) {
            const C correction = correction_[i];
            if (correction == C(1)) continue;
            C* sums = row_sum_ + (b.row + i) * lanes;
            store(sums, load(sums) * correction);
            C* acc = acc_ + (b.row + i) * columns_;
            for (int64_t d = 0; d < columns_ && b.begun; d += lanes)
                store(acc + d, load(acc + d) * correction);
        }
    }

    template <bool bounded, bool drops, bool rounds>
    void weights(const QueryBlock& b, const BlockPlace& at, const Dropout<C>& dropout, Operand* weights) {
        const C factor = factor_;
        const int64_t keys = at.keys, key_bytes = width_ * static_cast<int64_t>(sizeof(Operand));
        // The next keys and as many values come nearer meanwhile, unless they are too many for it.
        int64_t lines = ceil_div(keys * key_bytes, 64 * b.queries);
        if (lines > E::kLinesAhead) lines = 0;
        const char* ahead_k =
            reinterpret_cast<const char*>(k_) + (at.first_key - packed_from_ + keys) * key_bytes;
        const char* ahead_v = reinterpret_cast<const char*>(v_) + (at.first_key - packed_from_) * key_bytes;
        for (int64_t i = 0; i < b.queries; ++i) {
            const C* row = scores_.data + i * scores_.stride;
            Operand* out = weights + i * kWeightStride;
            C* sums = row_sum_ + (b.row + i) * lanes;
            const Vector<C> reference = broadcast(bounded ? C(0) : reference_[i]);
            C* rounded_sums = rounded_sum_ + (b.row + i) * lanes;
            Vector<C> even = load(sums), odd{}, rounded = load(rounded_sums);
            if (drops) dropout.draw(b.first_query + i, at.first_key, keys, bits_);
            for (int64_t j = 0; j < keys; j += 2 * lanes) {
                Vector<C> x = load(row + j), y = load(row + j + lanes);
                // Before they are scaled: the largest gives 0, and a weight of 1.
                if (!bounded) {
                    x -= reference;
                    y -= reference;
                }
                x = Exp::of(x, factor);
                y = Exp::of(y, factor);
                even += x;
                odd += y;
                if (drops) {
                    x = dropout.keep(x, bits_ + j);
                    y = dropout.keep(y, bits_ + j + lanes);
                }
                E::template put_left<kTurns>(out + E::kParts * j, x, y);
                if constexpr (rounds) rounded = E::plus_left(rounded, out + j);
            }
            store(sums, even + odd);
            if constexpr (rounds) store(rounded_sums, rounded);
            for (int64_t line = 0; line < lines; ++line) {
                __builtin_prefetch(ahead_k + (i * lines + line) * 64);
                __builtin_prefetch(ahead_v + (i * lines + line) * 64);
            }
        }
        // Rows that only fill up a tile.
        for (int64_t i = b.queries; i < round_up(b.queries, E::kRowStep); ++i)
            std::memset(weights + i * kWeightStride, 0,
                        static_cast<size_t>(E::kParts * keys) * sizeof(Operand));
    }

    void finish(int64_t head, const QueryBlock& b, C scale) {
        const auto out = head_of<T>(p_.out, p_.out_strides, s_.batch, head, s_.first_query + b.first_query);
        C* lse =
            static_cast<C*>(p_.lse) + (s_.batch * p_.heads + head) * p_.n_q + s_.first_query + b.first_query;
        for (int64_t i = 0; i < b.queries; i += lanes) {
            const Vector<C> total =
                across_rows(row_sum_ + (b.row + i) * lanes, [](auto x, auto y) { return x + y; });
            const Vector<C> reference = b.bounded ? Vector<C>{} : load(row_max_ + b.row + i);
            Vector<C> divisor = total;
            if (b.rounds)
                divisor =
                    across_rows(rounded_sum_ + (b.row + i) * lanes, [](auto x, auto y) { return x + y; });
            store(correction_ + i, total == 0 ? Vector<C>{} : scale / divisor);
            Vector<C> row_lse = reference * unit_ + log<C>(total);
            if constexpr (E::kWords)
                if (b.words)
                    row_lse = (b.bound - E::kWordBits) * C(0.693147181) +
                              log<C>(total + E::error_of_largest(rounded_sum_ + (b.row + i) * lanes));
            row_lse = total == 0 ? broadcast(-infinity) : row_lse;
            const int64_t n = std::min(lanes, b.queries - i);
            if (n == lanes)
                store(lse + i, row_lse);
            else
                store(lse + i, row_lse, n);
        }
        // A row that saw no key is zero, also where a NaN among the values met its weights of 0.
        for (int64_t i = 0; i < b.queries; ++i)
            if (correction_[i] == C(0) || !b.begun)
                std::fill_n(acc_ + (b.row + i) * columns_, columns_, C(0));
        E::write_rows(Block<C>{acc_ + b.row * columns_, columns_}, b.queries, D_, out,
                      streams(out, D_, p_.batch * p_.heads * p_.n_q * D_),
                      [&](int64_t i) { return correction_[i]; });
    }

    const AttentionParams& p_;
    const QueryTask task_;
    const Sequence s_;
    const int64_t D_, width_, columns_;  // width_: of a packed row
    int64_t keys_at_once_, rows_together_;
    bool in_parts_, cached_ = false;  // cached_: the packed keys and values stay in the second cache
    int64_t packed_from_ = -1;
    bool bounds_ = false, values_finite_ = true;
    C k_square_ = 0;
    bool scales_ = false;      // whether raw scores are scaled before all else
    C unit_ = 1, factor_ = 1;  // what a score then counts in natural units, and in those of Exp
    Operand *q_, *k_, *v_, *weights_;
    // rounded_sum_: the sums of rounded weights, or of weights in words the largest.
    C *acc_, *row_sum_, *rounded_sum_, *row_max_, *correction_;
    Block<C> scores_;
    C *block_max_, *reference_;
    uint16_t* bits_;
};

}  // namespace

void attention_forward(const AttentionParams& p) {
    with_engine(p, [&](auto engine) {
        using E = typename decltype(engine)::type;
        const auto tasks = query_tasks(p, E::kQueries * kBlocksTogether);
        parallel_for(static_cast<int64_t>(tasks.size()), p.threads,
                     [&](int64_t task) { Forward<E>(p, tasks[task]).run(); });
    });
}

}  // namespace lmkern
