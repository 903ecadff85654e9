// dweight^T (E, V) = x^T (E, T) dlogits (T, V) with AMX, summed in float32 over chunks of T tokens.
//
//     tile       16 rows x 64 bytes
//     x0 x1      16 columns of x, transposed, x 32 tokens: packed once a chunk, they stay in the second cache
//     g0 g1      32 tokens, paired, x 16 columns of dlogits: packed once for all of E, they stay in the first
//     c00 .. c11 16 x 16 sums in float32 of each x tile with each g tile
//
// sums holds, for each 32 columns of dlogits and in it for each 32 columns of x, the tiles c00 c01 c10 c11
// one after the other: they are read and written in the order of the addresses.
#include "linear_cross_entropy/cpu.hpp"
#include "simd/amx.hpp"

#if defined(__AMX_BF16__)

#include <immintrin.h>

#include <algorithm>

#include "core/parallel_for.hpp"
#include "core/workspace.hpp"
#include "simd/vector.hpp"

namespace lmkern {
namespace {

constexpr int64_t kSide = 32;   // columns of x, columns of dlogits or tokens in a step
constexpr int64_t kTile = 512;  // bfloat16 elements of a tile
constexpr int64_t kDepth =
    8;  // steps whose tiles of x, 16 KB, stay in the first cache while the panels of a task go by
constexpr int64_t kSums = 1024;  // float32 elements of the four tiles of sums
constexpr int64_t kPanelsPerTask = 4;

enum Tile { x0, x1, g0, g1, c00, c01, c10, c11 };

int64_t steps(int64_t tokens) {
    return ceil_div(tokens, kSide);
}

// For each depth of tokens: packed[block][step][half][e][t] = x[32 step + t][32 block + 16 half + e]; 0
// beyond x.
void pack_x(const WeightGradientParams& p, int64_t block) {
    const int64_t blocks = ceil_div(p.width, kSide), all = steps(p.tokens);
    const uint16_t* x = static_cast<const uint16_t*>(p.x) + block * kSide;
    const int64_t columns = std::min(kSide, p.width - block * kSide);
    for (int64_t step = 0; step < all; ++step) {
        const int64_t part = step / kDepth * kDepth, depth = std::min(kDepth, all - part),
                      token = step * kSide;
        uint16_t* packed =
            static_cast<uint16_t*>(p.packed_x) + (part * blocks + block * depth + (step - part)) * 2 * kTile;
        const int64_t rows = std::min(kSide, p.tokens - token);
        if (rows < kSide || columns < kSide) std::fill_n(packed, 2 * kTile, uint16_t{0});
        for (int64_t e = 0; e < columns; ++e)
            for (int64_t t = 0; t < rows; ++t) packed[e * kSide + t] = x[(token + t) * p.x_stride + e];
    }
}

// Two rows of 32 elements, side by side: the elements of both for column 0, for column 1, ...
inline void store_pairs(const uint16_t* even, const uint16_t* odd, uint32_t columns_mask, bool has_odd,
                        uint16_t* to0, uint16_t* to1) {
    const __m512i a = _mm512_maskz_loadu_epi16(columns_mask, even);
    const __m512i b = has_odd ? _mm512_maskz_loadu_epi16(columns_mask, odd) : _mm512_setzero_si512();
    const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
    // Unpacking works within 128 bits: quarters of columns 0-3, 8-11, 16-19, 24-27 and 4-7, 12-15, ...
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    _mm512_store_si512(to0, _mm512_permutex2var_epi64(low, first, high));
    _mm512_store_si512(to1, _mm512_permutex2var_epi64(low, second, high));
}

// packed[panel][step][half][pair][column][2] = dlogits[32 step + 2 pair + .][32 panel + 16 half + column],
// for panels first to end.
void pack_dlogits(const WeightGradientParams& p, int64_t first, int64_t end, uint16_t* packed) {
    const uint16_t* g = static_cast<const uint16_t*>(p.dlogits);
    for (int64_t token = 0; token < p.tokens; token += kSide)
        for (int64_t pair = 0; pair < 16; ++pair)
            for (int64_t panel = first; panel < end; ++panel) {
                const int64_t columns = std::min(kSide, p.vocabulary - panel * kSide);
                const uint32_t mask = columns == kSide ? ~0u : (1u << columns) - 1;
                const int64_t row = token + 2 * pair;
                const uint16_t* even = g + row * p.dlogits_stride + panel * kSide;
                uint16_t* to = packed + ((panel - first) * steps(p.tokens) + token / kSide) * 2 * kTile;
                store_pairs(even, even + p.dlogits_stride, row < p.tokens ? mask : 0, row + 1 < p.tokens,
                            to + pair * kSide, to + kTile + pair * kSide);
            }
}

// The four tiles of one block += x g over `depth` steps.
inline void add_block(const uint16_t* x, const uint16_t* g, int64_t depth, bool first, float* sums) {
    if (first) {
        tile_zero<c00>();
        tile_zero<c01>();
        tile_zero<c10>();
        tile_zero<c11>();
    } else {
        tile_load<c00>(sums, kTileRowBytes);
        tile_load<c01>(sums + 256, kTileRowBytes);
        tile_load<c10>(sums + 512, kTileRowBytes);
        tile_load<c11>(sums + 768, kTileRowBytes);
    }
    for (int64_t step = 0; step < depth; ++step, x += 2 * kTile, g += 2 * kTile) {
        tile_load<x0>(x, kTileRowBytes);
        tile_load<g0>(g, kTileRowBytes);
        tile_product<c00, x0, g0>();
        tile_load<g1>(g + kTile, kTileRowBytes);
        tile_product<c01, x0, g1>();
        tile_load<x1>(x + kTile, kTileRowBytes);
        tile_product<c10, x1, g0>();
        tile_product<c11, x1, g1>();
    }
    tile_store<c00>(sums, kTileRowBytes);
    tile_store<c01>(sums + 256, kTileRowBytes);
    tile_store<c10>(sums + 512, kTileRowBytes);
    tile_store<c11>(sums + 768, kTileRowBytes);
}

// The sums of the panels stay in the second cache while the parts of the tokens go by.
void add_panels(const WeightGradientParams& p, const uint16_t* g, int64_t panels, float* sums) {
    const int64_t blocks = ceil_div(p.width, kSide), all = steps(p.tokens);
    const uint16_t* x = static_cast<const uint16_t*>(p.packed_x);
    for (int64_t part = 0; part < all; part += kDepth) {
        const int64_t depth = std::min(kDepth, all - part);
        for (int64_t block = 0; block < blocks; ++block, x += depth * 2 * kTile)
            for (int64_t panel = 0; panel < panels; ++panel)
                add_block(x, g + (panel * all + part) * 2 * kTile, depth, p.first && part == 0,
                          sums + (panel * blocks + block) * kSums);
    }
}

// Two tiles of sums, one above the other: 32 columns of x for each of 16 rows of dweight.
void store_rows(const float* sums, int64_t rows, int64_t columns, bfloat16* to, int64_t stride) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t half = 0; half < columns; half += 16) {
            float line[16];
            for (int64_t e = 0; e < 16; ++e) line[e] = sums[half * 32 + e * 16 + row];
            bfloat16* place = to + row * stride + half;
            if (columns - half >= 16)
                store(place, load(line));
            else
                store(place, load(line), columns - half);
        }
}

}  // namespace

