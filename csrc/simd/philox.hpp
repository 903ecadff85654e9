// Philox4x32-10, a counter-based generator of random bits: one counter of four words in each lane.
//
// Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3". The same numbers as
// lmkern/kernels/philox.py.
#pragma once

#include "simd/vector.hpp"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace lmkern {

using Words = Vector<uint32_t>;

// The two words of each lane's product v * factor.
struct LongProduct {
    Words low, high;
};

// The products of the even words of v, 64 bits each.
inline Vector<uint64_t> multiply_even(Vector<uint64_t> v, Vector<uint64_t> factor) {
#if defined(__AVX512F__)
    // Not _mm512_mul_epu32, of whose undefined operand GCC 12 warns.
    return bit_cast<Vector<uint64_t>>(
        _mm512_maskz_mul_epu32(0xff, bit_cast<__m512i>(v), bit_cast<__m512i>(factor)));
#elif defined(__AVX2__)
    return bit_cast<Vector<uint64_t>>(_mm256_mul_epu32(bit_cast<__m256i>(v), bit_cast<__m256i>(factor)));
#elif defined(__SSE2__)
    return bit_cast<Vector<uint64_t>>(_mm_mul_epu32(bit_cast<__m128i>(v), bit_cast<__m128i>(factor)));
#else
    return (v & 0xffffffffu) * factor;
#endif
}

inline LongProduct multiply_long(Words v, uint32_t factor) {
    const Vector<uint64_t> factors = Vector<uint64_t>{} + factor, pairs = bit_cast<Vector<uint64_t>>(v);
    const Vector<uint64_t> even = multiply_even(pairs, factors), odd = multiply_even(pairs >> 32, factors);
    constexpr uint64_t low = 0xffffffffu;
    return {bit_cast<Words>((even & low) | (odd << 32)), bit_cast<Words>((even >> 32) | (odd & ~low))};
}

// Turns the counters into their 4 x 32 random bits, word by word.
inline void philox(Words (&words)[4], uint32_t key_low, uint32_t key_high) {
    for (int round = 0; round < 10; ++round) {
        const LongProduct first = multiply_long(words[0], 0xD2511F53u);
        const LongProduct second = multiply_long(words[2], 0xCD9E8D57u);
        words[0] = second.high ^ words[1] ^ key_low;
        words[1] = second.low;
        words[2] = first.high ^ words[3] ^ key_high;
        words[3] = first.low;
        // Weyl sequences: the fractions of the golden ratio and of the square root of 3.
        key_low += 0x9E3779B9u;
        key_high += 0xBB67AE85u;
    }
}

}  // namespace lmkern
