// The norms backward on the CPU. With x_hat = (h - mean) rstd and g = dy weight (docs/kernels/layer_norm.md):
//
//     dresidual = rstd (g - mean(g) - x_hat mean(g x_hat)) + dh
//     dx = dresidual, times dropout's factors
//     dweight = sum over the rows of dy x_hat
//     dbias = sum over the rows of dy
//
// RMS norm is the same with mean = 0, and without mean(g) and dbias.
//
// dweight and dbias are summed chunk by chunk of rows, the chunks fixed by the shape alone, then over the
// chunks in order: the result does not depend on the threads.
#include "norm/common.hpp"
#include "norm/cpu.hpp"

namespace lmkern {
namespace {

// A thread's scratch memory.
template <class C>
struct Scratch {
    C* weight;                  // (E,)
    C* factors[kRowsTogether];  // (E,) each: dropout

    Scratch(const NormParams& p, bool in_pairs) {
        Workspace& workspace = Workspace::of_this_thread();
        const int64_t width = scratch_width(p);
        workspace.reserve(static_cast<size_t>((1 + kRowsTogether) * width) * sizeof(C));
        weight = workspace.take<C>(width);
        for (C*& row : factors) row = workspace.take<C>(width);
        C* in_order = in_pairs ? factors[0] : weight;
        widen_parameter(p, p.weight, static_cast<C>(p.offset), C(1), in_order);
        for (int64_t column = 0; in_pairs && column < p.columns; ++column)
            weight[place_in_pairs<C>(column)] = in_order[column];
    }
};

// Adds the rows' share to dweight and dbias, and writes their dx and dresidual if those are wanted.
template <class T, class S, bool centred, bool in_pairs, int rows>
void backward_rows(const NormParams& p, int64_t first, const Scratch<Compute<T>>& scratch,
                   Compute<T>* dweight, Compute<T>* dbias) {
    using C = Compute<T>;
    const C columns = static_cast<C>(p.columns);
    const C* const weight = scratch.weight;
    const S *h[rows], *dh[rows];
    const T* dy[rows];
    C mean[rows], rstd[rows];
    for (int r = 0; r < rows; ++r) {
        h[r] = static_cast<const S*>(p.h) + (first + r) * p.h_stride;
        dh[r] = p.dh == nullptr ? nullptr : static_cast<const S*>(p.dh) + (first + r) * p.dh_stride;
        dy[r] = static_cast<const T*>(p.dy) + (first + r) * p.dy_stride;
        mean[r] = centred ? static_cast<const C*>(p.mean)[first + r] : C(0);
        rstd[r] = static_cast<const C*>(p.rstd)[first + r];
    }
    auto x_hat = [&](auto at, int r) {
        return centred ? (at(h[r]) - mean[r]) * rstd[r] : at(h[r]) * rstd[r];
    };
    const bool prefetched = is_prefetched<T>(p), dh_prefetched = prefetched && p.dh != nullptr;
    const int64_t h_ahead = rows * p.h_stride, dy_ahead = rows * p.dy_stride, dh_ahead = rows * p.dh_stride;

    // g x_hat, then g. Neither is kept: to compute them again costs less than to store and load them.
    constexpr int sums_per_row = centred ? 2 : 1;
    auto sum_up = [&](auto at, auto add) {
        const auto weight_here = at(weight);
        auto dweight_here = at(dweight);
        decltype(dweight_here) dbias_here{};
        if constexpr (centred) dbias_here = at(dbias);
        if (dh_prefetched)
            for (int r = 0; r < rows; ++r) at.prefetch(dh[r] + dh_ahead);
#pragma GCC unroll 2
        for (int r = 0; r < rows; ++r) {
            const auto dy_all = at(dy[r]);
            const auto dy_here = at.inside(dy_all), g = at.inside(dy_all * weight_here);
            const auto x_hat_here = at.inside(x_hat(at, r));
            add(sums_per_row * r, g * x_hat_here);
            if constexpr (centred) add(sums_per_row * r + 1, g);
            dweight_here += dy_here * x_hat_here;
            dbias_here += dy_here;
        }
        at.store(dweight, dweight_here);
        if constexpr (centred) at.store(dbias, dbias_here);
    };
    const auto sums = sums_over_row<C, sums_per_row * rows, in_pairs ? 2 : 1, in_pairs>(p.columns, sum_up);
    if (p.dx == nullptr && p.dresidual == nullptr) return;

    C along[rows], level[rows];
    for (int r = 0; r < rows; ++r) {
        along[r] = sums[sums_per_row * r] / columns;
        level[r] = centred ? sums[sums_per_row * r + sums_per_row - 1] / columns : C(0);
    }
    auto gradient = [&](auto at, int r) {
        if (prefetched) {
            at.prefetch(h[r] + h_ahead);
            at.prefetch(dy[r] + dy_ahead);
        }
        const auto off = x_hat(at, r) * along[r];
        return (at(dy[r]) * at(weight) - (centred ? off + level[r] : off)) * rstd[r];
    };
    T* dx = static_cast<T*>(p.dx) + first * p.columns;
    const bool dx_streamed = is_streamed(p, dx);
    if (p.dresidual == nullptr && p.dh == nullptr && p.keep_threshold == 0) {
        for_row_anew<C, in_pairs>(p.columns, [&](auto at) {
#pragma GCC unroll 2
            for (int r = 0; r < rows; ++r) put(at, dx + r * p.columns, gradient(at, r), dx_streamed);
        });
        return;
    }
    S* dresidual = static_cast<S*>(p.dresidual) + first * p.columns;
    const bool dresidual_streamed = is_streamed(p, dresidual);
    const bool with_dh = p.dh != nullptr, with_dresidual = p.dresidual != nullptr, with_dx = p.dx != nullptr;
    const bool dropped = !in_pairs && p.keep_threshold != 0 && with_dx;
    for (int r = 0; dropped && r < rows; ++r) dropout_factors(p, first + r, scratch.factors[r]);
    for_row_anew<C, in_pairs>(p.columns, [&](auto at) {
#pragma GCC unroll 2
        for (int r = 0; r < rows; ++r) {
            auto v = gradient(at, r);
            if (with_dh) v += at(dh[r]);
            if (with_dresidual) put(at, dresidual + r * p.columns, v, dresidual_streamed);
            if constexpr (!in_pairs)
                if (dropped) v *= at(scratch.factors[r]);
            if (with_dx) put(at, dx + r * p.columns, v, dx_streamed);
        }
    });
}

// Chunks whose sums are added before they join the others: sums of sums have smaller errors than long ones.
constexpr int64_t kChunksTogether = 8;

// out[e] = the sum over chunks of partials[chunk][which][e]: some chunks after the others, as they lie in
// memory, while the sums stay in the first cache, in the place of the first chunk.
template <class C>
void sum_chunks(const NormParams& p, int64_t which, bool in_pairs, void* out) {
    C* total = static_cast<C*>(p.partials) + which * p.columns;
    for (int64_t first = 0; first < p.chunks; first += kChunksTogether) {
        const int64_t chunks = std::min(kChunksTogether, p.chunks - first);
        const C* partial = static_cast<const C*>(p.partials) + (2 * first + which) * p.columns;
        for_row<C>(p.columns, [&](auto at) {
            Vector<C> sum = at(partial);
            for (int64_t chunk = 1; chunk < chunks; ++chunk) sum += at(partial + 2 * chunk * p.columns);
            at.store(total, first == 0 ? sum : at(total) + sum);
        });
    }
    for (int64_t column = 0; column < p.columns; ++column)
        static_cast<C*>(out)[column] = total[in_pairs ? place_in_pairs<C>(column) : column];
}

}  // namespace

void norm_backward(const NormParams& p) {
    with_types(p, [&](auto type, auto residual_type, auto centred) {
        using T = typename decltype(type)::type;
        using S = typename decltype(residual_type)::type;
        using C = Compute<T>;
        // Dropout's factors come in order.
        constexpr bool pairs_exist = std::is_same_v<T, bfloat16> && std::is_same_v<S, bfloat16>;
        const bool in_pairs = pairs_exist && p.columns % (2 * kLanes<C>) == 0 && p.keep_threshold == 0;
        const int64_t rows_per_chunk = ceil_div(p.rows, p.chunks);
        parallel_ranges(p.chunks, p.threads, p.threads, [&](int64_t begin, int64_t end) {
            const Scratch<C> scratch(p, in_pairs);
            for (int64_t chunk = begin; chunk < end; ++chunk) {
                C* dweight = static_cast<C*>(p.partials) + chunk * 2 * p.columns;
                C* dbias = dweight + p.columns;
                std::fill_n(dweight, 2 * p.columns, C(0));
                for_rows(rows_together<T>(p, true), chunk * rows_per_chunk,
                         std::min(p.rows, (chunk + 1) * rows_per_chunk), [&](int64_t row, auto rows) {
                             constexpr bool with_mean = decltype(centred)::value;
                             constexpr int count = decltype(rows)::value;
                             if constexpr (pairs_exist)
                                 if (in_pairs)
                                     return backward_rows<T, S, with_mean, true, count>(p, row, scratch,
                                                                                        dweight, dbias);
                             backward_rows<T, S, with_mean, false, count>(p, row, scratch, dweight, dbias);
                         });
            }
        });
        if (p.dweight != nullptr) sum_chunks<C>(p, 0, in_pairs, p.dweight);
        if (p.dbias != nullptr) sum_chunks<C>(p, 1, in_pairs, p.dbias);
    });
}

}  // namespace lmkern
