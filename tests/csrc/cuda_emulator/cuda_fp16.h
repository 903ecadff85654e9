#pragma once
#include <immintrin.h>

struct __half {
    unsigned short bits;
};
inline __half __ushort_as_half(unsigned short bits) {
    return {bits};
}
inline unsigned short __half_as_ushort(__half x) {
    return x.bits;
}
inline float __half2float(__half x) {
    return _cvtsh_ss(x.bits);
}
inline __half __float2half_rn(float x) {
    return {_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)};
}
struct __half2 {
    __half x, y;
};
inline __half2 __floats2half2_rn(float low, float high) {
    return {__float2half_rn(low), __float2half_rn(high)};
}
