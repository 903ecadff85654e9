// The norms forward on the CPU: a row is read from memory once, kept in the first cache as float32, and read
// from there twice more.
#include <cmath>

#include "norm/common.hpp"
#include "norm/cpu.hpp"

namespace lmkern {
namespace {

// A thread's scratch memory.
template <class C>
struct Scratch {
    C* weight;                  // (E,)
    C* bias;                    // (E,)
    C* rows[kRowsTogether];     // (E,) each
    C* factors[kRowsTogether];  // (E,) each: dropout

    explicit Scratch(const NormParams& p) {
        Workspace& workspace = Workspace::of_this_thread();
        const int64_t width = scratch_width(p);
        workspace.reserve(static_cast<size_t>((2 + 2 * kRowsTogether) * width) * sizeof(C));
        weight = workspace.take<C>(width);
        bias = workspace.take<C>(width);
        for (C*& row : rows) row = workspace.take<C>(width);
        for (C*& row : factors) row = workspace.take<C>(width);
        widen_parameter(p, p.weight, static_cast<C>(p.offset), C(1), weight);
        widen_parameter(p, p.bias, C(0), C(0), bias);
    }
};

template <class T, class S, bool centred, int rows>
void forward_rows(const NormParams& p, int64_t first, const Scratch<Compute<T>>& scratch) {
    using C = Compute<T>;
    const C columns = static_cast<C>(p.columns);
    const T* x[rows];
    T* y[rows];
    const S* residual[rows];
    S* h[rows];
    // What is normalised, as C: where it lies, or a copy.
    const C* wide[rows];
    for (int r = 0; r < rows; ++r) {
        x[r] = static_cast<const T*>(p.x) + (first + r) * p.x_stride;
        y[r] = static_cast<T*>(p.y) + (first + r) * p.columns;
        residual[r] = static_cast<const S*>(p.residual) + (first + r) * p.residual_stride;
        h[r] = static_cast<S*>(p.h) + (first + r) * p.columns;
    }

    const bool prefetched = is_prefetched<T>(p), y_streamed = is_streamed(p, y[0]),
               h_streamed = is_streamed(p, h[0]);

    // Sums of the rows that `source` reads, or writes, at `place`, or of their squares where that is all
    // there is to know.
    auto read = [&](auto place, bool streamed, auto source) {
        constexpr bool other_type = !std::is_same_v<std::decay_t<decltype(*place[0])>, C>;
        for (int r = 0; r < rows; ++r) {
            wide[r] = scratch.rows[r];
            if constexpr (!other_type)
                if (!streamed) wide[r] = place[r];
        }
        return sums_over_row<C, rows, 2>(p.columns, [&](auto at, auto add) {
            for (int r = 0; r < rows; ++r) {
                const Vector<C> v = source(at, r);
                if (other_type || streamed) at.store(scratch.rows[r], v);
                add(r, at.inside(centred ? v : v * v));
            }
        });
    };
    // h as it is stored: it is what backward reads.
    auto put_h = [&](auto at, int r, Vector<C> v) {
        put(at, h[r], v, h_streamed);
        return h_streamed ? rounded<S>(v) : at(h[r]);
    };
    std::array<C, rows> sums;
    if (p.residual == nullptr) {
        sums = read(x, false, [&](auto at, int r) { return at(x[r]); });
    } else if (p.keep_threshold == 0) {
        sums = read(h, h_streamed, [&](auto at, int r) { return put_h(at, r, at(residual[r]) + at(x[r])); });
    } else {
        for (int r = 0; r < rows; ++r) dropout_factors(p, first + r, scratch.factors[r]);
        sums = read(h, h_streamed, [&](auto at, int r) {
            return put_h(at, r, at(residual[r]) + at(x[r]) * at(scratch.factors[r]));
        });
    }

    C mean[rows], rstd[rows];
    if constexpr (centred) {
        for (int r = 0; r < rows; ++r) mean[r] = sums[r] / columns;
        // The sum of what lies off the mean is what the mean's rounding left, and corrects it and the
        // variance: rows that are nearly constant hold little else. Sums of 16-bit numbers are exact where it
        // matters.
        constexpr bool corrected = sizeof(S) > 2;
        constexpr int count = corrected ? 2 * rows : rows;
        const auto off_sums = sums_over_row<C, count, 2>(p.columns, [&](auto at, auto add) {
            for (int r = 0; r < rows; ++r) {
                const Vector<C> off = at.inside(at(wide[r]) - mean[r]);
                add(r, off * off);
                if constexpr (corrected) add(rows + r, off);
            }
        });
        for (int r = 0; r < rows; ++r) {
            sums[r] = off_sums[r];
            if constexpr (corrected) {
                const C off = off_sums[rows + r] / columns;
                mean[r] += off;
                sums[r] = std::max(sums[r] - off * off_sums[rows + r], C(0));
            }
        }
    }
    for (int r = 0; r < rows; ++r) {
        rstd[r] = C(1) / std::sqrt(sums[r] / columns + static_cast<C>(p.eps));
        if constexpr (centred) static_cast<C*>(p.mean)[first + r] = mean[r];
        static_cast<C*>(p.rstd)[first + r] = rstd[r];
    }
    const int64_t x_ahead = rows * p.x_stride, residual_ahead = rows * p.residual_stride;
    for_row_anew<C>(p.columns, [&](auto at) {
        const Vector<C> weight = at(scratch.weight);
        for (int r = 0; r < rows; ++r) {
            if (prefetched) at.prefetch(x[r] + x_ahead);
            if (prefetched && p.residual != nullptr) at.prefetch(residual[r] + residual_ahead);
            const Vector<C> off = centred ? at(wide[r]) - mean[r] : at(wide[r]);
            Vector<C> v = off * rstd[r] * weight;
            if constexpr (centred) v += at(scratch.bias);
            put(at, y[r], v, y_streamed);
        }
    });
}

}  // namespace

void norm_forward(const NormParams& p) {
    with_types(p, [&](auto type, auto residual_type, auto centred) {
        using T = typename decltype(type)::type;
        using S = typename decltype(residual_type)::type;
        const int64_t ranges = std::min(p.threads, ceil_div(p.rows, kRowsPerTask));
        parallel_ranges(p.rows, ranges, p.threads, [&](int64_t begin, int64_t end) {
            const Scratch<Compute<T>> scratch(p);
            for_rows(rows_together<T>(p, false), begin, end, [&](int64_t row, auto rows) {
                forward_rows<T, S, decltype(centred)::value, decltype(rows)::value>(p, row, scratch);
            });
        });
    });
}

}  // namespace lmkern
