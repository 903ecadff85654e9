// Cross-entropy on the CPU. With z the logits (softcap tanh(logit / softcap) if that is asked for), s the
// label smoothing and lse = log sum exp z (docs/kernels/cross_entropy.md):
//
//     loss  = lse - (1 - s) z[target] - s mean(z) + z_loss lse^2
//     dz[j] = dloss ((1 + 2 z_loss lse) exp(z[j] - lse) - s / V - (1 - s) [j = target])
//
// lse is kept as row_max + log_sum: rounded to one number it would cost large weights half their digits in
// common, (z[j] - row_max) - log_sum does not.
//
// A row is read from memory once a pass. Where both passes run on it at once, the second finds it in the
// cache: V 50,304 in bfloat16 is 100 KB.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>

#include "core/parallel_for.hpp"
#include "cross_entropy/cpu.hpp"
#include "simd/elementary.hpp"
#include "simd/tanh.hpp"

namespace lmkern {
namespace {

// Elements worth a task: about 20 us of work.
constexpr int64_t kTaskElements = 32 * 1024;

// Rows as a tensor holds them. `block` columns are read twice, for their maximum and for their exponentials:
// half of the first cache.
template <class T_>
struct Rows {
    using T = T_;
    static constexpr int64_t together = 1, block = 4096;

    static T* row(const void* logits, int64_t stride, int64_t row) {
        return static_cast<T*>(const_cast<void*>(logits)) + row * stride;
    }
    static int64_t at(int64_t column) { return column; }
    // How many rows, and how many columns of each, are there to be written.
    static int64_t rows(int64_t rows) { return rows; }
    static int64_t columns(int64_t columns) { return columns; }
};

#if defined(__AVX512BF16__)
// Rows in tiles (linear_cross_entropy/params.hpp). The 16 of a tile come from memory together, so they are
// worked on together.
struct TileRows {
    using T = bfloat16;
    static constexpr int64_t together = 16, block = 1024;

    static T* row(const void* logits, int64_t stride, int64_t row) {
        return static_cast<T*>(const_cast<void*>(logits)) + row / 16 * stride + row % 16 * 32;
    }
    static int64_t at(int64_t column) { return column / 32 * 512 + column % 32; }
    static int64_t rows(int64_t rows) { return round_up(rows, 32); }
    static int64_t columns(int64_t columns) { return round_up(columns, 32); }
};
#endif

// e^x for what is stored as T, or for sums of such: 16 bits are content with 2^(x log2 e).
constexpr float kLog2e = 0x1.715476p0f;
template <class T>
inline Vector<Compute<T>> exp_for(Vector<Compute<T>> x) {
    if constexpr (sizeof(T) == 2)
        return exp2(x * kLog2e);
    else
        return exp<Compute<T>>(x);
}

template <class C>
inline Vector<C> first_lanes(Vector<C> v, int64_t count, C beyond) {
    return lane_indices<C>() < static_cast<typename IntegerOf<C>::type>(count) ? v : broadcast(beyond);
}

template <class C>
inline C largest(Vector<C> v) {
    C m = v[0];
    for (int lane = 1; lane < kLanes<C>; ++lane) m = m > v[lane] ? m : v[lane];
    return m;
}

// A row of logits as the loss sees them: capped or as they are.
template <class Layout_, bool capped>
struct Row {
    using Layout = Layout_;
    using T = typename Layout::T;
    using C = Compute<T>;
    static constexpr bool is_capped = capped;
    const T* logits;
    int64_t columns;
    C softcap;

    Row(const CrossEntropyParams& p, int64_t row)
        : logits(Layout::row(p.logits, p.logits_stride, row)),
          columns(p.columns),
          softcap(static_cast<C>(p.softcap)) {}

