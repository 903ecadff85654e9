// Layer norm forward on the CPU: a row is read from memory once and from the cache twice more.
#include "layer_norm/common.hpp"
#include "layer_norm/cpu.hpp"

namespace lmkern {
namespace {

template <class T, class P>
void forward_row(const LayerNormParams& p, int64_t row) {
    using C = Compute<T>;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const P* weight = static_cast<const P*>(p.weight);
    const P* bias = static_cast<const P*>(p.bias);
    T* y = static_cast<T*>(p.y) + row * p.columns;

    const C columns = static_cast<C>(p.columns);
    const auto [total] = sums_over_row<C, 1>(p.columns, [&](auto at, auto add) { add(0, at(x)); });
    const C mean = total / columns;
    const auto [squares] = sums_over_row<C, 1>(p.columns, [&](auto at, auto add) {
        const Vector<C> centred = at.inside(at(x) - mean);
        add(0, centred * centred);
    });
    const C rstd = C(1) / std::sqrt(squares / columns + static_cast<C>(p.eps));
    static_cast<C*>(p.mean)[row] = mean;
    static_cast<C*>(p.rstd)[row] = rstd;
    for_row<C>(p.columns, [&](auto at) {
        Vector<C> result = (at(x) - mean) * rstd;
        if (weight != nullptr) result = result * at(weight);
        if (bias != nullptr) result = result + at(bias);
        at.store(y, result);
    });
}

}  // namespace

void layer_norm_forward(const LayerNormParams& p) {
    with_types(p, [&](auto type, auto parameter_type) {
        using T = typename decltype(type)::type;
        using P = typename decltype(parameter_type)::type;
        // A range of rows for each thread: two threads that write to one fresh page both wait for it.
        const int64_t tasks = std::min(p.threads, ceil_div(p.rows, kRowsPerTask));
        const int64_t rows_per_task = ceil_div(p.rows, std::max<int64_t>(tasks, 1));
        parallel_for(tasks, p.threads, [&](int64_t task) {
            const int64_t end = std::min(p.rows, (task + 1) * rows_per_task);
            for (int64_t row = task * rows_per_task; row < end; ++row) forward_row<T, P>(p, row);
        });
    });
}

}  // namespace lmkern
