// 2^x rounded to bfloat16, 32 numbers at a time in words of 16 bits.
//
// A word holds x + 63 in units of 2^-10: the integer part n is the exponent of 2^x, and the fraction f is
// nearly its mantissa, 2^f = 1 + f - c(f) with c between 0 and 0.087 (Schraudolph 1999, "A fast, compact
// approximation of the exponential function"). c comes from a table by the first 7 bits of f. With the three
// bits that are rounded away last, the error is 1.03 times that of rounding alone (root mean square; at most
// 0.0048).
#pragma once

#include <cmath>

#include "simd/vector.hpp"

#if defined(__AVX512VBMI__) && defined(__AVX512VBMI2__)

namespace lmkern {

class Exp2Words {
public:
    // 2^x is made for x from -kRange to 0 and is 0 below.
    static constexpr float kRange = 62;

    // Of x factor - reference; the reference is an integer.
    Exp2Words(float factor, float reference)
        : factor_(_mm512_set1_ps(factor)),
          shift_(_mm512_set1_ps(kOne * 8 + 63 - reference + 4.0f / kOne)),
          low_(_mm512_loadu_si512(table())),
          high_(_mm512_loadu_si512(table() + 64)) {}

    // Elements by turns: of a, of b, of a, ...; `clamped`: x may be less than -kRange, also -inf.
    template <bool clamped>
    [[gnu::always_inline]] __m512i of(__m512 a, __m512 b) const {
        // One rounding brings x to units of 2^-10 in the last bits.
        a = _mm512_fmadd_ps(a, factor_, shift_);
        b = _mm512_fmadd_ps(b, factor_, shift_);
        if (clamped) {
            a = _mm512_max_ps(a, _mm512_set1_ps(kOne * 8));
            b = _mm512_max_ps(b, _mm512_set1_ps(kOne * 8));
        }
        // And the lower halves of two vectors side by side.
        const __m512i words = _mm512_mask_mov_epi16(_mm512_slli_epi32(_mm512_castps_si512(b), 16), 0x55555555,
                                                    _mm512_castps_si512(a));
        const __m512i place = _mm512_srli_epi16(words, 3);
        const __m512i c = _mm512_maskz_permutex2var_epi8(0x5555555555555555, low_, place, high_);
        const __m512i mantissa = _mm512_sub_epi16(words, c);
        // The bit that comes in from above makes n the exponent of 2^(n - 63).
        const __m512i bias = _mm512_set1_epi16(1);
        if (!clamped) return _mm512_shrdi_epi16(mantissa, bias, 3);
        const __mmask32 in_range = _mm512_cmpge_epu16_mask(words, _mm512_set1_epi16(kOne));
        return _mm512_maskz_shrdi_epi16(in_range, mantissa, bias, 3);
    }

private:
    static constexpr short kOne = 1024;

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
