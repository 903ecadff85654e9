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

// With E = e^(-2 |x|), tanh |x| = (1 - E) / (1 + E): no overflow. Near 0 the terms of 1 - E would cancel, and
// E = 2^n e^r gives 1 - E = (1 - 2^n) - 2^n (e^r - 1), there with n = 0; elsewhere 1 - 2 E / (1 + E) has an
// error no larger than that of the last subtraction. NaN stays NaN.
template <class C>
inline Vector<C> tanh(Vector<C> x) {
    using K = ExpConstants<C>;
    constexpr C ln2 = C(0.693147180559945309417);
    const Vector<C> exponent = max(broadcast(C(-K::bias) * ln2), x < C(0) ? x + x : -(x + x));
    const Vector<C> shifted = exponent * (C(1) / ln2) + K::round_magic;
    const Vector<C> n = shifted - K::round_magic;
    const Vector<C> r = (exponent - n * K::ln2_high) - n * K::ln2_low;
    const Integers<C> n_bits =
        bit_cast<Integers<C>>(shifted) - bit_cast<Integers<C>>(broadcast(K::round_magic));
    const Vector<C> scale = bit_cast<Vector<C>>((n_bits + K::bias) << K::mantissa_bits);
    const Vector<C> less_one = taylor_less_one<C, 1, K::degree>(r) * r;  // e^r - 1
    const Vector<C> power = less_one * scale + scale;                    // E
    const Integers<C> small = exponent > C(-1);
    const Vector<C> ratio = (small ? (C(1) - scale) - less_one * scale : power + power) / (power + C(1));
    const Vector<C> magnitude = small ? ratio : C(1) - ratio;
    return x < C(0) ? -magnitude : magnitude;
}

}  // namespace lmkern
