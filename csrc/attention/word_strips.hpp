// Attention's forward pass where every score of a block of queries is bounded: weights in words of 16 bits,
// made of one strip of scores while tiles multiply the next strip's scores, and values by earlier weights.
#pragma once

#include "attention/bf16_operands.hpp"
#include "attention/scores.hpp"

namespace lmkern {

// A block of queries, kQueries rows each of packed queries, sums of weights and results. Lives until its weights
// have met the values.
template <class Operand, class C>
struct WordBlock {
    const Operand* q;
    C *row_sum, *acc;
    int64_t first_query, queries;
    C bound;  // of its scores, in bits: weights are relative to 2^bound
};

// Engines without: nothing is ever added.
template <class E>
class WordStrips {
public:
    static constexpr bool kServes = false;
    static constexpr typename E::C kMostBound = 0;
    static constexpr int64_t kScores = 0, kWeights = 0;

    WordStrips(int64_t, typename E::C*, typename E::Operand*) {}
    template <class... Arguments>
    void add(const Arguments&...) {}
    template <class... Arguments>
    void finish(const Arguments&...) {}
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__) && defined(__AVX512VBMI2__)

template <>
class WordStrips<Bf16Engine<bfloat16>> {
    using E = Bf16Engine<bfloat16>;
    using Block = WordBlock<bfloat16, float>;
    // Weights that meet the values together.
    static constexpr int64_t kKeys = 256;
    static constexpr int64_t kScoreStride = 2 * E::kStrip + 16, kWeightStride = 2 * kKeys + 32;

public:
    static constexpr bool kServes = true;
    static constexpr float kMostBound = Exp2Words::kRange / 2;
    static constexpr int64_t kScores = E::kQueries * kScoreStride, kWeights = E::kQueries * kWeightStride;

    WordStrips(int64_t D, float* scores, bfloat16* weights)
        : width_(E::width(D)), scores_(scores), weights_(weights) {}

    // acc = or += (accumulate) the weights of `keys` keys, multiples of 32 and numbers k and v on, times v. Done
    // when finish() is. factor: what a score counts in bits.
    void add(const ScoreRows<bfloat16>& rows, float factor, const Block& block, int64_t first_key,
             int64_t keys, Bf16Right k, Bf16Right v, bool accumulate) {
        for (int64_t key = 0; key < keys; key += kKeys) {
            const int64_t together = std::min(kKeys, keys - key);
            bfloat16* weights = weights_ + weights_turn_ * kKeys;
            weights_turn_ = !weights_turn_;
            for (int64_t j = 0; j < together; j += E::kStrip) {
                Strip& next = strips_[turn_];
                next.block = &block;
                next.first_key = first_key + key + j;
                next.keys = std::min(E::kStrip, together - j);
                next.scores = scores_ + turn_ * E::kStrip;
                next.weights = weights;
                next.column = j;
                next.values = v.data + key / 32 * v.depth_stride;
                next.value_depth = v.depth_stride;
                next.value_column = v.column_stride;
                next.last = j + E::kStrip >= together;
                next.accumulate = accumulate || key > 0;
                push_scores(next, k.column(key + j));
                turn_ = !turn_;
                weigh(rows, factor);
                waits_ = true;
            }
        }
    }

    void finish(const ScoreRows<bfloat16>& rows, float factor) {
        turn_ = !turn_;
        weigh(rows, factor);
        queue_.finish();
    }

private:
    struct Strip {
        const Block* block;
        int64_t first_key, keys;
        float* scores;
        // What meets the values together, once the last strip of it is weighed; the column of this strip.
        bfloat16* weights;
        int64_t column;
        const bfloat16* values;
        int64_t value_depth, value_column;
        bool last, accumulate;
    };

    void push_scores(const Strip& s, Bf16Right k) {
        const bfloat16* q = s.block->q;
        for (int64_t j = 0; j < s.keys; j += 32)
            queue_.push({q, q + 16 * width_, width_, 32}, k.column(j), width_ / 32, s.scores + j, kScoreStride,
                        false, true);
    }
    void push_values(const Strip& s) {
        const Bf16Right v{s.values, s.value_depth, s.value_column};
        for (int64_t d = 0; d < width_; d += 32)
            queue_.push({s.weights, s.weights + 16 * kWeightStride, kWeightStride, 32}, v.column(d),
                        (s.column + s.keys) / 32, s.block->acc + d, width_, s.accumulate, false);
    }

    // The weights of the strip that waits for them, whose turn it is.
    void weigh(const ScoreRows<bfloat16>& rows, float factor) {
        if (!waits_) return queue_.finish_first();
        waits_ = false;
        const Strip& s = strips_[turn_];
        const bool hidden =
            rows.outside_band({s.scores, kScoreStride}, {s.block->first_query, s.block->queries, s.first_key, s.keys},
                              -std::numeric_limits<float>::infinity());
        const Exp2Words exp2(factor, s.block->bound);
        const int64_t share = width_ / 32 * (s.keys / 32) * 2;
        const int64_t halves = 0 * share;
        if (hidden)
            weigh_rows<true>(s, exp2, halves);
        else
            weigh_rows<false>(s, exp2, halves);
        queue_.finish_first();
        if (!s.last) return;
        // The weights before these make room for the next.
        queue_.finish();
        push_values(s);
    }

    template <bool clamped>
    void weigh_rows(const Strip& s, const Exp2Words& exp2, int64_t halves) {
        const __m512i ones = _mm512_set1_epi16(0x3f80);
        for (int64_t i = 0, done = 0; i < E::kQueries; i += 2) {
            for (; done * E::kQueries < halves * (i + 2); ++done) queue_.half();
            for (int64_t r = i; r < i + 2; ++r) {
                float* place = s.block->row_sum + r * 16;
                __m512 sum = _mm512_load_ps(place);
                const float* row = s.scores + r * kScoreStride;
                bfloat16* out = s.weights + r * kWeightStride + s.column;
                for (int64_t j = 0; j < s.keys; j += 32) {
                    const __m512i w = exp2.of<clamped>(_mm512_load_ps(row + j), _mm512_load_ps(row + j + 16));
                    _mm512_store_si512(out + j, w);
                    sum = _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)ones);
                }
                _mm512_store_ps(place, sum);
            }
        }
    }

    const int64_t width_;
    float* scores_;      // two strips
    bfloat16* weights_;  // twice kKeys
    int64_t weights_turn_ = 0, turn_ = 0;
    Strip strips_[2];
    bool waits_ = false;
    Bf16Queue queue_;
};

#endif

}  // namespace lmkern
