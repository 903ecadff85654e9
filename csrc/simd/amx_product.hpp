// The product of packed bfloat16 operands on AMX, and how the operands are packed.
#pragma once

#include "simd/amx.hpp"
#include "simd/transpose.hpp"

#if defined(__AMX_BF16__)

namespace lmkern {

// Rows of bfloat16, `stride` elements apart, each aligned to a cache line: whole tiles of 16 rows x 32, zero
// where the matrix has nothing.
struct AmxLeft {
    const bfloat16* data;
    int64_t stride;

    AmxLeft row(int64_t i) const { return {data + i * stride, stride}; }
    AmxLeft depth(int64_t k) const { return {data + k, stride}; }
};

// Tiles of 32 rows (the depth) x 16 columns, rows 2 p and 2 p + 1 side by side in row p of a tile, each tile
// 1 KiB; strides in elements between tiles along the depth and along the columns.
struct AmxRight {
    const bfloat16* data;
    int64_t depth_stride, column_stride;

    AmxRight column(int64_t j) const { return {data + j / 16 * column_stride, depth_stride, column_stride}; }
    AmxRight depth(int64_t k) const { return {data + k / 32 * depth_stride, depth_stride, column_stride}; }
};

constexpr int64_t kAmxTile = 512;  // elements of a tile of bfloat16

// c (rows, columns) = a (rows, depth) @ b (depth, columns), added to c with `accumulate`; all three are
// multiples of 32. Blocks of 32 x 32 stay in four tiles over the whole depth.
inline void amx_product(AmxLeft a, AmxRight b, int64_t rows, int64_t columns, int64_t depth, float* c,
                        int64_t c_stride, bool accumulate) {
    const int64_t c_bytes = c_stride * 4, a_bytes = a.stride * 2, depth_tiles = depth / 32;
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
            for (int64_t k = 0; k < depth_tiles; ++k, left += 32, right += b.depth_stride) {
                tile_load<4>(left, a_bytes);
                tile_load<6>(right, kTileRowBytes);
                tile_product<0, 4, 6>();
                tile_load<7>(right + b.column_stride, kTileRowBytes);
                tile_product<1, 4, 7>();
                tile_load<5>(left + 16 * a.stride, a_bytes);
                tile_product<2, 5, 6>();
                tile_product<3, 5, 7>();
            }
            tile_store<0>(above, c_bytes);
            tile_store<1>(above + 16, c_bytes);
            tile_store<2>(below, c_bytes);
            tile_store<3>(below + 16, c_bytes);
        }
}

// 32 elements of a row from `column` on, zero beyond `columns`; all zero without a row.
inline __m512i amx_load_row(const bfloat16* row, int64_t column, int64_t columns) {
    const int64_t count = columns - column;
    if (row == nullptr || count <= 0) return _mm512_setzero_si512();
    const __mmask32 mask = count >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((uint64_t{1} << count) - 1);
    return _mm512_maskz_loadu_epi16(mask, row + column);
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
