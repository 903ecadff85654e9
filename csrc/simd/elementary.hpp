// Elementary functions over vectors, built on the exponential of vector.hpp.
#pragma once

#include "simd/vector.hpp"

namespace lmkern {

template <class C>
inline Vector<C> abs(Vector<C> x) {
    using I = typename IntegerOf<C>::type;
    constexpr I magnitude = sizeof(C) == 4 ? I(0x7fffffff) : I(0x7fffffffffffffff);
    return bit_cast<Vector<C>>(bit_cast<Integers<C>>(x) & magnitude);
}

inline Vector<float> sqrt(Vector<float> x) {
#if defined(__AVX512F__)
    return bit_cast<Vector<float>>(_mm512_sqrt_ps(bit_cast<__m512>(x)));
#elif defined(__AVX2__)
    return bit_cast<Vector<float>>(_mm256_sqrt_ps(bit_cast<__m256>(x)));
#else
    for (int lane = 0; lane < kLanes<float>; ++lane) x[lane] = std::sqrt(x[lane]);
    return x;
#endif
}

inline Vector<double> sqrt(Vector<double> x) {
#if defined(__AVX512F__)
    return bit_cast<Vector<double>>(_mm512_sqrt_pd(bit_cast<__m512d>(x)));
#elif defined(__AVX2__)
    return bit_cast<Vector<double>>(_mm256_sqrt_pd(bit_cast<__m256d>(x)));
#else
    for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::sqrt(x[lane]);
    return x;
#endif
}

template <class C>
struct Sigmoid {
    Vector<C> value;  // 1 / (1 + e^-x)
    Vector<C> slope;  // value (1 - value)
};

// With the exponential of -|x| nothing overflows, and the slope has no difference that cancels.
template <class C, int degree = ExpConstants<C>::degree>
inline Sigmoid<C> sigmoid(Vector<C> x) {
    const Vector<C> e = exp<C, degree>(-abs<C>(x));
    const Vector<C> r = C(1) / (e + C(1));
    return {x < C(0) ? e * r : r, e * r * r};
}

// The standard normal distribution at x: its density without 1 / sqrt(2 pi), and P(X <= x).
template <class C>
struct Normal {
    Vector<C> kernel;  // e^(-x^2 / 2)
    Vector<C> below;
};

// The tail is a power series in t = 1 / (1 + c |x|) under the kernel that is wanted anyway:
//
//     P(X <= -|x|) = e^(-x^2 / 2) t (k0 + k1 t + k2 t^2 + ...)
//
// (the form of Abramowitz and Stegun 7.1.26). c and k minimise the largest relative error over |x| <= 14,
// beyond which the kernel is 0 in float32. The tail keeps its relative accuracy, which 1 + erf(x) loses.
struct ShortTail {  // 3e-5: under a tenth of float16's half unit
    static constexpr int exp_degree = 5;
    static constexpr float c = 0.376f;
    static constexpr float k[] = {0.14947758f, 0.15791395f, 0.08471160f, 0.19874431f, -0.09085729f};
};
struct LongTail {  // 1.4e-8
    static constexpr int exp_degree = ExpConstants<float>::degree;
    static constexpr float c = 0.264f;
    static constexpr float k[] = {0.1053447488f,  0.1048060747f, 0.1027300920f,  0.0586007583f, 0.1422694502f,
                                  -0.1229712889f, 0.2244788131f, -0.1460516303f, 0.0307929752f};
};

template <class Tail>
inline Normal<float> normal(Vector<float> x) {
    const Vector<float> kernel = exp<float, Tail::exp_degree>(x * x * -0.5f);
    const Vector<float> t = 1.0f / (abs<float>(x) * Tail::c + 1.0f);
    constexpr int terms = sizeof(Tail::k) / sizeof(float);
    Vector<float> series = broadcast(Tail::k[terms - 1]);
    for (int term = terms - 2; term >= 0; --term) series = series * t + Tail::k[term];
    const Vector<float> tail = series * t * kernel;
    return {kernel, x > 0.0f ? 1.0f - tail : tail};
}

// float64 has no series here: the C library, lane by lane.
inline Normal<double> normal(Vector<double> x) {
    Vector<double> below;
    for (int lane = 0; lane < kLanes<double>; ++lane)
        below[lane] = 0.5 * std::erfc(x[lane] * -0.70710678118654752440);
    return {exp<double>(x * x * -0.5), below};
}

}  // namespace lmkern