void weight_gradient_add(const WeightGradientParams& p) {
    const int64_t blocks = ceil_div(p.width, kSide), panels = ceil_div(p.vocabulary, kSide);
    parallel_for(blocks, p.threads, [&](int64_t block) { pack_x(p, block); });
    parallel_for(ceil_div(panels, kPanelsPerTask), p.threads, [&](int64_t task) {
        Workspace& workspace = Workspace::of_this_thread();
        const int64_t elements = steps(p.tokens) * 2 * kTile;
        workspace.reserve(static_cast<size_t>(kPanelsPerTask * elements) * sizeof(uint16_t));
        uint16_t* g = workspace.take<uint16_t>(kPanelsPerTask * elements);
        const AmxTiles tiles;
        const int64_t end = std::min(panels, (task + 1) * kPanelsPerTask);
        const int64_t first = task * kPanelsPerTask;
        pack_dlogits(p, first, end, g);
        add_panels(p, g, end - first, p.sums + first * blocks * kSums);
    });
}

void weight_gradient_store(const WeightGradientParams& p) {
    const int64_t blocks = ceil_div(p.width, kSide), panels = ceil_div(p.vocabulary, kSide);
    parallel_for(panels, p.threads, [&](int64_t panel) {
        const float* sums = p.sums + panel * blocks * kSums;
        for (int64_t block = 0; block < blocks; ++block, sums += kSums)
            for (int64_t half = 0; half < 2; ++half) {
                const int64_t e = block * kSide, v = panel * kSide + half * 16;
                store_rows(sums + half * 256,
                           std::min<int64_t>(16, p.vocabulary - v), std::min(kSide, p.width - e),
                           static_cast<bfloat16*>(p.dweight) + v * p.width + e, p.width);
            }
    });
}

}  // namespace lmkern

#endif