    const T* at(int64_t column) const { return logits + Layout::at(column); }
    Vector<C> z(Vector<C> logit) const {
        if constexpr (capped)
            return tanh<C>(logit / softcap) * softcap;
        else
            return logit;
    }
    C z(C logit) const { return z(broadcast(logit))[0]; }
};

// Of a row, block by block: the largest logit, log sum exp of the logits less that, and with `smoothed` the
// mean of z less it too. A block's exponentials are taken relative to the largest logit so far; sums start
// anew each block, so that rounding errors grow with the block and not with the row.
template <bool smoothed, class C>
class Statistics {
    static constexpr int64_t lanes = kLanes<C>;
    static constexpr C infinity = std::numeric_limits<C>::infinity();

public:
    template <class R>
    void add(const R& row, int64_t start, int64_t end) {
        using T = typename R::T;
        const int64_t rest = (end - start) % lanes, whole = end - rest;
        constexpr int turns = 4;
        Vector<C> maxima[turns];
        for (auto& m : maxima) m = broadcast(-infinity);
        int64_t column = start;
        for (; column + turns * lanes <= whole; column += turns * lanes)
            for (int turn = 0; turn < turns; ++turn)
                maxima[turn] = max(maxima[turn], load(row.at(column + turn * lanes)));
        for (; column < whole; column += lanes) maxima[0] = max(maxima[0], load(row.at(column)));
        if (rest > 0) maxima[1] = max(maxima[1], first_lanes(load(row.at(whole), rest), rest, -infinity));
        const C block_max = row.z(largest<C>(max(max(maxima[0], maxima[1]), max(maxima[2], maxima[3]))));
        if (!(block_max <= row_max_)) {
            row_max_ = block_max;
            // As long as every logit is -inf, subtracting 0 keeps exp(-inf) = 0 and no NaN.
            const C next = row_max_ == -infinity ? C(0) : row_max_;
            row_sum_ *= exp<C>(broadcast(std::min(reference_ - next, C(0))))[0];
            if (smoothed && start > 0) total_ += static_cast<C>(start) * (reference_ - next);
            reference_ = next;
        }

        Vector<C> sums[turns] = {}, totals[turns] = {};
        auto add = [&](Vector<C> below, int turn) { sums[turn] += exp_for<T>(below); };
        column = start;
        for (; column + turns * lanes <= whole; column += turns * lanes)
            for (int turn = 0; turn < turns; ++turn) {
                const Vector<C> below = row.z(load(row.at(column + turn * lanes))) - reference_;
                add(below, turn);
                if constexpr (smoothed) totals[turn] += below;
            }
        for (; column < whole; column += lanes) {
            const Vector<C> below = row.z(load(row.at(column))) - reference_;
            add(below, 0);
            if constexpr (smoothed) totals[0] += below;
        }
        if (rest > 0) {
            const Vector<C> below = row.z(load(row.at(whole), rest)) - reference_;
            add(first_lanes(below, rest, -infinity), 1);
            if constexpr (smoothed) totals[1] += first_lanes(below, rest, C(0));
        }
        row_sum_ += sum<C>((sums[0] + sums[1]) + (sums[2] + sums[3]));
        if constexpr (smoothed) total_ += sum<C>((totals[0] + totals[1]) + (totals[2] + totals[3]));
    }

    C row_max() const { return reference_; }
    C log_sum() const { return std::log(row_sum_); }
    C mean_below(int64_t columns) const { return total_ / static_cast<C>(columns); }

private:
    C row_max_ = -infinity, reference_ = 0, row_sum_ = 0, total_ = 0;
};

// The gradient of a row's logits, written block by block.
template <class R>
class Gradient {
    using T = typename R::T;
    using C = typename R::C;
    static constexpr int64_t lanes = kLanes<C>;

public:
    // Reads the target's logit before dlogits, which may be the logits, is written.
    Gradient(const CrossEntropyParams& p, const R& row, int64_t index, int64_t target)
        : row_(row),
          dlogits_(R::Layout::row(p.dlogits, p.dlogits_stride, index)),
          row_max_(static_cast<const C*>(p.row_max)[index]),
          log_sum_(static_cast<const C*>(p.log_sum)[index]),
          target_(target) {
        const C dloss = static_cast<const C*>(p.dloss)[index * p.dloss_stride];
        const C smoothing = static_cast<C>(p.label_smoothing);
        factor_ = dloss * (C(1) + C(2) * static_cast<C>(p.z_loss) * (row_max_ + log_sum_));
        uniform_ = dloss * smoothing / static_cast<C>(row.columns);
        hit_ = of(broadcast(load_one(row.at(target))), uniform_ + dloss * (C(1) - smoothing))[0];
    }

    void write(int64_t start, int64_t end) const {
        int64_t column = start;
        for (; column + lanes <= end; column += lanes)
            store(dlogits_ + R::Layout::at(column), of(load(row_.at(column)), uniform_));
        if (const int64_t rest = end - column; rest > 0)
            store(dlogits_ + R::Layout::at(column), of(load(row_.at(column), rest), uniform_), rest);
        if (start <= target_ && target_ < end) store_one(dlogits_ + R::Layout::at(target_), hit_);
    }

private:
    Vector<C> of(Vector<C> logit, C less) const {
        if constexpr (R::is_capped) {
            const Vector<C> t = tanh<C>(logit / row_.softcap);
            return (weight(t * row_.softcap) * factor_ - less) * (C(1) - t * t);
        }
        return weight(logit) * factor_ - less;
    }
    Vector<C> weight(Vector<C> z) const {
        if constexpr (sizeof(T) == 2)
            return exp2((z - row_max_) * kLog2e - log_sum_ * kLog2e);
        else
            return exp<C>((z - row_max_) - log_sum_);
    }

