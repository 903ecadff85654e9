// The hyperbolic tangent of a vector.
#pragma once

#include "simd/elementary.hpp"

namespace lmkern {

// With E = e^(-2 |x|), tanh |x| = (1 - E) / (1 + E): no overflow. Near 0 the terms of 1 - E would cancel, and
// E = 2^n e^r gives 1 - E = (1 - 2^n) - 2^n (e^r - 1), there with n = 0; elsewhere 1 - 2 E / (1 + E) has an
// error no larger than that of the last subtraction. NaN stays NaN.
template <class C>
inline Vector<C> tanh(Vector<C> x) {
    const Vector<C> exponent = x < C(0) ? x + x : -(x + x);
    const auto [scale, r] = SplitExp<C>(exponent);
    const Vector<C> less_one = taylor<C, 1, ExpConstants<C>::degree>(r) * r;  // e^r - 1
    const Vector<C> power = less_one * scale + scale;                         // E
    const Integers<C> small = exponent > C(-1);
    const Vector<C> ratio = (small ? (C(1) - scale) - less_one * scale : power + power) / (power + C(1));
    const Vector<C> magnitude = small ? ratio : C(1) - ratio;
    return x < C(0) ? -magnitude : magnitude;
}

}  // namespace lmkern
