// The hyperbolic tangent of a vector.
#pragma once

#include "simd/vector.hpp"

namespace lmkern {

// (e^r - 1) / r by its Taylor series, to the degree that exp uses.
template <class C, int term, int degree>
inline Vector<C> taylor_less_one(Vector<C> r) {
    if constexpr (term == degree)
        return broadcast(inverse_factorial<C, degree>());
    else
        return taylor_less_one<C, term + 1, degree>(r) * r + inverse_factorial<C, term>();
}

// e^x - 1 for x <= 0, to a few units in its own last place, also where x is small.
//
// e^x = 2^n e^r, so e^x - 1 = 2^n (e^r - 1) + (2^n - 1): near 0, where the terms would cancel, n = 0.
template <class C>
inline Vector<C> exp_less_one(Vector<C> x) {
    using K = ExpConstants<C>;
    constexpr C ln2 = C(0.693147180559945309417);
    x = max(broadcast(C(-K::bias) * ln2), x);
    const Vector<C> shifted = x * (C(1) / ln2) + K::round_magic;
    const Vector<C> n = shifted - K::round_magic;
    const Vector<C> r = (x - n * K::ln2_high) - n * K::ln2_low;
    const Integers<C> exponent =
        bit_cast<Integers<C>>(shifted) - bit_cast<Integers<C>>(broadcast(K::round_magic));
    const Vector<C> scale = bit_cast<Vector<C>>((exponent + K::bias) << K::mantissa_bits);
    return taylor_less_one<C, 1, K::degree>(r) * r * scale + (scale - C(1));
}

// With d = e^(-2 |x|) - 1, tanh |x| = -d / (2 + d): no overflow, and full precision near 0. NaN stays NaN.
template <class C>
inline Vector<C> tanh(Vector<C> x) {
    const Vector<C> d = exp_less_one<C>(x < C(0) ? x + x : -(x + x));
    const Vector<C> magnitude = -d / (d + C(2));
    return x < C(0) ? -magnitude : magnitude;
}

}  // namespace lmkern
