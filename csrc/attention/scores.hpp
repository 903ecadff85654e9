// What happens to a block of scores between the two products: soft-cap, biases, masks, dropout. Queries are
// rows, keys stand in the lanes.
#pragma once

#include <cmath>

#include "attention/operands.hpp"
#include "simd/elementary.hpp"
#include "simd/philox.hpp"
#include "simd/tanh.hpp"

namespace lmkern {

// A block of one head's scores: rows are queries from first_query on, columns keys from first_key on, both
// counted within the sequence.
struct BlockPlace {
    int64_t first_query, queries;
    int64_t first_key, keys;  // keys: columns that are computed, some of them perhaps beyond the last key
};

// Scores are counted in units in which the exponential is cheapest: bits, or natural units where their
// rounding would show.
template <class T, bool bits = sizeof(T) == 2>
struct Exponential {
    using C = Compute<T>;
    static constexpr double unit = bits ? 1.44269504088896340736 : 1;

    // Of x factor, in these units.
    [[gnu::always_inline]] static Vector<C> of(Vector<C> x, C factor) {
        if constexpr (sizeof(T) == 2) return exp2(x * factor);
#if defined(__AVX512F__)
        else if constexpr (bits)
            return exp2_of_product<LongSeries>(x, factor);
        else if constexpr (sizeof(T) == 4)
            return exp2_of_product<LongSeries>(x * factor, 1.44269504f);
#endif
        else
            return exp<C>(x * factor);
    }
};

template <class C>
void scale(Block<C> scores, int64_t rows, int64_t columns, C factor) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; j += kLanes<C>) {
            C* place = scores.data + i * scores.stride + j;
            store(place, load(place) * factor);
        }
}

template <class T>
class ScoreRows {
    using C = Compute<T>;
    static constexpr int64_t lanes = kLanes<C>;

public:
    ScoreRows(const AttentionParams& p, const Sequence& s, int64_t head)
        : p_(p), s_(s), head_(head), band_(p, s) {
        if (p.relative_bias != nullptr)
            relative_ =
                static_cast<const C*>(p.relative_bias) + head * p.relative_head_stride + p.relative_radius;
        if (p.mask != nullptr) mask_ = p.mask + s.batch * p.mask_strides.batch + head * p.mask_strides.head;
    }

    const Band& band() const { return band_; }
    // Whether raw scores are more than scaled, apart from the band.
    bool adjusts() const {
        return p_.softcap > 0 || p_.bias != nullptr || relative_ != nullptr || mask_ != nullptr;
    }

    // Turns raw products q . k into scores, natural units. `slopes`, if wanted: the derivative of the
    // soft-cap.
    void adjust(Block<C> scores, const BlockPlace& at, C* slopes = nullptr) const {
        const C scale = static_cast<C>(p_.softmax_scale);
        const C cap = static_cast<C>(p_.softcap);
        const int64_t columns = std::min(at.keys, band_.n_k - at.first_key);
        for (int64_t i = 0; i < at.queries; ++i) {
            const int64_t query = at.first_query + i;
            C* row = scores.data + i * scores.stride;
            for (int64_t j = 0; j < columns; j += lanes) {
                Vector<C> s = load(row + j) * scale;
                if (cap > 0) {
                    const Vector<C> t = tanh<C>(s / cap);
                    if (slopes != nullptr) store(slopes + i * scores.stride + j, C(1) - t * t);
                    s = t * cap;
                }
                store(row + j, s);
            }
            if (relative_ != nullptr) add(row, columns, relative_ + (at.first_key - query - s_.offset), 1);
            if (p_.bias != nullptr) add_bias(row, columns, query, at.first_key);
            if (mask_ != nullptr) hide(row, columns, query, at.first_key);
        }
    }

    // Whether the band hides some key of the block from some query.
    bool band_hides(const BlockPlace& at) const {
        return band_.begin(at.first_query + at.queries - 1) > at.first_key ||
               band_.end(at.first_query) < at.first_key + at.keys;
    }
    // The columns of the block that the band lets its row i see.
    Columns seen(const BlockPlace& at, int64_t i) const {
        const int64_t query = at.first_query + i;
        return {std::clamp<int64_t>(band_.begin(query) - at.first_key, 0, at.keys),
                std::clamp<int64_t>(band_.end(query) - at.first_key, 0, at.keys)};
    }

