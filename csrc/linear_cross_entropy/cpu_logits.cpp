// logits (T, V) = x (T, E) weight^T (E, V) + bias.
//
// a is x, packed once a chunk; b is the weight, transposed, packed by the task that uses it.
#include "linear_cross_entropy/blocks.hpp"
#include "linear_cross_entropy/cpu.hpp"
#include "simd/transpose.hpp"

#if defined(__AVX512BF16__)

namespace lmkern {
namespace {

// packed[step][half][t][e] = x[32 block + 16 half + t][32 step + e]; 0 beyond x.
void pack_x(const LinearCrossEntropyParams& p, int64_t block, uint16_t* packed) {
    const uint16_t* x = static_cast<const uint16_t*>(p.x);
    for (int64_t t = 0; t < kSide; ++t)
        for (int64_t step = 0; step < sides(p.width); ++step) {
            const int64_t token = block * kSide + t, e = step * kSide;
            const uint32_t mask = token < p.tokens ? column_mask(p.width, e) : 0;
            _mm512_store_si512(packed + step * kStep + t * kSide,
                               _mm512_maskz_loadu_epi16(mask, x + token * p.x_stride + e));
        }
}

// packed[step][half][pair][v][2] = weight[32 panel + 16 half + v][32 step + 2 pair + .]; 0 beyond the weight.
void pack_weight(const LinearCrossEntropyParams& p, int64_t panel, uint16_t* packed) {
    const uint16_t* weight = static_cast<const uint16_t*>(p.weight);
    for (int64_t step = 0; step < sides(p.width); ++step)
        for (int64_t half = 0; half < 2; ++half, packed += kTile) {
            const int64_t first = panel * kSide + half * 16, e = step * kSide;
            __m512i rows[16];
#pragma GCC unroll 16
            for (int64_t v = 0; v < 16; ++v) {
                const uint32_t mask = first + v < p.vocabulary ? column_mask(p.width, e) : 0;
                rows[v] = _mm512_maskz_loadu_epi16(mask, weight + (first + v) * p.weight_stride + e);
            }
            transpose_registers(rows);
#pragma GCC unroll 16
            for (int64_t pair = 0; pair < 16; ++pair) _mm512_store_si512(packed + pair * kSide, rows[pair]);
        }
}

void store_logits(const LinearCrossEntropyParams& p, int64_t block, int64_t panel, float* sums) {
    if (p.bias != nullptr) {
        const int64_t v = panel * kSide;
        alignas(64) uint16_t bias[kSide];
        _mm512_store_si512(bias, _mm512_maskz_loadu_epi16(column_mask(p.vocabulary, v),
                                                          static_cast<const uint16_t*>(p.bias) + v));
        for (int64_t i = 0; i < kSums; i += 16)
            store(sums + i,
                  load(sums + i) + load(reinterpret_cast<const bfloat16*>(bias) + i / 256 % 2 * 16));
    }
    const BlockRows to = logits_rows(p, block, panel);
    for (int64_t half = 0; half < 2; ++half, sums += 512) {
        uint16_t* tile = const_cast<uint16_t*>(half == 0 ? to.upper : to.lower);
        for (int64_t t = 0; t < 16; ++t)
            _mm512_store_si512(tile + t * kSide, rounded(sums + t * 16, sums + 256 + t * 16));
    }
}

}  // namespace

void linear_logits(const LinearCrossEntropyParams& p) {
    const int64_t blocks = sides(p.tokens), panels = sides(p.vocabulary), steps = sides(p.width);
    uint16_t* x = static_cast<uint16_t*>(p.packed_x);
    parallel_for(blocks, p.threads, [&](int64_t block) { pack_x(p, block, x + block * steps * kStep); });
    const int64_t together = panels_of_task(steps);
    parallel_for(ceil_div(panels, together), p.threads, [&](int64_t task) {
        Workspace& workspace = Workspace::of_this_thread();
        workspace.reserve(static_cast<size_t>(2 * together * steps * kStep + 4 * kSums));
        uint16_t* weight = workspace.take<uint16_t>(together * steps * kStep);
        float* sums = workspace.take<float>(kSums);
        [[maybe_unused]] const Bf16Session session;
        const int64_t first = task * together, end = std::min(panels, first + together);
        for (int64_t panel = first; panel < end; ++panel)
            pack_weight(p, panel, weight + (panel - first) * steps * kStep);
        for (int64_t block = 0; block < blocks; ++block)
            for (int64_t panel = first; panel < end; ++panel) {
                add_block(packed_rows(x + block * steps * kStep), weight + (panel - first) * steps * kStep,
                          steps, false, sums);
                store_logits(p, block, panel, sums);
            }
    });
}

}  // namespace lmkern

#endif