    const R row_;
    T* const dlogits_;
    const C row_max_, log_sum_;
    const int64_t target_;
    C factor_, uniform_, hit_;
};

template <class R>
void clear(const CrossEntropyParams& p, int64_t index) {
    using Layout = typename R::Layout;
    auto* dlogits = Layout::row(p.dlogits, p.dlogits_stride, index);
    const int64_t columns = Layout::columns(p.columns);
    for (int64_t column = 0; column < columns; column += 32)
        std::fill_n(dlogits + Layout::at(column), std::min<int64_t>(32, columns - column), typename R::T{});
}

template <class R, bool smoothed>
void finish(const CrossEntropyParams& p, const Statistics<smoothed, typename R::C>& statistics,
            int64_t index) {
    using C = typename R::C;
    const C row_max = statistics.row_max(), log_sum = statistics.log_sum();
    const R row(p, index);
    C loss = (row_max - row.z(load_one(row.at(p.targets[index])))) + log_sum;
    if constexpr (smoothed) {
        const C s = static_cast<C>(p.label_smoothing);
        loss = (C(1) - s) * loss + s * (log_sum - statistics.mean_below(p.columns));
    }
    if (p.z_loss != 0) {
        const C lse = row_max + log_sum;
        loss += static_cast<C>(p.z_loss) * lse * lse;
    }
    static_cast<C*>(p.loss)[index] = loss;
    static_cast<C*>(p.row_max)[index] = row_max;
    static_cast<C*>(p.log_sum)[index] = log_sum;
}

// body(start, end) of each block of columns.
template <class R, class Body>
void by_blocks(const CrossEntropyParams& p, const Body& body) {
    for (int64_t start = 0; start < p.columns; start += R::Layout::block)
        body(start, std::min(p.columns, start + R::Layout::block));
}

// Whether a row's loss counts.
inline bool counts(const CrossEntropyParams& p, int64_t index) {
    return index < p.rows && p.targets[index] != p.ignore_index;
}

template <class R>
void write_gradients(const CrossEntropyParams& p, int64_t first) {
    constexpr int64_t together = R::Layout::together;
    std::optional<Gradient<R>> gradients[together];
    for (int64_t r = 0; r < together; ++r)
        if (counts(p, first + r))
            gradients[r].emplace(p, R(p, first + r), first + r, p.targets[first + r]);
        else
            clear<R>(p, first + r);
    by_blocks<R>(p, [&](int64_t start, int64_t end) {
        for (const auto& gradient : gradients)
            if (gradient) gradient->write(start, end);
    });
}

// Rows from `first` on that are worked on together, block by block.
template <class R, bool smoothed>
void forward_rows(const CrossEntropyParams& p, int64_t first) {
    using C = typename R::C;
    constexpr int64_t together = R::Layout::together;
    Statistics<smoothed, C> statistics[together];
    by_blocks<R>(p, [&](int64_t start, int64_t end) {
        for (int64_t r = 0; r < together; ++r)
            if (counts(p, first + r)) statistics[r].add(R(p, first + r), start, end);
    });
    for (int64_t r = 0; r < together && first + r < p.rows; ++r)
        if (counts(p, first + r))
            finish<R>(p, statistics[r], first + r);
        else
            for (void* of_row : {p.loss, p.row_max, p.log_sum}) static_cast<C*>(of_row)[first + r] = C(0);
    if (p.dlogits != nullptr) write_gradients<R>(p, first);
}

// body(row type).
template <class Body>
void with_rows(const CrossEntropyParams& p, const Body& body) {
    with_type(static_cast<Dtype>(p.dtype), [&](auto type) {
        auto with_layout = [&](auto layout) {
            using Layout = typename decltype(layout)::type;
            if (p.softcap != 0)
                body(Type<Row<Layout, true>>{});
            else
                body(Type<Row<Layout, false>>{});
        };
        using T = typename decltype(type)::type;
#if defined(__AVX512BF16__)
        if (p.tiles) return with_layout(Type<TileRows>{});
#endif
        with_layout(Type<Rows<T>>{});
    });
}

// body(row) for the first of each rows that are worked on together.
template <class Layout, class Body>
void for_rows(const CrossEntropyParams& p, const Body& body) {
    const int64_t groups = ceil_div(Layout::rows(p.rows), Layout::together);
    const int64_t worth = ceil_div(p.rows * std::max<int64_t>(p.columns, 1), kTaskElements);
    parallel_ranges(groups, std::min(4 * p.threads, worth), p.threads, [&](int64_t begin, int64_t end) {
        for (int64_t group = begin; group < end; ++group) body(group * Layout::together);
    });
}

}  // namespace

void cross_entropy_forward(const CrossEntropyParams& p) {
    with_rows(p, [&](auto type) {
        using R = typename decltype(type)::type;
        if (p.label_smoothing != 0)
            for_rows<typename R::Layout>(p, [&](int64_t row) { forward_rows<R, true>(p, row); });
        else
            for_rows<typename R::Layout>(p, [&](int64_t row) { forward_rows<R, false>(p, row); });
    });
}

void cross_entropy_backward(const CrossEntropyParams& p) {
    with_rows(p, [&](auto type) {
        using R = typename decltype(type)::type;
        for_rows<typename R::Layout>(p, [&](int64_t row) { write_gradients<R>(p, row); });
    });
}

}  // namespace lmkern