    // Hides the keys outside of the band: sets `hidden` there. False if the band hides none of the block.
    bool outside_band(Block<C> scores, const BlockPlace& at, C hidden) const {
        if (!band_hides(at)) return false;
        using Integer = typename IntegerOf<C>::type;
        const auto lane = lane_indices<C>();
        for (int64_t i = 0; i < at.queries; ++i) {
            const auto [begin, end] = seen(at, i);
            C* row = scores.data + i * scores.stride;
            // Vectors before and after those that are seen as a whole.
            for (int64_t j = 0; j < begin; j += lanes)
                store(row + j, lane < static_cast<Integer>(begin - j) ? broadcast(hidden) : load(row + j));
            for (int64_t j = end / lanes * lanes; j < at.keys; j += lanes)
                store(row + j, lane < static_cast<Integer>(end - j) ? load(row + j) : broadcast(hidden));
        }
        return true;
    }

    // Adds a block of the gradient of scores to that of the bias, first over what the bias was broadcast to
    // within the block: sums of sums have smaller errors than long ones. The block is lost.
    void add_bias_gradient(Block<C> gradient, const BlockPlace& at, C* dbias) const {
        const Strides& s = p_.dbias_strides;
        C* target =
            dbias + s_.batch * s.batch + head_ * s.head + at.first_query * s.row + at.first_key * s.column;
        const int64_t keys = std::min(at.keys, band_.n_k - at.first_key);
        int64_t rows = at.queries;
        if (s.row == 0) {
            for (int64_t i = 1; i < rows; ++i)
                for (int64_t j = 0; j < at.keys; j += lanes) {
                    C* first = gradient.data + j;
                    store(first, load(first) + load(first + i * gradient.stride));
                }
            rows = 1;
        }
        for (int64_t i = 0; i < rows; ++i) {
            const C* row = gradient.data + i * gradient.stride;
            C* to = target + i * s.row;
            if (s.column == 0) {
                Vector<C> sums{};
                for (int64_t j = 0; j < at.keys; j += lanes) sums += load(row + j);
                *to += sum<C>(sums);
            } else {
                for (int64_t j = 0; j < keys; ++j) to[j * s.column] += row[j];
            }
        }
    }

    // Adds a block of the gradient of scores to that of the relative bias, along its diagonals: first within
    // the block, since sums of sums have smaller errors than long ones.
    static constexpr int64_t kDiagonals = 64 + 64;
    void add_relative_gradient(Block<C> gradient, const BlockPlace& at, double* drelative) const {
        const int64_t keys = std::min(at.keys, band_.n_k - at.first_key), last = at.queries - 1;
        C diagonals[kDiagonals + lanes] = {};
        for (int64_t i = 0; i < at.queries; ++i)
            for (int64_t j = 0; j < at.keys; j += lanes) {
                C* place = diagonals + last - i + j;
                store(place, load(place) + load(gradient.data + i * gradient.stride + j));
            }
        double* target = drelative + p_.relative_radius + at.first_key - at.first_query - s_.offset - last;
        for (int64_t t = 0; t < keys + last; ++t) target[t] += diagonals[t];
    }

private:
    // row[j] += from[j * stride], stride 0, 1 or any. -inf hides a key whatever its score is, NaN too.
    template <class B>
    static void add(C* row, int64_t columns, const B* from, int64_t stride) {
        for (int64_t j = 0; j < columns; j += lanes) {
            const int64_t n = std::min(lanes, columns - j);
            const Vector<C> added = gathered(from + j * stride, stride, n);
            store(row + j, added == -std::numeric_limits<C>::infinity() ? added : load(row + j) + added);
        }
    }

    template <class B>
    static Vector<C> gathered(const B* from, int64_t stride, int64_t n) {
        if constexpr (std::is_same_v<Compute<B>, C>) {
            if (stride == 1) return n == lanes ? load(from) : load(from, n);
        }
        Vector<C> v{};
        for (int64_t lane = 0; lane < n; ++lane) v[lane] = static_cast<C>(load_one(from + lane * stride));
        return v;
    }

    void add_bias(C* row, int64_t columns, int64_t query, int64_t first_key) const {
        const Strides& s = p_.bias_strides;
        const int64_t at = s_.batch * s.batch + head_ * s.head + query * s.row + first_key * s.column;
        with_any_type(static_cast<Dtype>(p_.bias_dtype), [&](auto type) {
            using B = typename decltype(type)::type;
            add(row, columns, static_cast<const B*>(p_.bias) + at, s.column);
        });
    }

