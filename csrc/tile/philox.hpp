// Philox4x32-10, a counter-based generator of random bits, in registers.
//
// Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3". The same numbers as
// lmkern/kernels/philox.py.
#pragma once

#include <cstdint>

namespace lmkern {

// Turns a counter into its 4 x 32 random bits.
__device__ inline void philox(uint32_t (&words)[4], uint64_t key) {
    uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
    // Not unrolled: the compiler would mix the rounds of several calls, and run out of registers.
#pragma unroll 1
    for (int round = 0; round < 10; ++round) {
        const uint64_t first = static_cast<uint64_t>(words[0]) * 0xD2511F53u;
        const uint64_t second = static_cast<uint64_t>(words[2]) * 0xCD9E8D57u;
        words[0] = static_cast<uint32_t>(second >> 32) ^ words[1] ^ low;
        words[1] = static_cast<uint32_t>(second);
        words[2] = static_cast<uint32_t>(first >> 32) ^ words[3] ^ high;
        words[3] = static_cast<uint32_t>(first);
        // Weyl sequences: the fractions of the golden ratio and of the square root of 3.
        low += 0x9E3779B9u;
        high += 0xBB67AE85u;
    }
}

// The 16 random bits of each of W neighbouring elements of a row; column: a multiple of W. Eight columns
// share a counter.
template <int W>
__device__ void random_halves(uint64_t key, int64_t row, int column, uint32_t (&halves)[W]) {
    static_assert(W == 1 || W == 2 || W == 4 || W == 8, "random_halves: W divides 8");
    uint32_t words[4] = {static_cast<uint32_t>(column) / 8, static_cast<uint32_t>(row), 0, 0};
    philox(words, key);
    // The words from the column's on, by selection: an index known only at run time would put them in memory.
    if (W < 8 && column & 4) {
        words[0] = words[2];
        words[1] = words[3];
    }
    if (W < 4 && column & 2) words[0] = words[1];
    if (W < 2 && column & 1) words[0] >>= 16;
#pragma unroll
    for (int w = 0; w < W; ++w) halves[w] = words[w / 2] >> (w % 2 * 16) & 0xffffu;
}

}  // namespace lmkern
