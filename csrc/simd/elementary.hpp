// Elementary functions over vectors, each to the accuracy that the stored type T can hold: results for 16-bit
// types stop at errors of 3e-5, an eighth of float16's half unit. float64 is the C library's or Taylor's.
#pragma once

#include <cmath>
#include <type_traits>

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
    return bit_cast<Vector<float>>(_mm512_maskz_sqrt_ps(0xffff, bit_cast<__m512>(x)));
#elif defined(__AVX2__)
    return bit_cast<Vector<float>>(_mm256_sqrt_ps(bit_cast<__m256>(x)));
#else
    for (int lane = 0; lane < kLanes<float>; ++lane) x[lane] = std::sqrt(x[lane]);
    return x;
#endif
}

inline Vector<double> sqrt(Vector<double> x) {
#if defined(__AVX512F__)
    return bit_cast<Vector<double>>(_mm512_maskz_sqrt_pd(0xff, bit_cast<__m512d>(x)));
#elif defined(__AVX2__)
    return bit_cast<Vector<double>>(_mm256_sqrt_pd(bit_cast<__m256d>(x)));
#else
    for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::sqrt(x[lane]);
    return x;
#endif
}

// Constants of exp, by type. e^x = 2^n e^r with n = round(x / ln 2) and |r| <= ln 2 / 2, e^r by its Taylor
// series, whose remainder at that end is 0.3466^(degree + 1) / (degree + 1)!.
template <class C>
struct ExpConstants;
template <>
struct ExpConstants<float> {
    static constexpr int degree = 7;  // 5e-9
    // x + 1.5 * 2^23 has the integer nearest to x in its last bits.
    static constexpr float round_magic = 0x1.8p23f;
    static constexpr float ln2_high = 0x1.62e4p-1f;  // 15 bits: n * ln2_high is exact
    static constexpr float ln2_low = 0x1.7f7d1cp-20f;
    static constexpr int bias = 127, mantissa_bits = 23;
};
template <>
struct ExpConstants<double> {
    static constexpr int degree = 13;  // 4e-18
    static constexpr double round_magic = 0x1.8p52;
    static constexpr double ln2_high = 0x1.62e42fefp-1;
    static constexpr double ln2_low = 0x1.473de6af278edp-34;
    static constexpr int bias = 1023, mantissa_bits = 52;
};

template <class C, int term>
constexpr C inverse_factorial() {
    if constexpr (term <= 1)
        return C(1);
    else
        return inverse_factorial<C, term - 1>() / C(term);
}

// e^r less the terms of its series before `term`, divided by r^term.
template <class C, int term, int degree>
inline Vector<C> taylor(Vector<C> r) {
    if constexpr (term == degree)
        return broadcast(inverse_factorial<C, degree>());
    else
        return taylor<C, term + 1, degree>(r) * r + inverse_factorial<C, term>();
}

// e^x as scale e^r: a power of two, and |r| <= ln 2 / 2. Under 2^-bias the scale is 0.
template <class C>
struct SplitExp {
    Vector<C> scale, r;

    [[gnu::always_inline]] explicit SplitExp(Vector<C> x) {
        using K = ExpConstants<C>;
        constexpr C ln2 = C(0.693147180559945309417);
        x = max(broadcast(C(-K::bias) * ln2), x);
        const Vector<C> shifted = x * (C(1) / ln2) + K::round_magic;
        const Vector<C> n = shifted - K::round_magic;
        r = (x - n * K::ln2_high) - n * K::ln2_low;
        const Integers<C> exponent =
            bit_cast<Integers<C>>(shifted) - bit_cast<Integers<C>>(broadcast(K::round_magic));
        scale = bit_cast<Vector<C>>((exponent + K::bias) << K::mantissa_bits);
    }
};

// e^x for x <= 0 or little more (2^127 is the end). Results under 2^-126.5 are 0, so exp(-inf) = 0; NaN stays
// NaN.
template <class C, int degree = ExpConstants<C>::degree>
inline Vector<C> exp(Vector<C> x) {
    const SplitExp<C> split(x);
    return taylor<C, 0, degree>(split.r) * split.scale;
}

