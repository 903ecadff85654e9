// Activations forward on the CPU: y = f(x + bias), or f(gate) value with gate and value the halves of
// x + bias.
#include <algorithm>

#include "activation/cpu.hpp"
#include "activation/functions.hpp"
#include "core/parallel_for.hpp"

namespace lmkern {
namespace {

// Fewer elements than this are not worth another thread.
constexpr int64_t kElementsPerTask = 16384;

template <class T, class F>
[[gnu::flatten]] void forward_row(const ActivationParams& p, int64_t row) {
    using C = Compute<T>;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const C* bias = static_cast<const C*>(p.bias);
    const bool gated = p.gated != 0;
    T* y = static_cast<T*>(p.y) + row * p.columns;
    for_row<C>(p.columns, [&](auto at) {
        Vector<C> gate = at(x);
        if (bias != nullptr) gate += at(bias);
        Vector<C> result = F::template at<T>(gate).value;
        if (gated) {
            Vector<C> value = at(x + p.columns);
            if (bias != nullptr) value += at(bias + p.columns);
            result *= value;
        }
        at.store(y, result);
    });
}

}  // namespace

void activation_forward(const ActivationParams& p) {
    with_type(static_cast<Dtype>(p.dtype), [&](auto type) {
        using T = typename decltype(type)::type;
        with_function(p, [&](auto function) {
            const int64_t ranges = std::min(p.threads, ceil_div(p.rows * p.columns, kElementsPerTask));
            parallel_ranges(p.rows, ranges, p.threads, [&](int64_t begin, int64_t end) {
                for (int64_t row = begin; row < end; ++row) forward_row<T, decltype(function)>(p, row);
            });
        });
    });
}

}  // namespace lmkern
