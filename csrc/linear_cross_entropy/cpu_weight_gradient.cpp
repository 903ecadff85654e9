// dweight^T (E, V) = x^T (E, T) dlogits (T, V), summed in float32 over chunks of T tokens.
//
// a is x, transposed, packed once a chunk; b is dlogits, packed by the task that uses it. sums holds, for
// each 32 columns of dlogits and in it for each 32 columns of x, the four tiles of a block one after the
// other: they are read and written in the order of the addresses.
#include "linear_cross_entropy/blocks.hpp"
#include "linear_cross_entropy/cpu.hpp"

#if defined(__AVX512BF16__)

namespace lmkern {
namespace {

// packed[step][e][t] = x[32 step + t][32 block + e]; 0 beyond x.
void pack_x(const LinearCrossEntropyParams& p, int64_t block, uint16_t* packed) {
    const uint16_t* x = static_cast<const uint16_t*>(p.x) + block * kSide;
    const __mmask32 mask = column_mask(p.width, block * kSide);
    for (int64_t step = 0; step < sides(p.tokens); ++step, packed += kStep)
        bf16_transpose(
            [&](int t) {
                const int64_t token = step * kSide + t;
                return _mm512_maskz_loadu_epi16(token < p.tokens ? mask : 0, x + token * p.x_stride);
            },
            [&](int column, __m512i row) { _mm512_store_si512(packed + column * kSide, row); });
}

// packed[step][half][pair][column][2] = dlogits[32 step + 2 pair + .][32 panel + 16 half + column].
void pack_dlogits(const LinearCrossEntropyParams& p, int64_t panel, uint16_t* packed) {
    for (int64_t step = 0; step < sides(p.tokens); ++step, packed += kStep) {
        const BlockRows rows = logits_rows(p, step, panel);
        for (int64_t pair = 0; pair < 16; ++pair) {
            const uint16_t* even = (pair < 8 ? rows.upper : rows.lower) + pair % 8 * 2 * kSide;
            store_pairs(even, even + kSide, ~0u, true, packed + pair * kSide, packed + kTile + pair * kSide);
        }
    }
}

// Two tiles of sums, one above the other, into 16 rows of dweight.
void store_rows(const LinearCrossEntropyParams& p, int64_t first, int64_t e, const float* sums) {
    uint16_t* dweight = static_cast<uint16_t*>(p.dweight);
    alignas(64) float lines[2][256];
    transpose_square(sums, 16, lines[0], 16);
    transpose_square(sums + 512, 16, lines[1], 16);
    for (int64_t row = 0; row < std::min<int64_t>(16, p.vocabulary - first); ++row)
        _mm512_mask_storeu_epi16(dweight + (first + row) * p.width + e, column_mask(p.width, e),
                                 rounded(lines[0] + row * 16, lines[1] + row * 16));
}

}  // namespace

void linear_weight_gradient_add(const LinearCrossEntropyParams& p) {
    const int64_t blocks = sides(p.width), panels = sides(p.vocabulary), steps = sides(p.tokens);
    uint16_t* x = static_cast<uint16_t*>(p.packed_x);
    parallel_for(blocks, p.threads, [&](int64_t block) { pack_x(p, block, x + block * steps * kStep); });
    const int64_t together = panels_of_task(steps);
    parallel_for(ceil_div(panels, together), p.threads, [&](int64_t task) {
        Workspace& workspace = Workspace::of_this_thread();
        workspace.reserve(static_cast<size_t>(2 * together * steps * kStep));
        uint16_t* dlogits = workspace.take<uint16_t>(together * steps * kStep);
        [[maybe_unused]] const Bf16Session session;
        const int64_t first = task * together, end = std::min(panels, first + together);
        for (int64_t panel = first; panel < end; ++panel)
            pack_dlogits(p, panel, dlogits + (panel - first) * steps * kStep);
        for (int64_t block = 0; block < blocks; ++block)
            for (int64_t panel = first; panel < end; ++panel)
                add_block(packed_rows(x + block * steps * kStep), dlogits + (panel - first) * steps * kStep,
                          steps, !p.first, p.sums + (panel * blocks + block) * kSums);
    });
}

void linear_weight_gradient_store(const LinearCrossEntropyParams& p) {
    const int64_t blocks = sides(p.width), panels = sides(p.vocabulary);
    parallel_for(panels, p.threads, [&](int64_t panel) {
        const float* sums = p.sums + panel * blocks * kSums;
        for (int64_t block = 0; block < blocks; ++block, sums += kSums)
            for (int64_t half = 0; half < 2; ++half)
                store_rows(p, panel * kSide + half * 16, block * kSide, sums + half * 256);
    });
}

}  // namespace lmkern

#endif