// The natural logarithm of x >= 0: -inf of 0, NaN of NaN, to a unit or two in the last place.
template <class C>
inline Vector<C> log(Vector<C> x) {
    if constexpr (sizeof(C) == 8) {
        for (int lane = 0; lane < kLanes<C>; ++lane) x[lane] = std::log(x[lane]);
        return x;
    } else {
        // x = m 2^e with m in [1/sqrt(2), sqrt(2)); log(m) = 2 artanh(s), s = (m - 1) / (m + 1).
        const Vector<int32_t> bits = bit_cast<Vector<int32_t>>(x);
        const Vector<int32_t> e = (bits - 0x3f3504f3) >> 23;
        const Vector<float> m = bit_cast<Vector<float>>(bits - (e << 23));
        const Vector<float> s = (m - 1.0f) / (m + 1.0f);
        const Vector<float> z = s * s;
        const Vector<float> p = (0x1.31e40ep-2f * z + 0x1.995ebp-2f) * z + 0x1.55557ap-1f;
        const Vector<float> n = __builtin_convertvector(e, Vector<float>);
        const Vector<float> result = n * 0x1.62e4p-1f + (n * 0x1.7f7d1cp-20f + (2.0f * s + s * z * p));
        constexpr float infinity = __builtin_inff();
        return x == 0.0f ? broadcast(-infinity) : (x < infinity ? result : x);
    }
}

// always_inline below: GCC calls a function of this size out of line, and its vectors go through memory.

