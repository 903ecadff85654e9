// Activations backward on the CPU, from the input alone (docs/kernels/activation.md):
//
//     dx = dy f'(x + bias), or dgate = dy value f'(gate) and dvalue = dy f(gate)
//     dbias = sum over the rows of dx
//
// dbias is summed chunk by chunk of rows, the chunks fixed by the shape alone, then over the chunks in order:
// the result does not depend on the threads.
#include <algorithm>

#include "activation/cpu.hpp"
#include "activation/functions.hpp"
#include "core/parallel_for.hpp"

namespace lmkern {
namespace {

// Chunks whose sums are added before they join the others: sums of sums have smaller errors than long ones.
constexpr int64_t kChunksTogether = 8;

// Writes the row's dx if that is wanted, and adds it to dbias if that is.
template <class T, class F>
[[gnu::flatten]] void backward_row(const ActivationParams& p, int64_t row, Compute<T>* dbias) {
    using C = Compute<T>;
    const bool gated = p.gated != 0;
    const int64_t width = gated ? 2 * p.columns : p.columns;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* dy = static_cast<const T*>(p.dy) + row * p.dy_stride;
    const C* bias = static_cast<const C*>(p.bias);
    T* dx = p.dx == nullptr ? nullptr : static_cast<T*>(p.dx) + row * width;

    auto put = [&](auto at, int64_t half, Vector<C> gradient) {
        if (dx != nullptr) at.store(dx + half, gradient);
        if (dbias != nullptr) at.store(dbias + half, at(dbias + half) + gradient);
    };
    for_row<C>(p.columns, [&](auto at) {
        const Vector<C> dy_here = at(dy);
        Vector<C> gate = at(x);
        if (bias != nullptr) gate += at(bias);
        const ValueAndSlope<C> f = F::template at<T>(gate);
        if (gated) {
            Vector<C> value = at(x + p.columns);
            if (bias != nullptr) value += at(bias + p.columns);
            put(at, 0, dy_here * value * f.slope);
            put(at, p.columns, dy_here * f.value);
        } else {
            put(at, 0, dy_here * f.slope);
        }
    });
}

}  // namespace

void activation_backward(const ActivationParams& p) {
    with_type(static_cast<Dtype>(p.dtype), [&](auto type) {
        using T = typename decltype(type)::type;
        using C = Compute<T>;
        with_function(p, [&](auto function) {
            const int64_t width = p.gated != 0 ? 2 * p.columns : p.columns;
            const int64_t rows_per_chunk = ceil_div(p.rows, p.chunks);
            auto run_chunk = [&](int64_t chunk) {
                C* sums = p.dbias == nullptr ? nullptr : static_cast<C*>(p.partials) + chunk * width;
                if (sums != nullptr) std::fill_n(sums, width, C(0));
                const int64_t end = std::min(p.rows, (chunk + 1) * rows_per_chunk);
                for (int64_t row = chunk * rows_per_chunk; row < end; ++row)
                    backward_row<T, decltype(function)>(p, row, sums);
            };
            parallel_ranges(p.chunks, p.threads, p.threads, [&](int64_t begin, int64_t end) {
                for (int64_t chunk = begin; chunk < end; ++chunk) run_chunk(chunk);
            });
            if (p.dbias == nullptr) return;
            const C* partials = static_cast<const C*>(p.partials);
            for_row<C>(width, [&](auto at) {
                Vector<C> total{};
                for (int64_t first = 0; first < p.chunks; first += kChunksTogether) {
                    Vector<C> sum = at(partials + first * width);
                    const int64_t end = std::min(first + kChunksTogether, p.chunks);
                    for (int64_t chunk = first + 1; chunk < end; ++chunk) sum += at(partials + chunk * width);
                    total += sum;
                }
                at.store(static_cast<C*>(p.dbias), total);
            });
        });
    });
}

}  // namespace lmkern
