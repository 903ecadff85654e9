// The element types of tensors, and the type each is computed in.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace lmkern {

// The upper half of a float32.
struct bfloat16 {
    uint16_t bits;
};

// IEEE 754 binary16.
struct float16 {
    uint16_t bits;
};

// The codes that Python sends (lmkern/kernels/cpu_call.py: DTYPE_CODES).
enum class Dtype : int64_t { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

// Compute<T>: what a stored T is loaded into, and what its sums are kept in.
template <class T>
struct ComputeOf {
    using type = float;
};
template <>
struct ComputeOf<double> {
    using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

template <class T>
struct Type {
    using type = T;
};

template <class T>
constexpr Dtype kDtype = Dtype::float32;
template <>
inline constexpr Dtype kDtype<bfloat16> = Dtype::bfloat16;
template <>
inline constexpr Dtype kDtype<float16> = Dtype::float16;
template <>
inline constexpr Dtype kDtype<double> = Dtype::float64;

// The types that this module computes in, as bits 1 << Dtype (CMakeLists.txt).
#if !defined(LMKERN_SERVED_TYPES)
#define LMKERN_SERVED_TYPES 15
#endif
constexpr int64_t kServedTypes = LMKERN_SERVED_TYPES;
constexpr bool serves(Dtype dtype) {
    return (kServedTypes >> static_cast<int64_t>(dtype) & 1) != 0;
}

// Turns the run-time dtype into a compile-time one: body(Type<float>{}) and so on.
template <class Body>
void with_any_type(Dtype dtype, Body&& body) {
    switch (dtype) {
        case Dtype::float32: return body(Type<float>{});
        case Dtype::bfloat16: return body(Type<bfloat16>{});
        case Dtype::float16: return body(Type<float16>{});
        case Dtype::float64: return body(Type<double>{});
    }
    throw std::invalid_argument("lmkern: unknown dtype code");
}

// The same for the type that an op computes in: only those that the module serves are compiled.
template <class Body>
void with_type(Dtype dtype, Body&& body) {
    with_any_type(dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        if constexpr (serves(kDtype<T>))
            body(type);
        else
            throw std::invalid_argument("lmkern: this module does not compute in that dtype");
    });
}

template <class To, class From>
inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes differ");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
inline int64_t round_up(int64_t n, int64_t step) {
    return ceil_div(n, step) * step;
}

}  // namespace lmkern
