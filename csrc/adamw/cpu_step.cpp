// AdamW on the CPU: one pass, which reads 4 and writes 3 elements for each of the parameter
// (docs/kernels/adamw.md).
#include <algorithm>

#include "adamw/cpu.hpp"
#include "core/parallel_for.hpp"
#include "simd/elementary.hpp"
#include "simd/row.hpp"

namespace lmkern {
namespace {

// A multiple of every vector; fewer elements are not worth another thread.
constexpr int64_t kChunk = 16384;

template <class P, class G>
void step_range(const AdamwParams& p, int64_t first, int64_t count) {
    using C = Compute<P>;
    P* param = static_cast<P*>(p.param) + first;
    const G* grad = static_cast<const G*>(p.grad) + first;
    C* exp_avg = static_cast<C*>(p.exp_avg) + first;
    C* exp_avg_sq = static_cast<C*>(p.exp_avg_sq) + first;
    bfloat16* copy = p.copy == nullptr ? nullptr : static_cast<bfloat16*>(p.copy) + first;
    const C decay = static_cast<C>(p.decay), grad_scale = static_cast<C>(p.grad_scale);
    const C one_minus_beta1 = static_cast<C>(p.one_minus_beta1), eps = static_cast<C>(p.eps);
    const C beta2 = static_cast<C>(p.beta2), one_minus_beta2 = static_cast<C>(1.0 - p.beta2);
    const C step_size = static_cast<C>(p.step_size);
    const C root_scale = static_cast<C>(1.0 / p.second_correction);

    for_row<C>(count, [&](auto at) {
        const Vector<C> g = at(grad) * grad_scale;
        const Vector<C> m = at(exp_avg) + one_minus_beta1 * (g - at(exp_avg));
        const Vector<C> v = at(exp_avg_sq) * beta2 + (one_minus_beta2 * g) * g;
        const Vector<C> updated = at(param) * decay - step_size * m / (sqrt(v) * root_scale + eps);
        at.store(exp_avg, m);
        at.store(exp_avg_sq, v);
        at.store(param, updated);
        if constexpr (sizeof(C) == 4)
            if (copy != nullptr) at.store(copy, updated);
    });
}

// body(type of param, type of grad): float64 with its own kind, the others in any pair.
template <class Body>
void with_types(const AdamwParams& p, const Body& body) {
    with_type(static_cast<Dtype>(p.param_dtype), [&](auto param_type) {
        if constexpr (sizeof(typename decltype(param_type)::type) == 8)
            body(param_type, param_type);
        else
            with_any_type(static_cast<Dtype>(p.grad_dtype), [&](auto grad_type) {
                if constexpr (sizeof(typename decltype(grad_type)::type) == 8)
                    throw std::invalid_argument("adamw: a float64 gradient needs a float64 parameter");
                else
                    body(param_type, grad_type);
            });
    });
}

}  // namespace

void adamw_step(const AdamwParams& p) {
    with_types(p, [&](auto param_type, auto grad_type) {
        using P = typename decltype(param_type)::type;
        using G = typename decltype(grad_type)::type;
        parallel_ranges(ceil_div(p.count, kChunk), p.threads, p.threads, [&](int64_t begin, int64_t end) {
            step_range<P, G>(p, begin * kChunk, std::min(end * kChunk, p.count) - begin * kChunk);
        });
    });
}

}  // namespace lmkern