    void hide(C* row, int64_t columns, int64_t query, int64_t first_key) const {
        const uint8_t* seen = mask_ + query * p_.mask_strides.row + first_key * p_.mask_strides.column;
        constexpr C hidden = -std::numeric_limits<C>::infinity();
        for (int64_t j = 0; j < columns; j += lanes) {
            Integers<C> visible{};
            for (int64_t lane = 0; lane < std::min(lanes, columns - j); ++lane)
                visible[lane] = seen[(j + lane) * p_.mask_strides.column];
            store(row + j, visible != 0 ? load(row + j) : broadcast(hidden));
        }
    }

    const AttentionParams& p_;
    const Sequence s_;
    const int64_t head_;
    const Band band_;
    const C* relative_ = nullptr;  // of distance 0
    const uint8_t* mask_ = nullptr;
};

// Which weights of a head dropout keeps. 16 random bits a key, in blocks of 8 keys from each call of Philox.
template <class C>
class Dropout {
    static constexpr int64_t lanes = kLanes<C>;

public:
    // Keys that one vector of counters serves.
    static constexpr int64_t kChunk = 8 * kLanes<uint32_t>;

    Dropout(const AttentionParams& p, int64_t sequence, int64_t head)
        : threshold_(static_cast<uint16_t>(std::min<int64_t>(p.dropout_threshold, 65535))),
          all_(p.dropout_threshold > 65535),
          sequence_(static_cast<uint32_t>(sequence)),
          head_(static_cast<uint32_t>(head)),
          key_low_(static_cast<uint32_t>(p.seed)),
          key_high_(static_cast<uint32_t>(static_cast<uint64_t>(p.seed) >> 32)) {}

    // Draws the bits of a query's keys from first_key on, a multiple of 8; `bits` has room for whole chunks.
    void draw(int64_t query, int64_t first_key, int64_t keys, uint16_t* bits) const {
        for (int64_t j = 0; j < keys; j += kChunk) {
            Vector<uint32_t> counter[4];
            counter[0] = static_cast<uint32_t>((first_key + j) / 8) + lane_counts();
            counter[1] = Vector<uint32_t>{} + static_cast<uint32_t>(query);
            counter[2] = Vector<uint32_t>{} + head_;
            counter[3] = Vector<uint32_t>{} + sequence_;
            philox(counter, key_low_, key_high_);
            uint32_t words[4][kLanes<uint32_t>];
            std::memcpy(words, counter, sizeof words);
            auto* out = reinterpret_cast<uint32_t*>(bits + j);
            for (int lane = 0; lane < kLanes<uint32_t>; ++lane)
                for (int word = 0; word < 4; ++word) out[4 * lane + word] = words[word][lane];
        }
    }

    // v where the bits say so, 0 elsewhere.
    Vector<C> keep(Vector<C> v, const uint16_t* bits) const {
        typedef uint16_t Bits __attribute__((vector_size(kLanes<C> * 2)));
        Bits drawn;
        std::memcpy(&drawn, bits, sizeof drawn);
        const Integers<C> wide = __builtin_convertvector(drawn, Integers<C>);
        if (all_) return Vector<C>{};
        return wide >= static_cast<typename IntegerOf<C>::type>(threshold_) ? v : Vector<C>{};
    }

    // What is kept is multiplied by this.
    C scale() const { return all_ ? C(0) : C(65536) / C(65536 - threshold_); }

private:
    static Vector<uint32_t> lane_counts() {
        Vector<uint32_t> counts;
        for (int lane = 0; lane < kLanes<uint32_t>; ++lane) counts[lane] = static_cast<uint32_t>(lane);
        return counts;
    }

    uint16_t threshold_;
    bool all_;
    uint32_t sequence_, head_, key_low_, key_high_;
};

// op over each of `lanes` rows of one vector: result[i] = op over rows[i][0 .. lanes).
template <class C, class Op>
inline Vector<C> across_rows(const C* rows, const Op& op) {
    constexpr int64_t lanes = kLanes<C>;
    C square[lanes * lanes];
    transpose_square(rows, lanes, square, lanes);
    Vector<C> result = load(square);
    for (int64_t i = 1; i < lanes; ++i) result = op(result, load(square + i * lanes));
    return result;
}

}  // namespace lmkern
