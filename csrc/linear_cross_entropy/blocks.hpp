// Blocks of 32 x 32 sums: what the products under linear + cross-entropy share.
//
//     tile  16 rows x 64 bytes
//     a     two tiles, 16 rows each x 32 steps of depth, bfloat16
//     b     two tiles, 32 steps of depth, paired, x 16 columns each
//     sums  four tiles, 16 x 16 in float32 of each a tile with each b tile
#pragma once

#include "simd/bf16_product.hpp"

#if defined(__AVX512BF16__)

#include <immintrin.h>

#include <algorithm>

#include "core/parallel_for.hpp"
#include "core/workspace.hpp"
#include "linear_cross_entropy/params.hpp"
#include "simd/vector.hpp"

namespace lmkern {

constexpr int64_t kSide = 32;    // rows, columns and depth of a step
constexpr int64_t kStep = 1024;  // bfloat16 elements of the two tiles of a step
constexpr int64_t kTile = kBf16Tile;
constexpr int64_t kSums = 1024;  // float32 elements of the four tiles of sums
// What a task packs for itself of one factor, while all of the other goes by, stays in the second cache.
constexpr int64_t kPackedBytes = int64_t{512} << 10;

inline int64_t sides(int64_t n) {
    return ceil_div(n, kSide);
}

// Bits for the columns of a matrix from `first` on, 32 of them at most.
inline uint32_t column_mask(int64_t columns, int64_t first) {
    const int64_t count = std::min(kSide, columns - first);
    return count == kSide ? ~0u : (1u << count) - 1;
}

// Two rows of 32 elements, side by side: the elements of both for column 0, for column 1, ...
inline void store_pairs(const uint16_t* even, const uint16_t* odd, uint32_t columns_mask, bool has_odd,
                        uint16_t* to0, uint16_t* to1) {
    const __m512i a = _mm512_maskz_loadu_epi16(columns_mask, even);
    const __m512i b = has_odd ? _mm512_maskz_loadu_epi16(columns_mask, odd) : _mm512_setzero_si512();
    __m512i tiles[2];
    bf16_pair(a, b, &tiles[0], &tiles[1]);
    _mm512_store_si512(to0, tiles[0]);
    _mm512_store_si512(to1, tiles[1]);
}

// Tiles of a, those of the upper and those of the lower 16 rows each `stride` elements apart.
struct BlockRows {
    const uint16_t *upper, *lower;
    int64_t stride;
};

// The four tiles of one block = a b over `depth` steps, or += with `accumulate`. The tiles of b lie one after
// the other.
inline void add_block(const BlockRows& a, const uint16_t* b, int64_t depth, bool accumulate, float* sums) {
    auto bf16 = [](const uint16_t* bits) { return reinterpret_cast<const bfloat16*>(bits); };
    bf16_block<1>({bf16(a.upper), bf16(a.lower), kSide, a.stride}, {bf16(b), kStep, kTile, 0}, depth,
                  {{sums, sums + 256, sums + 512, sums + 768}, 16}, accumulate);
}

// Rows of a that are packed in steps, the two tiles of each side by side.
inline BlockRows packed_rows(const uint16_t* packed) {
    return {packed, packed + kTile, kStep};
}

// Rows of the logits from a block of 32 tokens and a step of 32 columns on.
inline BlockRows logits_rows(const LinearCrossEntropyParams& p, int64_t block, int64_t step) {
    const int64_t row = sides(p.vocabulary) * kTile;
    const uint16_t* upper = static_cast<const uint16_t*>(p.logits) + 2 * block * row + step * kTile;
    return {upper, upper + row, kTile};
}

// Panels of 32 columns that a task packs, each `steps` deep.
inline int64_t panels_of_task(int64_t steps) {
    return std::clamp<int64_t>(kPackedBytes / (std::max<int64_t>(steps, 1) * kStep * 2), 1, 16);
}

// Two vectors of a row side by side.
inline __m512i rounded(const float* low, const float* high) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(high), _mm512_loadu_ps(low));
}

}  // namespace lmkern

#endif
