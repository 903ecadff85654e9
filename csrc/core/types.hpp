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

// Turns the run-time dtype into a compile-time one: body(Type<float>{}) and so on.
template <class Body>
void with_type(Dtype dtype, Body&& body) {
    switch (dtype) {
        case Dtype::float32: return body(Type<float>{});
        case Dtype::bfloat16: return body(Type<bfloat16>{});
        case Dtype::float16: return body(Type<float16>{});
        case Dtype::float64: return body(Type<double>{});
    }
    throw std::invalid_argument("lmkern: unknown dtype code");
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

}  // namespace lmkern
