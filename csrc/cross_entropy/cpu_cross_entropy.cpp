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
#include <type_traits>

#include "core/parallel_for.hpp"
#include "cross_entropy/cpu.hpp"
#include "simd/tanh.hpp"

namespace lmkern {
namespace {

// Elements worth a task: about 20 us of work.
constexpr int64_t kTaskElements = 32 * 1024;
// Elements of a row that are read twice, for their maximum and for their exponentials: half of the first
// cache.
constexpr int64_t kBlock = 4096;

// e^x for a result that is stored as T: half precision is content with a shorter series.
template <class T>
inline Vector<Compute<T>> exp_for(Vector<Compute<T>> x) {
    if constexpr (sizeof(T) == 2)
        return exp<float, 5>(x);  // 2.4e-6; the last place of float16 is 1e-3
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
template <class T, bool capped>
struct Row {
    using C = Compute<T>;
    const T* logits;
    int64_t columns;
    C softcap;

    Row(const CrossEntropyParams& p, int64_t row)
        : logits(static_cast<const T*>(p.logits) + row * p.logits_stride),
          columns(p.columns),
          softcap(static_cast<C>(p.softcap)) {}

    Vector<C> z(Vector<C> logit) const {
        if constexpr (capped)
            return tanh<C>(logit / softcap) * softcap;
        else
            return logit;
    }
    C z(C logit) const { return z(broadcast(logit))[0]; }
};

template <class C>
struct Statistics {
    C row_max, log_sum, mean;
};

// With `smoothed` the mean of z too. A block's exponentials are taken relative to the largest logit so
// far; sums start anew each block, so that rounding errors grow with the block and not with the row.
template <bool smoothed, class T, bool capped>
Statistics<Compute<T>> statistics(const Row<T, capped>& row) {
    using C = Compute<T>;
    constexpr int64_t lanes = kLanes<C>;
    constexpr C infinity = std::numeric_limits<C>::infinity();
    C row_max = -infinity, reference = 0, row_sum = 0, total = 0;
    for (int64_t start = 0; start < row.columns; start += kBlock) {
        const int64_t end = std::min(row.columns, start + kBlock);
        const int64_t rest = (end - start) % lanes, whole = end - rest;
        const T* logits = row.logits;

        constexpr int turns = 4;
        Vector<C> maxima[turns];
        for (auto& m : maxima) m = broadcast(-infinity);
        int64_t column = start;
        for (; column + turns * lanes <= whole; column += turns * lanes)
            for (int turn = 0; turn < turns; ++turn)
                maxima[turn] = max(maxima[turn], load(logits + column + turn * lanes));
        for (; column < whole; column += lanes) maxima[0] = max(maxima[0], load(logits + column));
        if (rest > 0) maxima[1] = max(maxima[1], first_lanes(load(logits + whole, rest), rest, -infinity));
        const C block_max = row.z(largest<C>(max(max(maxima[0], maxima[1]), max(maxima[2], maxima[3]))));
        if (!(block_max <= row_max)) {
            row_max = block_max;
            // As long as every logit is -inf, subtracting 0 keeps exp(-inf) = 0 and no NaN.
            const C next = row_max == -infinity ? C(0) : row_max;
            row_sum *= exp<C>(broadcast(std::min(reference - next, C(0))))[0];
            reference = next;
        }

        Vector<C> sums[turns] = {}, totals[turns] = {};
        auto add = [&](Vector<C> z, int turn) { sums[turn] += exp_for<T>(z - reference); };
        column = start;
        for (; column + turns * lanes <= whole; column += turns * lanes)
            for (int turn = 0; turn < turns; ++turn) {
                const Vector<C> z = row.z(load(logits + column + turn * lanes));
                add(z, turn);
                if constexpr (smoothed) totals[turn] += z;
            }
        for (; column < whole; column += lanes) {
            const Vector<C> z = row.z(load(logits + column));
            add(z, 0);
            if constexpr (smoothed) totals[0] += z;
        }
        if (rest > 0) {
            const Vector<C> z = row.z(load(logits + whole, rest));
            add(first_lanes(z, rest, -infinity), 1);
            if constexpr (smoothed) totals[1] += first_lanes(z, rest, C(0));
        }
        row_sum += sum<C>((sums[0] + sums[1]) + (sums[2] + sums[3]));
        if constexpr (smoothed) total += sum<C>((totals[0] + totals[1]) + (totals[2] + totals[3]));
    }
    return {reference, std::log(row_sum), total / static_cast<C>(row.columns)};
}

template <class T, bool capped>
void gradient(const CrossEntropyParams& p, const Row<T, capped>& row, int64_t target, Compute<T> row_max,
              Compute<T> log_sum, Compute<T> dloss, T* dlogits) {
    using C = Compute<T>;
    constexpr int64_t lanes = kLanes<C>;
    const C smoothing = static_cast<C>(p.label_smoothing);
    const C factor = dloss * (C(1) + C(2) * static_cast<C>(p.z_loss) * (row_max + log_sum));
    const C uniform = dloss * smoothing / static_cast<C>(row.columns);
    auto at = [&](Vector<C> logit, C less) {
        if constexpr (capped) {
            const Vector<C> t = tanh<C>(logit / row.softcap);
            return (exp_for<T>((t * row.softcap - row_max) - log_sum) * factor - less) * (C(1) - t * t);
        } else {
            return exp_for<T>((logit - row_max) - log_sum) * factor - less;
        }
    };
    // Before the logits are overwritten, if they are.
    const C hit = at(broadcast(load_one(row.logits + target)), uniform + dloss * (C(1) - smoothing))[0];
    int64_t column = 0;
    for (; column + lanes <= row.columns; column += lanes)
        store(dlogits + column, at(load(row.logits + column), uniform));
    if (const int64_t rest = row.columns - column; rest > 0)
        store(dlogits + column, at(load(row.logits + column, rest), uniform), rest);
    store_one(dlogits + target, hit);
}

template <class T, bool capped, bool smoothed>
void forward_row(const CrossEntropyParams& p, int64_t index) {
    using C = Compute<T>;
    const Row<T, capped> row(p, index);
    C& loss = static_cast<C*>(p.loss)[index];
    C& row_max = static_cast<C*>(p.row_max)[index];
    C& log_sum = static_cast<C*>(p.log_sum)[index];
    T* dlogits = p.dlogits == nullptr ? nullptr : static_cast<T*>(p.dlogits) + index * p.dlogits_stride;
    const int64_t target = p.targets[index];
    if (target == p.ignore_index) {
        loss = row_max = log_sum = C(0);
        if (dlogits != nullptr) std::fill_n(dlogits, p.columns, T{});
        return;
    }
    const auto of_row = statistics<smoothed>(row);
    row_max = of_row.row_max;
    log_sum = of_row.log_sum;
    loss = (row_max - row.z(load_one(row.logits + target))) + log_sum;
    if constexpr (smoothed) {
        const C s = static_cast<C>(p.label_smoothing);
        loss = (C(1) - s) * loss + s * ((row_max - of_row.mean) + log_sum);
    }
    if (p.z_loss != 0) {
        const C lse = row_max + log_sum;
        loss += static_cast<C>(p.z_loss) * lse * lse;
    }
    if (dlogits == nullptr) return;
    gradient(p, row, target, row_max, log_sum, static_cast<const C*>(p.dloss)[index * p.dloss_stride],
             dlogits);
}

template <class T, bool capped>
void backward_row(const CrossEntropyParams& p, int64_t index) {
    using C = Compute<T>;
    T* dlogits = static_cast<T*>(p.dlogits) + index * p.dlogits_stride;
    const int64_t target = p.targets[index];
    if (target == p.ignore_index) {
        std::fill_n(dlogits, p.columns, T{});
        return;
    }
    gradient(p, Row<T, capped>(p, index), target, static_cast<const C*>(p.row_max)[index],
             static_cast<const C*>(p.log_sum)[index], static_cast<const C*>(p.dloss)[index * p.dloss_stride],
             dlogits);
}

// body(type, std::bool_constant<capped>{}).
template <class Body>
void with_type_and_cap(const CrossEntropyParams& p, const Body& body) {
    with_type(static_cast<Dtype>(p.dtype), [&](auto type) {
        if (p.softcap != 0)
            body(type, std::true_type{});
        else
            body(type, std::false_type{});
    });
}

// A range of neighbouring rows for each task.
template <class Body>
void for_rows(const CrossEntropyParams& p, const Body& body) {
    const int64_t worth = ceil_div(p.rows * std::max<int64_t>(p.columns, 1), kTaskElements);
    const int64_t tasks = std::max<int64_t>(std::min({4 * p.threads, p.rows, worth}), 1);
    const int64_t rows_per_task = ceil_div(p.rows, tasks);
    parallel_for(tasks, p.threads, [&](int64_t task) {
        const int64_t end = std::min(p.rows, (task + 1) * rows_per_task);
        for (int64_t row = task * rows_per_task; row < end; ++row) body(row);
    });
}

}  // namespace

void cross_entropy_forward(const CrossEntropyParams& p) {
    with_type_and_cap(p, [&](auto type, auto capped) {
        using T = typename decltype(type)::type;
        if (p.label_smoothing != 0)
            for_rows(p, [&](int64_t row) { forward_row<T, decltype(capped)::value, true>(p, row); });
        else
            for_rows(p, [&](int64_t row) { forward_row<T, decltype(capped)::value, false>(p, row); });
    });
}

void cross_entropy_backward(const CrossEntropyParams& p) {
    with_type_and_cap(p, [&](auto type, auto capped) {
        using T = typename decltype(type)::type;
        for_rows(p, [&](int64_t row) { backward_row<T, decltype(capped)::value>(p, row); });
    });
}

}  // namespace lmkern
