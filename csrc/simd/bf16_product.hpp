// The product of packed bfloat16 operands, on AMX tiles or a pair of the depth at a time, and how the
// operands are packed.
#pragma once

#include <cstring>
#include <type_traits>

#include "simd/amx.hpp"
#include "simd/transpose.hpp"

#if defined(__AVX512BF16__)

namespace lmkern {

// A number is multiplied as the sum of `parts` bfloat16: itself with one; with three, a float32 whose 24 bits
// they hold between them (Henry, Tang, Heinecke 2019, arXiv:1904.06376). Parts lie side by side, tile by
// tile.

// Rows, `stride` bfloat16 apart, each aligned to a cache line: whole tiles of 16 rows x 32, zero where the
// matrix has nothing.
struct Bf16Left {
    const bfloat16* data;
    int64_t stride;
};

// Tiles of 32 rows (the depth) x 16 columns, rows 2 p and 2 p + 1 side by side in row p of a tile, each tile
// 1 KiB; strides in bfloat16 between tiles along the depth, between the two of 32 columns, and from 32
// columns to the next.
struct Bf16Right {
    const bfloat16* data;
    int64_t depth_stride, column_stride, pair_stride;

    // j: a multiple of 32.
    Bf16Right column(int64_t j) const {
        return {data + j / 32 * pair_stride, depth_stride, column_stride, pair_stride};
    }
};

constexpr int64_t kBf16Tile = 512;  // elements of a tile of bfloat16

// Where 32 rows of a left operand lie: two blocks of 16, rows `stride` apart, the next 32 of the depth
// `depth_stride` further on.
struct Bf16Rows {
    const bfloat16 *upper, *lower;
    int64_t stride, depth_stride;
};

// 32 x 32 sums: four blocks of 16 x 16, rows `stride` apart.
struct Bf16Sums {
    float* block[4];  // upper left, upper right, lower left, lower right
    int64_t stride;
};

#if defined(__AMX_BF16__)

// What a thread needs while it multiplies.
using Bf16Session = AmxTiles;

inline void amx_load_left(Bf16Rows left, int64_t at) {
    tile_load<4>(left.upper + at, left.stride * 2);
    tile_load<5>(left.lower + at, left.stride * 2);
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

// Tiles 0 to 3 += the product over a depth of 32.
template <int parts, bool passes>
inline void amx_step(Bf16Rows left, const bfloat16* right, int64_t column_stride) {
    if constexpr (parts == 1) {
        tile_load<4>(left.upper, left.stride * 2);
        tile_load<6, passes>(right, kTileRowBytes);
        tile_product<0, 4, 6>();
        tile_load<7, passes>(right + column_stride, kTileRowBytes);
        tile_product<1, 4, 7>();
        tile_load<5>(left.lower, left.stride * 2);
        tile_product<2, 5, 6>();
        tile_product<3, 5, 7>();
    } else {
        static_assert(parts == 3);
        // Of the nine products of parts the three smallest are below the last bit. One factor changes at a
        // time, and the largest product comes last.
        amx_load_left(left, 64);
        amx_load_right(right, column_stride);
        amx_multiply();
        amx_load_left(left, 32);
        amx_multiply();
        amx_load_right(right + kBf16Tile, column_stride);
        amx_multiply();
        amx_load_left(left, 0);
        amx_multiply();
        amx_load_right(right + 2 * kBf16Tile, column_stride);
        amx_multiply();
        amx_load_right(right, column_stride);
        amx_multiply();
    }
}

// sums = left right over `steps` times 32 of the depth, or += with `accumulate`: they stay in four tiles.
// passes: the right tiles are not read again soon, and leave the nearest cache to what is.
template <int parts, bool passes = false>
inline void bf16_block(Bf16Rows left, Bf16Right right, int64_t steps, const Bf16Sums& sums, bool accumulate) {
    const int64_t bytes = sums.stride * 4;
    if (accumulate) {
        tile_load<0>(sums.block[0], bytes);
        tile_load<1>(sums.block[1], bytes);
        tile_load<2>(sums.block[2], bytes);
        tile_load<3>(sums.block[3], bytes);
    } else {
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
    }
    for (int64_t step = 0; step < steps; ++step, right.data += right.depth_stride) {
        amx_step<parts, passes>(left, right.data, right.column_stride);
        left.upper += left.depth_stride;
        left.lower += left.depth_stride;
    }
    tile_store<0>(sums.block[0], bytes);
    tile_store<1>(sums.block[1], bytes);
    tile_store<2>(sums.block[2], bytes);
    tile_store<3>(sums.block[3], bytes);
}

#else

struct Bf16Session {
    Bf16Session() {}
};

// Rows of sums that stay in registers.
constexpr int kPairRows = 8;

// kPairRows x 32 of the sums, a pair of the depth at a time.
inline void bf16_pair_rows(const bfloat16* left, int64_t stride, int64_t depth_stride, Bf16Right right,
                           int64_t steps, float* c0, float* c1, int64_t c_stride, bool accumulate) {
    __m512 acc[kPairRows][2];
#pragma GCC unroll 16
    for (int i = 0; i < kPairRows; ++i) {
        acc[i][0] = accumulate ? _mm512_loadu_ps(c0 + i * c_stride) : _mm512_setzero_ps();
        acc[i][1] = accumulate ? _mm512_loadu_ps(c1 + i * c_stride) : _mm512_setzero_ps();
    }
    for (int64_t step = 0; step < steps; ++step, left += depth_stride, right.data += right.depth_stride)
        for (int64_t pair = 0; pair < 16; ++pair) {
            const __m512i b0 = _mm512_load_si512(right.data + pair * 32);
            const __m512i b1 = _mm512_load_si512(right.data + right.column_stride + pair * 32);
#pragma GCC unroll 16
            for (int i = 0; i < kPairRows; ++i) {
                int32_t both;
                std::memcpy(&both, left + i * stride + pair * 2, sizeof both);
                const __m512i a = _mm512_set1_epi32(both);
                acc[i][0] = _mm512_dpbf16_ps(acc[i][0], (__m512bh)b0, (__m512bh)a);
                acc[i][1] = _mm512_dpbf16_ps(acc[i][1], (__m512bh)b1, (__m512bh)a);
            }
        }
#pragma GCC unroll 16
    for (int i = 0; i < kPairRows; ++i) {
        _mm512_storeu_ps(c0 + i * c_stride, acc[i][0]);
        _mm512_storeu_ps(c1 + i * c_stride, acc[i][1]);
    }
}

// sums = left right over `steps` times 32 of the depth, or += with `accumulate`.
template <int parts, bool /*passes*/ = false>
inline void bf16_block(Bf16Rows left, Bf16Right right, int64_t steps, const Bf16Sums& sums, bool accumulate) {
    static_assert(parts == 1);
    for (int64_t row = 0; row < 32; row += kPairRows) {
        const bfloat16* rows = row < 16 ? left.upper : left.lower;
        float *const c0 = sums.block[row / 16 * 2], *const c1 = sums.block[row / 16 * 2 + 1];
        const int64_t within = row % 16;
        bf16_pair_rows(rows + within * left.stride, left.stride, left.depth_stride, right, steps,
                       c0 + within * sums.stride, c1 + within * sums.stride, sums.stride, accumulate);
    }
}

#endif

// c (rows, columns) = a (rows, depth) @ b (depth, columns), added to c with `accumulate`; all three are
// multiples of 32. passes: b lies in the second cache and need not stay in the first. (In memory it would
// have to be fetched again: of attention over 8,192 keys, forward, 7%.)
template <int parts>
inline void bf16_product(Bf16Left a, Bf16Right b, int64_t rows, int64_t columns, int64_t depth, float* c,
                         int64_t c_stride, bool accumulate, bool passes = false) {
    auto product = [&](auto right_passes) {
        for (int64_t j = 0; j < columns; j += 32, b.data += b.pair_stride)
            for (int64_t i = 0; i < rows; i += 32) {
                const bfloat16* left = a.data + i * a.stride;
                float *const above = c + i * c_stride + j, *const below = above + 16 * c_stride;
                bf16_block<parts, right_passes.value>(
                    {left, left + 16 * a.stride, a.stride, 32 * parts}, b, depth / 32,
                    {{above, above + 16, below, below + 16}, c_stride}, accumulate);
            }
    };
    if (parts == 1 && passes)
        product(std::true_type());
    else
        product(std::false_type());
}

// The upper halves of the lanes.
inline __m512i bf16_upper(__m512i x) {
    return _mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
}

// Float32 as the sum of three bfloat16, each in the upper half of its lane: cut off, what that leaves
// rounded, and the rest, all of it. Of a number that is not finite the rest is not, and it alone may have
// bits below.
inline void bf16_split(__m512 x, __m512i part[3]) {
    part[0] = bf16_upper(_mm512_castps_si512(x));
    x = _mm512_sub_ps(x, _mm512_castsi512_ps(part[0]));
    part[1] = bf16_upper(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)));
    part[2] = _mm512_castps_si512(_mm512_sub_ps(x, _mm512_castsi512_ps(part[1])));
}

