// Layer norm backward on the CPU. With x_hat = (x - mean) rstd and g = dy weight
// (docs/kernels/layer_norm.md):
//
//     dx = rstd (g - mean(g) - x_hat mean(g x_hat))
//     dweight = sum over the rows of dy x_hat
//     dbias = sum over the rows of dy
//
// dweight and dbias are summed chunk by chunk of rows, the chunks fixed by the shape alone, then over the
// chunks in order: the result does not depend on the threads.
#include "layer_norm/common.hpp"
#include "layer_norm/cpu.hpp"

namespace lmkern {
namespace {

// Adds the row's share to dweight and dbias, and writes its dx if that is wanted.
template <class T, class P>
void backward_row(const LayerNormParams& p, int64_t row, Compute<T>* dweight, Compute<T>* dbias) {
    using C = Compute<T>;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* dy = static_cast<const T*>(p.dy) + row * p.dy_stride;
    const P* weight = static_cast<const P*>(p.weight);
    const C mean = static_cast<const C*>(p.mean)[row], rstd = static_cast<const C*>(p.rstd)[row];
    const C columns = static_cast<C>(p.columns);

    const auto [g_sum, along_sum] = sums_over_row<C, 2>(p.columns, [&](auto at, auto add) {
        const Vector<C> dy_here = at(dy);
        const Vector<C> x_hat = at.inside((at(x) - mean) * rstd);
        const Vector<C> g = weight == nullptr ? dy_here : dy_here * at(weight);
        add(0, g);
        add(1, g * x_hat);
        at.store(dweight, at(dweight) + dy_here * x_hat);
        at.store(dbias, at(dbias) + dy_here);
    });
    if (p.dx == nullptr) return;
    T* dx = static_cast<T*>(p.dx) + row * p.columns;
    const C g_mean = g_sum / columns, along = along_sum / columns;
    for_row<C>(p.columns, [&](auto at) {
        const Vector<C> g = weight == nullptr ? at(dy) : at(dy) * at(weight);
        at.store(dx, (g - g_mean - (at(x) - mean) * (rstd * along)) * rstd);
    });
}

// out[e] = the sum over chunks of partials[chunk][which][e].
template <class C>
void sum_chunks(const LayerNormParams& p, int64_t which, void* out) {
    const C* partials = static_cast<const C*>(p.partials) + which * p.columns;
    for_row<C>(p.columns, [&](auto at) {
        Vector<C> total{};
        for (int64_t chunk = 0; chunk < p.chunks; ++chunk) total += at(partials + chunk * 2 * p.columns);
        at.store(static_cast<C*>(out), total);
    });
}

}  // namespace

void layer_norm_backward(const LayerNormParams& p) {
    with_types(p, [&](auto type, auto parameter_type) {
        using T = typename decltype(type)::type;
        using P = typename decltype(parameter_type)::type;
        using C = Compute<T>;
        const int64_t rows_per_chunk = ceil_div(p.rows, p.chunks);
        // Neighbouring chunks go to one thread: two threads that write to one fresh page both wait for it.
        const int64_t tasks = std::min(p.threads, p.chunks), chunks_per_task = ceil_div(p.chunks, tasks);
        auto sum_chunk = [&](int64_t chunk) {
            C* sums = static_cast<C*>(p.partials) + chunk * 2 * p.columns;
            std::fill_n(sums, 2 * p.columns, C(0));
            const int64_t end = std::min(p.rows, (chunk + 1) * rows_per_chunk);
            for (int64_t row = chunk * rows_per_chunk; row < end; ++row)
                backward_row<T, P>(p, row, sums, sums + p.columns);
        };
        parallel_for(tasks, p.threads, [&](int64_t task) {
            const int64_t end = std::min(p.chunks, (task + 1) * chunks_per_task);
            for (int64_t chunk = task * chunks_per_task; chunk < end; ++chunk) sum_chunk(chunk);
        });
        if (p.dweight != nullptr) sum_chunks<C>(p, 0, p.dweight);
        if (p.dbias != nullptr) sum_chunks<C>(p, 1, p.dbias);
    });
}

}  // namespace lmkern
