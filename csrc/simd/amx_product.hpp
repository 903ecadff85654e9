// The product of packed bfloat16 operands on AMX, and how the operands are packed.
#pragma once

#include "simd/amx.hpp"
#include "simd/transpose.hpp"

#if defined(__AMX_BF16__)

namespace lmkern {

// A number is multiplied as the sum of `parts` bfloat16: itself with one; with three, a float32 whose 24 bits
// they hold between them (Henry, Tang, Heinecke 2019, arXiv:1904.06376). Parts lie side by side, tile by
// tile.

// Rows, `stride` bfloat16 apart, each aligned to a cache line: whole tiles of 16 rows x 32, zero where the
// matrix has nothing.
struct AmxLeft {
    const bfloat16* data;
    int64_t stride;
};

// Tiles of 32 rows (the depth) x 16 columns, rows 2 p and 2 p + 1 side by side in row p of a tile, each tile
// 1 KiB; strides in bfloat16 between tiles along the depth and along the columns.
struct AmxRight {
    const bfloat16* data;
    int64_t depth_stride, column_stride;

    AmxRight column(int64_t j) const { return {data + j / 16 * column_stride, depth_stride, column_stride}; }
};

constexpr int64_t kAmxTile = 512;  // elements of a tile of bfloat16

inline void amx_load_left(const bfloat16* left, int64_t stride) {
    tile_load<4>(left, stride * 2);
    tile_load<5>(left + 16 * stride, stride * 2);
}
inline void amx_load_right(const bfloat16* right, int64_t column_stride) {
    tile_load<6>(right, kTileRowBytes);
    tile_load<7>(right + column_stride, kTileRowBytes);
}
inline void amx_multiply() {
    tile_product<0, 4, 6>();
    tile_product<1, 4, 7>();
    tile_product<2, 5, 6>();
    tile_product<3, 5, 7>();
}

// Tiles 0 to 3 += 32 rows x 32 columns of the product over a depth of 32.
template <int parts>
inline void amx_step(const bfloat16* left, int64_t stride, const bfloat16* right, int64_t column_stride) {
    if constexpr (parts == 1) {
        tile_load<4>(left, stride * 2);
        tile_load<6>(right, kTileRowBytes);
        tile_product<0, 4, 6>();
        tile_load<7>(right + column_stride, kTileRowBytes);
        tile_product<1, 4, 7>();
        tile_load<5>(left + 16 * stride, stride * 2);
        tile_product<2, 5, 6>();
        tile_product<3, 5, 7>();
    } else {
        static_assert(parts == 3);
        // Of the nine products of parts the three smallest are below the last bit. One factor changes at a
        // time, and the largest product comes last.
        amx_load_left(left + 64, stride);
        amx_load_right(right, column_stride);
        amx_multiply();
        amx_load_left(left + 32, stride);
        amx_multiply();
        amx_load_right(right + kAmxTile, column_stride);
        amx_multiply();
        amx_load_left(left, stride);
        amx_multiply();
        amx_load_right(right + 2 * kAmxTile, column_stride);
        amx_multiply();
        amx_load_right(right, column_stride);
        amx_multiply();
    }
}

// c (rows, columns) = a (rows, depth) @ b (depth, columns), added to c with `accumulate`; all three are
// multiples of 32. Blocks of 32 x 32 stay in four tiles over the whole depth.
template <int parts>
inline void amx_product(AmxLeft a, AmxRight b, int64_t rows, int64_t columns, int64_t depth, float* c,
                        int64_t c_stride, bool accumulate) {
    const int64_t c_bytes = c_stride * 4, depth_tiles = depth / 32;
    for (int64_t j = 0; j < columns; j += 32, b.data += 2 * b.column_stride)
        for (int64_t i = 0; i < rows; i += 32) {
            float* const above = c + i * c_stride + j;
            float* const below = above + 16 * c_stride;
            if (accumulate) {
                tile_load<0>(above, c_bytes);
                tile_load<1>(above + 16, c_bytes);
                tile_load<2>(below, c_bytes);
                tile_load<3>(below + 16, c_bytes);
            } else {
                tile_zero<0>();
                tile_zero<1>();
                tile_zero<2>();
                tile_zero<3>();
            }
            const bfloat16* left = a.data + i * a.stride;
            const bfloat16* right = b.data;
            for (int64_t k = 0; k < depth_tiles; ++k, left += 32 * parts, right += b.depth_stride)
                amx_step<parts>(left, a.stride, right, b.column_stride);
            tile_store<0>(above, c_bytes);
            tile_store<1>(above + 16, c_bytes);
            tile_store<2>(below, c_bytes);
            tile_store<3>(below + 16, c_bytes);
        }
}

// The upper halves of the lanes.
inline __m512i amx_upper(__m512i x) {
    return _mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
}

// Float32 as the sum of three bfloat16, each in the upper half of its lane: cut off, what that leaves
// rounded, and the rest, all of it. Of a number that is not finite the rest is not, and it alone may have
// bits below.
inline void amx_split(__m512 x, __m512i part[3]) {
    part[0] = amx_upper(_mm512_castps_si512(x));
    x = _mm512_sub_ps(x, _mm512_castsi512_ps(part[0]));
    part[1] = amx_upper(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)));
    part[2] = _mm512_castps_si512(_mm512_sub_ps(x, _mm512_castsi512_ps(part[1])));
}

// The upper halves of two vectors by turns: a0 b0 a1 b1 ...
inline __m512i amx_by_turns(__m512i a, __m512i b) {
    constexpr int and_or = 0xea;  // x & y | z
    return _mm512_ternarylogic_epi32(b, _mm512_set1_epi32(static_cast<int>(0xffff0000)),
                                     _mm512_srli_epi32(a, 16), and_or);
}

// 32 elements of a row from `column` on in parts, zero beyond `columns`; all zero without a row.
inline void amx_load_row(const bfloat16* row, int64_t column, int64_t columns, __m512i part[1]) {
    const int64_t count = columns - column;
    const __mmask32 mask = count >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((uint64_t{1} << count) - 1);
    part[0] = row == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(mask, row + column);
}
inline void amx_load_row(const float* row, int64_t column, int64_t columns, __m512i part[3]) {
    const int64_t count = row == nullptr ? 0 : columns - column;
    const __mmask32 mask = count >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((uint64_t{1} << count) - 1);
    __m512i a[3], b[3];
    amx_split(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), row + column), a);
    amx_split(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), row + column + 16), b);
    for (int p = 0; p < 3; ++p)
        part[p] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_castsi512_ps(b[p]), _mm512_castsi512_ps(a[p]));
}

// What two rows of 16 bfloat16 look like side by side.
inline __m512i amx_pair(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// The 16 pairs of rows 2 p, 2 p + 1 of a 32 x 16 block; row(i) gives 16 elements as a __m256i.
template <class Row>
inline void amx_pairs(const Row& row, __m512i pairs[16]) {
#pragma GCC unroll 16
    for (int p = 0; p < 16; ++p) pairs[p] = amx_pair(row(2 * p), row(2 * p + 1));
}

}  // namespace lmkern

#endif
