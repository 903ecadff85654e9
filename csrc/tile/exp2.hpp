// 2^x by multiplications and additions.
#pragma once

#include <cstdint>

#include "tile/ptx.hpp"

namespace lmkern {

// 2^x for x < 128, to a relative 2.7e-6; 0 below -126.5, NaN of NaN. 2^x = 2^n 2^(x - n) with n the nearest
// integer, and a polynomial of least relative error (made by iterated least squares) on -1/2 to 1/2.
__device__ inline float exp2_by_polynomial(float x) {
    // A float of this size has no bits below 1, and its lowest are the exponent of 2^n.
    constexpr float kShift = 12582912.0f + 127.0f;
    x = ptx::max_nan(x, -127.0f);
    const float shifted = x + kShift, rest = x - (shifted - kShift);
    float y = 0.009570102f;
    y = y * rest + 0.05591786f;
    y = y * rest + 0.24024744f;
    y = y * rest + 0.6931218f;
    y = y * rest + 0.9999993f;
    return y * __uint_as_float(__float_as_uint(shifted) << 23);
}

}  // namespace lmkern
