// dx (T, E) = dlogits (T, V) weight (V, E) with AMX.
//
// A task owns 256 tokens and their sums, which stay in the second cache while V goes by in parts: a is its
// part of dlogits, b that of the weight, both packed as they come.
#include "linear_cross_entropy/amx_block.hpp"
#include "linear_cross_entropy/cpu.hpp"

#if defined(__AMX_BF16__)

namespace lmkern {
namespace {

constexpr int64_t kTaskBlocks = 8;  // of 32 tokens

// packed[block][step][half][t][v] = dlogits[first + 32 block + 16 half + t][32 step + v], for steps from part
// on; 0 beyond dlogits.
void pack_dlogits(const InputGradientParams& p, int64_t first, int64_t blocks, int64_t part, int64_t depth,
                  uint16_t* packed) {
    const uint16_t* g = static_cast<const uint16_t*>(p.dlogits);
    for (int64_t token = first; token < first + blocks * kSide; ++token)
        for (int64_t step = 0; step < depth; ++step) {
            const int64_t column = (part + step) * kSide, row = token - first;
            const uint32_t mask = token < p.tokens ? column_mask(p.vocabulary, column) : 0;
            uint16_t* to = packed + (row / kSide * depth + step) * kStep + row % kSide * kSide;
            _mm512_store_si512(to, _mm512_maskz_loadu_epi16(mask, g + token * p.dlogits_stride + column));
        }
}

// packed[block][step][half][pair][e][2] = weight[32 step + 2 pair + .][32 block + 16 half + e], likewise.
void pack_weight(const InputGradientParams& p, int64_t part, int64_t depth, uint16_t* packed) {
    const uint16_t* weight = static_cast<const uint16_t*>(p.weight);
    for (int64_t step = 0; step < depth; ++step)
        for (int64_t pair = 0; pair < 16; ++pair)
            for (int64_t block = 0; block < sides(p.width); ++block) {
                const int64_t row = (part + step) * kSide + 2 * pair;
                const uint16_t* even = weight + row * p.weight_stride + block * kSide;
                const uint32_t mask = row < p.vocabulary ? column_mask(p.width, block * kSide) : 0;
                uint16_t* to = packed + (block * depth + step) * kStep + pair * kSide;
                store_pairs(even, even + p.weight_stride, mask, row + 1 < p.vocabulary, to, to + kStep / 2);
            }
}

// Rounds the sums of 32 tokens x 32 columns into dx.
void store_block(const InputGradientParams& p, int64_t token, int64_t column, const float* sums) {
    bfloat16* dx = static_cast<bfloat16*>(p.dx);
    for (int64_t row = 0; row < std::min(kSide, p.tokens - token); ++row)
        for (int64_t half = 0; half < 2; ++half) {
            const int64_t first = column + half * 16, count = std::min<int64_t>(16, p.width - first);
            const float* line = sums + row / 16 * 512 + half * 256 + row % 16 * 16;
            bfloat16* to = dx + (token + row) * p.width + first;
            if (count == 16)
                store(to, load(line));
            else if (count > 0)
                store(to, load(line), count);
        }
}

}  // namespace

void input_gradient(const InputGradientParams& p) {
    const int64_t all = sides(p.vocabulary), columns = sides(p.width);
    parallel_for(ceil_div(sides(p.tokens), kTaskBlocks), p.threads, [&](int64_t task) {
        const int64_t first = task * kTaskBlocks * kSide;
        const int64_t blocks = std::min(kTaskBlocks, sides(p.tokens - first));
        Workspace& workspace = Workspace::of_this_thread();
        const int64_t g_elements = blocks * kDepth * kStep, weight_elements = columns * kDepth * kStep;
        workspace.reserve(
            static_cast<size_t>(2 * (g_elements + weight_elements) + 4 * blocks * columns * kSums));
        uint16_t* g = workspace.take<uint16_t>(g_elements);
        uint16_t* weight = workspace.take<uint16_t>(weight_elements);
        float* sums = workspace.take<float>(blocks * columns * kSums);
        const AmxTiles tiles;
        for (int64_t part = 0; part < all; part += kDepth) {
            const int64_t depth = std::min(kDepth, all - part);
            pack_dlogits(p, first, blocks, part, depth, g);
            pack_weight(p, part, depth, weight);
            for (int64_t column = 0; column < columns; ++column)
                for (int64_t block = 0; block < blocks; ++block)
                    add_block(g + block * depth * kStep, weight + column * depth * kStep, depth, part == 0,
                              sums + (column * blocks + block) * kSums);
        }
        for (int64_t column = 0; column < columns; ++column)
            for (int64_t block = 0; block < blocks; ++block)
                store_block(p, first + block * kSide, column * kSide,
                            sums + (column * blocks + block) * kSums);
    });
}

}  // namespace lmkern

#endif
