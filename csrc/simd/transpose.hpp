// Transposing a square block of as many rows as a vector has lanes.
#pragma once

#include "simd/vector.hpp"

namespace lmkern {

// to[j][i] = from[i][j] for i, j < kLanes<T>; strides in elements.
template <class T>
inline void transpose_square(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
    constexpr int lanes = kLanes<T>;
    for (int i = 0; i < lanes; ++i)
        for (int j = 0; j < lanes; ++j) to[j * to_stride + i] = from[i * from_stride + j];
}

#if defined(__AVX512F__)

// Rows r[0..15] of 16 32-bit elements, in registers: four steps of 16 shuffles each.
inline void transpose_registers(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // r[4 g + c] holds, in its 128-bit part b, column 4 b + c of rows 4 g to 4 g + 3.
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512i low01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
        const __m512i high01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
        const __m512i low23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        const __m512i high23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        t[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        t[8 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        t[4 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}

template <>
inline void transpose_square<float>(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * from_stride);
    transpose_registers(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_stride, r[i]);
}

#elif defined(__AVX2__)

template <>
inline void transpose_square<float>(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    // Columns 4 h to 4 h + 3 of rows i and i + 4, in the halves of a vector: loads put them there.
    __m256 r[2][4];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
            r[h][i] =
                _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + i * from_stride + 4 * h)),
                                     _mm_loadu_ps(from + (i + 4) * from_stride + 4 * h), 1);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
        const __m256 low01 = _mm256_unpacklo_ps(r[h][0], r[h][1]),
                     low23 = _mm256_unpacklo_ps(r[h][2], r[h][3]);
        const __m256 high01 = _mm256_unpackhi_ps(r[h][0], r[h][1]),
                     high23 = _mm256_unpackhi_ps(r[h][2], r[h][3]);
        float* place = to + 4 * h * to_stride;
        _mm256_storeu_ps(place, _mm256_shuffle_ps(low01, low23, 0x44));
        _mm256_storeu_ps(place + to_stride, _mm256_shuffle_ps(low01, low23, 0xee));
        _mm256_storeu_ps(place + 2 * to_stride, _mm256_shuffle_ps(high01, high23, 0x44));
        _mm256_storeu_ps(place + 3 * to_stride, _mm256_shuffle_ps(high01, high23, 0xee));
    }
}

#endif

}  // namespace lmkern