// The upper halves of two vectors by turns: a0 b0 a1 b1 ...
inline __m512i bf16_by_turns(__m512i a, __m512i b) {
    constexpr int and_or = 0xea;  // x & y | z
    return _mm512_ternarylogic_epi32(b, _mm512_set1_epi32(static_cast<int>(0xffff0000)),
                                     _mm512_srli_epi32(a, 16), and_or);
}

// 32 elements of a row from `column` on in parts, zero beyond `columns`; all zero without a row.
inline void bf16_load_row(const bfloat16* row, int64_t column, int64_t columns, __m512i part[1]) {
    const int64_t count = columns - column;
    const __mmask32 mask = count >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((uint64_t{1} << count) - 1);
    part[0] = row == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(mask, row + column);
}
inline void bf16_load_row(const float* row, int64_t column, int64_t columns, __m512i part[3]) {
    const int64_t count = row == nullptr ? 0 : columns - column;
    const __mmask32 mask = count >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((uint64_t{1} << count) - 1);
    __m512i a[3], b[3];
    bf16_split(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), row + column), a);
    bf16_split(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), row + column + 16), b);
    for (int p = 0; p < 3; ++p)
        part[p] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_castsi512_ps(b[p]), _mm512_castsi512_ps(a[p]));
}

// Two rows of 32 side by side, the elements of both for one column after the other: columns 0 to 15, and 16
// to 31.
inline void bf16_pair(__m512i even, __m512i odd, __m512i* first, __m512i* second) {
    // Unpacking works within 128 bits: quarters of columns 0-3, 8-11, 16-19, 24-27 and 4-7, 12-15, ...
    const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
    *first = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high);
    *second = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high);
}

// The transpose of a 32 x 32 block: put(column, row) for each column; row(i) gives 32 elements.
template <class Row, class Put>
inline void bf16_transpose(const Row& row, const Put& put) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        __m512i block[16];
#pragma GCC unroll 16
        for (int p = 0; p < 16; ++p)
            block[p] = half == 0 ? _mm512_unpacklo_epi16(row(2 * p), row(2 * p + 1))
                                 : _mm512_unpackhi_epi16(row(2 * p), row(2 * p + 1));
        transpose_registers(block);
        // What unpacking left of 128 bits each.
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) put(j / 4 * 8 + half * 4 + j % 4, block[j]);
    }
}

}  // namespace lmkern

#endif
