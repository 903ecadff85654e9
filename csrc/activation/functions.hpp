// The functions f of the activations, each with its derivative (docs/kernels/activation.md), and the choice
// among them at compile time.
#pragma once

#include "activation/params.hpp"
#include "simd/elementary.hpp"
#include "simd/row.hpp"

namespace lmkern {

template <class C>
struct ValueAndSlope {
    Vector<C> value, slope;
};

// x P(X <= x), X standard normal. Hendrycks and Gimpel 2016, arXiv:1606.08415. Of x > 0 it is x less what
// the tail takes, of x < 0 the tail alone: small values keep their digits.
struct Gelu {
    template <class T, class C = Compute<T>>
    static ValueAndSlope<C> at(Vector<C> x) {
        constexpr C density = C(0.39894228040143267794);  // 1 / sqrt(2 pi)
        const NormalTail<C> n = normal_tail<T>(x);
        const Vector<C> below = x < C(0) ? n.tail : C(1) - n.tail;
        // The tail of an infinity is 0, and the product with it is NaN where the limit is 0.
        const Vector<C> lost = min(broadcast(C(40)), abs<C>(x)) * n.tail;
        return {(x < C(0) ? Vector<C>{} : x) - lost, below + x * n.kernel * density};
    }
};

// x (1 + tanh(u)) / 2 = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanh {
    template <class T, class C = Compute<T>>
    static ValueAndSlope<C> at(Vector<C> x) {
        constexpr C scale = C(1.59576912160573071176), cube = C(0.044715);  // 2 sqrt(2 / pi)
        const Vector<C> square = x * x;
        const Sigmoid<C> s = sigmoid<T>(x * (square * (scale * cube) + scale));
        // Beyond 40 the slope of the sigmoid is 0, and what it is multiplied by must not be infinite.
        const Vector<C> bounded = min(broadcast(C(40)), max(broadcast(C(-40)), x));
        const Vector<C> inner = bounded * bounded * (3 * scale * cube) + scale;  // d(2 u) / dx
        return {x * s.value, s.value + bounded * inner * s.slope};
    }
};

// x sigmoid(x).
struct Silu {
    template <class T, class C = Compute<T>>
    static ValueAndSlope<C> at(Vector<C> x) {
        const Sigmoid<C> s = sigmoid<T>(x);
        return {x * s.value, s.value + x * s.slope};
    }
};

// max(x, 0); NaN stays NaN.
struct Relu {
    template <class T, class C = Compute<T>>
    static ValueAndSlope<C> at(Vector<C> x) {
        return {x < C(0) ? Vector<C>{} : x, x <= C(0) ? Vector<C>{} : broadcast(C(1))};
    }
};

// max(x, 0)^2. So et al. 2021, arXiv:2109.08668.
struct ReluSquared {
    template <class T, class C = Compute<T>>
    static ValueAndSlope<C> at(Vector<C> x) {
        const Vector<C> positive = x < C(0) ? Vector<C>{} : x;
        return {positive * positive, positive * C(2)};
    }
};

// body(the function).
template <class Body>
void with_function(const ActivationParams& p, const Body& body) {
    switch (static_cast<Function>(p.function)) {
        case Function::gelu: return body(Gelu{});
        case Function::gelu_tanh: return body(GeluTanh{});
        case Function::silu: return body(Silu{});
        case Function::relu: return body(Relu{});
        case Function::relu_squared: return body(ReluSquared{});
    }
    throw std::invalid_argument("lmkern: unknown activation code");
}

}  // namespace lmkern
