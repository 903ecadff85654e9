// 2^x rounded to bfloat16, 32 numbers at a time in words of 16 bits.
//
// A word holds x + 63 in units of 2^-10: the integer part n is the exponent of 2^x, and the fraction f is
// nearly its mantissa, 2^f = 1 + f - c(f) with c between 0 and 0.087 (Schraudolph 1999, "A fast, compact
// approximation of the exponential function"). c comes from a table by the first 7 bits of f. With the three
// bits that are rounded away last, the error is 1.03 times that of rounding alone (root mean square; at most
// 0.0048).
#pragma once

#include <cmath>

#include "simd/elementary.hpp"

#if defined(__AVX512BF16__)

namespace lmkern {

class Exp2Words {
public:
    // x is between -kRange and 0.
    static constexpr float kRange = 62;
    // What is made is 2^(x + kScale): products with small values are then no subnormal numbers, which tiles
    // take for zero.
    static constexpr int kScale = 64;

    // Of x factor - reference; the reference is an integer.
    Exp2Words(float factor, float reference)
        : factor_(_mm512_set1_ps(factor)),
          shift_(_mm512_set1_ps(kOne * 8 + kZero - reference)),
          low_(_mm512_loadu_si512(table())),
          high_(_mm512_loadu_si512(table() + 64)) {}

    // x of a and b in words by turns: of a, of b, of a, ...
    [[gnu::always_inline]] __m512i words(__m512 a, __m512 b) const {
        // One rounding brings x to units of 2^-10 in the last bits.
        a = _mm512_fmadd_ps(a, factor_, shift_);
        b = _mm512_fmadd_ps(b, factor_, shift_);
        return _mm512_mask_mov_epi16(_mm512_slli_epi32(_mm512_castps_si512(b), 16), 0x55555555,
                                     _mm512_castps_si512(a));
    }

    // 2^(x + kScale) as bfloat16.
    [[gnu::always_inline]] __m512i rounded(__m512i words) const {
        return _mm512_shrdi_epi16(mantissa(words), _mm512_set1_epi16(kBias), 3);
    }
    // The same where the mask says so, 0 elsewhere.
    [[gnu::always_inline]] __m512i rounded(__m512i words, __mmask32 mask) const {
        return _mm512_maskz_shrdi_epi16(mask, mantissa(words), _mm512_set1_epi16(kBias), 3);
    }

    // What `rounded` is wrong by, exact - rounded, of words in 32-bit lanes; 0 of a word 0, which is none.
    Vector<float> error(Vector<uint32_t> words) const {
        const Vector<float> x = __builtin_convertvector(words, Vector<float>) * (1.0f / kOne) - kZero;
        const Vector<float> exact = exp2<LongSeries>(x) * 0x1p64f;
        const __m512i bits = rounded(bit_cast<__m512i>(words));
        const Vector<float> made = bit_cast<Vector<float>>(_mm512_slli_epi32(bits, 16));
        return words == 0 ? Vector<float>{} : exact - made;
    }

private:
    static constexpr short kOne = 1024;
    // x = 0, and half of what is rounded away last.
    static constexpr float kZero = 63 + 4.0f / kOne;

    // The bits that come in from above make n + 64 the exponent.
    static constexpr short kBias = 2;

    [[gnu::always_inline]] __m512i mantissa(__m512i words) const {
        const __m512i place = _mm512_srli_epi16(words, 3);
        return _mm512_sub_epi16(words,
                                _mm512_maskz_permutex2var_epi8(0x5555555555555555, low_, place, high_));
    }

    // c(i / 128) in units of 2^-10, rounded so that errors have no mean.
    static const uint8_t* table() {
        struct Table {
            uint8_t c[128];
            Table() {
                for (int i = 0; i < 128; ++i)
                    c[i] =
                        static_cast<uint8_t>(std::lrint((1 + i / 128.0 - std::exp2(i / 128.0)) * 1024 + 0.5));
            }
        };
        static const Table table;
        return table.c;
    }

    __m512 factor_, shift_;
    __m512i low_, high_;
};

}  // namespace lmkern

#endif
