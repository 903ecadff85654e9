// dweight^T (E, V) = x^T (E, T) dlogits (T, V) with AMX, summed in float32 over chunks of T tokens.
//
// a is x, transposed, packed once a chunk; b is dlogits, packed by the task that uses it. sums holds, for
// each 32 columns of dlogits and in it for each 32 columns of x, the tiles c00 c01 c10 c11 one after the
// other: they are read and written in the order of the addresses.
#include "linear_cross_entropy/amx_block.hpp"
#include "linear_cross_entropy/cpu.hpp"

#if defined(__AMX_BF16__)

namespace lmkern {
namespace {

constexpr int64_t kPanelsPerTask = 4;

// For each depth of tokens: packed[block][step][half][e][t] = x[32 step + t][32 block + 16 half + e]; 0
// beyond x.
void pack_x(const WeightGradientParams& p, int64_t block) {
    const int64_t blocks = sides(p.width), all = sides(p.tokens);
    const uint16_t* x = static_cast<const uint16_t*>(p.x) + block * kSide;
    const int64_t columns = std::min(kSide, p.width - block * kSide);
    for (int64_t step = 0; step < all; ++step) {
        const int64_t part = step / kDepth * kDepth, depth = std::min(kDepth, all - part),
                      token = step * kSide;
        uint16_t* packed =
            static_cast<uint16_t*>(p.packed_x) + (part * blocks + block * depth + (step - part)) * kStep;
        const int64_t rows = std::min(kSide, p.tokens - token);
        if (rows < kSide || columns < kSide) std::fill_n(packed, kStep, uint16_t{0});
        for (int64_t e = 0; e < columns; ++e)
            for (int64_t t = 0; t < rows; ++t) packed[e * kSide + t] = x[(token + t) * p.x_stride + e];
    }
}

// packed[panel][step][half][pair][column][2] = dlogits[32 step + 2 pair + .][32 panel + 16 half + column],
// for panels first to end.
void pack_dlogits(const WeightGradientParams& p, int64_t first, int64_t end, uint16_t* packed) {
    const uint16_t* g = static_cast<const uint16_t*>(p.dlogits);
    for (int64_t token = 0; token < p.tokens; token += kSide)
        for (int64_t pair = 0; pair < 16; ++pair)
            for (int64_t panel = first; panel < end; ++panel) {
                const uint32_t mask = column_mask(p.vocabulary, panel * kSide);
                const int64_t row = token + 2 * pair;
                const uint16_t* even = g + row * p.dlogits_stride + panel * kSide;
                uint16_t* to = packed + ((panel - first) * sides(p.tokens) + token / kSide) * kStep;
                store_pairs(even, even + p.dlogits_stride, row < p.tokens ? mask : 0, row + 1 < p.tokens,
                            to + pair * kSide, to + kStep / 2 + pair * kSide);
            }
}

// The sums of the panels stay in the second cache while the parts of the tokens go by.
void add_panels(const WeightGradientParams& p, const uint16_t* g, int64_t panels, float* sums) {
    const int64_t blocks = sides(p.width), all = sides(p.tokens);
    const uint16_t* x = static_cast<const uint16_t*>(p.packed_x);
    for (int64_t part = 0; part < all; part += kDepth) {
        const int64_t depth = std::min(kDepth, all - part);
        for (int64_t block = 0; block < blocks; ++block, x += depth * kStep)
            for (int64_t panel = 0; panel < panels; ++panel)
                add_block(x, g + (panel * all + part) * kStep, depth, p.first && part == 0,
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
    const int64_t blocks = sides(p.width), panels = sides(p.vocabulary);
    parallel_for(blocks, p.threads, [&](int64_t block) { pack_x(p, block); });
    parallel_for(ceil_div(panels, kPanelsPerTask), p.threads, [&](int64_t task) {
        Workspace& workspace = Workspace::of_this_thread();
        const int64_t elements = sides(p.tokens) * kStep;
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
    const int64_t blocks = sides(p.width), panels = sides(p.vocabulary);
    parallel_for(panels, p.threads, [&](int64_t panel) {
        const float* sums = p.sums + panel * blocks * kSums;
        for (int64_t block = 0; block < blocks; ++block, sums += kSums)
            for (int64_t half = 0; half < 2; ++half) {
                const int64_t e = block * kSide, v = panel * kSide + half * 16;
                store_rows(sums + half * 256, std::min<int64_t>(16, p.vocabulary - v),
                           std::min(kSide, p.width - e), static_cast<bfloat16*>(p.dweight) + v * p.width + e,
                           p.width);
            }
    });
}

}  // namespace lmkern

#endif