template <class V>
inline V min(V a, V b) {
    return a < b ? a : b;
}
#if defined(__AVX2__) && !defined(__AVX512F__)
inline Vector<float> min(Vector<float> a, Vector<float> b) {
    return bit_cast<Vector<float>>(_mm256_min_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
}
#endif

// 2^r for |r| <= 1/2 by powers of r, and the normal distribution's tail by powers of t (below): coefficients
// that make the largest relative error the least.
struct ShortSeries {
    static constexpr float exp2[] = {0.9999992614f, 0.6931218147f, 0.2402474484f, 0.05591786028f,
                                     0.009570101433f};  // 3e-6
    static constexpr float c = 0.376f;
    static constexpr float tail[] = {0.14947758f, 0.15791395f, 0.08471160f, 0.19874431f,
                                     -0.09085729f};  // 3e-5
};
struct LongSeries {
    static constexpr float exp2[] = {1.0f,
                                     0.6931472057f,
                                     0.2402264689f,
                                     0.05550328777f,
                                     0.009618488959f,
                                     0.001339993122f,
                                     0.0001534581152f};  // 2e-9
    static constexpr float c = 0.264f;
    static constexpr float tail[] = {0.1053447488f, 0.1048060747f,  0.1027300920f,
                                     0.0586007583f, 0.1422694502f,  -0.1229712889f,
                                     0.2244788131f, -0.1460516303f, 0.0307929752f};  // 1.4e-8
};
template <class T>
using Series = std::conditional_t<sizeof(T) == 2, ShortSeries, LongSeries>;

// coefficients[0] + coefficients[1] x + ...
template <int terms>
[[gnu::always_inline]] inline Vector<float> polynomial(const float (&coefficients)[terms], Vector<float> x) {
    Vector<float> value = broadcast(coefficients[terms - 1]);
    for (int term = terms - 2; term >= 0; --term) value = value * x + coefficients[term];
    return value;
}

// 2^x to 2e-7, relative; x may be -inf (0) or NaN, and from 2^-126 down the result is 0.
[[gnu::always_inline]] inline Vector<float> exp2(Vector<float> x) {
    // The polynomial of degree 5 on [0, 1) with the smallest relative error, 8.2e-8, of those that give
    // exactly 1 for 0.
    constexpr float coefficients[] = {1.0f,           0x1.62e4bap-1f, 0x1.ebdb6ap-3f,
                                      0x1.c91c10p-5f, 0x1.277c1cp-7f, 0x1.e96910p-10f};
#if defined(__AVX512DQ__)
    const __m512 v = bit_cast<__m512>(x);
    // x - floor(x), and at the end times 2^floor(x).
    const Vector<float> r =
        bit_cast<Vector<float>>(_mm512_reduce_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    return bit_cast<Vector<float>>(_mm512_scalef_ps(bit_cast<__m512>(polynomial(coefficients, r)), v));
#else
    x = max(broadcast(-126.75f), x);                     // whose n below is -127, and the scale 0
    const Vector<float> shifted = x - 0.5f + 0x1.8p23f;  // the nearest integer to x - 1/2 in the last bits
    const Vector<float> r = x - (shifted - 0x1.8p23f);
    const Vector<int32_t> n = bit_cast<Vector<int32_t>>(shifted) - bit_cast<int32_t>(0x1.8p23f);
    return polynomial(coefficients, r) * bit_cast<Vector<float>>((n + 127) << 23);
#endif
}

#if defined(__AVX512F__)
// 2^(x factor) for x factor <= 0 and a factor over 0, the product not rounded; under 2^-126 it is 0.
template <class Series>
[[gnu::always_inline]] inline Vector<float> exp2_of_product(Vector<float> x, float factor) {
    // Of a huge product the rest below would be anything.
    x = max(broadcast(-200.0f / factor), x);
    const __m512 n = _mm512_maskz_roundscale_ps(0xffff, bit_cast<__m512>(x * factor),
                                                _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_fmsub_ps(bit_cast<__m512>(x), _mm512_set1_ps(factor), n);
    const Vector<float> fraction = polynomial(Series::exp2, bit_cast<Vector<float>>(rest));
    return bit_cast<Vector<float>>(_mm512_maskz_scalef_ps(0xffff, bit_cast<__m512>(fraction), n));
}
#endif

// 2^x for x <= 0; under 2^-126 it is 0.
template <class Series>
[[gnu::always_inline]] inline Vector<float> exp2(Vector<float> x) {
#if defined(__AVX512F__)
    return exp2_of_product<Series>(x, 1.0f);
#else
    using K = ExpConstants<float>;
    x = max(broadcast(-127.0f), x);
    const Vector<float> shifted = x + K::round_magic;
    const Integers<float> n =
        bit_cast<Integers<float>>(shifted) - bit_cast<Integers<float>>(broadcast(K::round_magic));
    const Vector<float> scale = bit_cast<Vector<float>>((n + K::bias) << K::mantissa_bits);
    return polynomial(Series::exp2, x - (shifted - K::round_magic)) * scale;
#endif
}

// 1 / x for 1 <= x < 2^100.
inline Vector<float> reciprocal(Vector<float> x) {
#if defined(__AVX512F__)
    // 14 bits, and Newton's step.
    const Vector<float> r = bit_cast<Vector<float>>(_mm512_maskz_rcp14_ps(0xffff, bit_cast<__m512>(x)));
    return r * (1.0f - x * r) + r;
#else
    return 1.0f / x;
#endif
}
inline Vector<double> reciprocal(Vector<double> x) {
    return 1.0 / x;
}

// e^(-x) for x >= 0, as good as T can hold.
template <class T>
[[gnu::always_inline]] inline Vector<Compute<T>> exp_of_negative(Vector<Compute<T>> x) {
    if constexpr (sizeof(T) == 8)
        return exp<double>(-x);
    else
        return exp2<Series<T>>(x * -1.44269504f);
}

template <class C>
struct Sigmoid {
    Vector<C> value;  // 1 / (1 + e^-x)
    Vector<C> slope;  // value (1 - value)
};

// With the exponential of -|x| nothing overflows, and the slope has no difference that cancels.
template <class T, class C = Compute<T>>
[[gnu::always_inline]] inline Sigmoid<C> sigmoid(Vector<C> x) {
    const Vector<C> e = exp_of_negative<T>(abs<C>(x));
    const Vector<C> r = reciprocal(e + C(1));
    return {x < C(0) ? e * r : r, e * r * r};
}

// The standard normal distribution beyond |x|.
template <class C>
struct NormalTail {
    Vector<C> kernel;  // e^(-x^2 / 2)
    Vector<C> tail;    // P(X > |x|)
};

// The tail is a power series under the kernel, which the derivative needs anyway:
//
//     P(X > |x|) = e^(-x^2 / 2) t (k0 + k1 t + k2 t^2 + ...),    t = 1 / (1 + c |x|)
//
// (the form of Abramowitz and Stegun 7.1.26). It keeps the tail's relative accuracy, which 1 - erf(x) loses.
template <class T, class C = Compute<T>>
[[gnu::always_inline]] inline NormalTail<C> normal_tail(Vector<C> x) {
    // Beyond 40 both are 0 in float64 too; an infinity would make 0 * infinity.
    const Vector<C> size = min(broadcast(C(40)), abs<C>(x));
    const Vector<C> kernel = exp_of_negative<T>(size * size * C(0.5));
    if constexpr (sizeof(T) == 8) {
        Vector<double> tail;
        for (int lane = 0; lane < kLanes<double>; ++lane)
            tail[lane] = 0.5 * std::erfc(size[lane] * 0.70710678118654752440);
        return {kernel, tail};
    } else {
        using S = Series<T>;
        const Vector<float> t = reciprocal(size * S::c + 1.0f);
        return {kernel, polynomial(S::tail, t) * (t * kernel)};
    }
}

}  // namespace lmkern
