// dx (T, E) = dlogits (T, V) weight (V, E).
//
// A task owns a part of dx, whose sums stay in the second cache while V goes by in parts: a is dlogits, as it
// lies, b is the weight, packed as it comes.
#include "linear_cross_entropy/blocks.hpp"
#include "linear_cross_entropy/cpu.hpp"

#if defined(__AVX512BF16__)

namespace lmkern {
namespace {

constexpr int64_t kTaskBlocks = 16, kTaskColumns = 12;  // of 32 tokens, of 32 columns at most
// Steps of a part: 16 KB of either factor.
constexpr int64_t kDepth = 8;

// packed[block][step][half][pair][e][2] = weight[32 step + 2 pair + .][32 block + 16 half + e], for blocks
// and steps from first and part on; 0 beyond the weight.
void pack_weight(const LinearCrossEntropyParams& p, int64_t first, int64_t columns, int64_t part,
                 int64_t depth, uint16_t* packed) {
    const uint16_t* weight = static_cast<const uint16_t*>(p.weight);
    for (int64_t step = 0; step < depth; ++step)
        for (int64_t pair = 0; pair < 16; ++pair)
            for (int64_t block = 0; block < columns; ++block) {
                const int64_t row = (part + step) * kSide + 2 * pair, e = (first + block) * kSide;
                const uint16_t* even = weight + row * p.weight_stride + e;
                const uint32_t mask = row < p.vocabulary ? column_mask(p.width, e) : 0;
                uint16_t* to = packed + (block * depth + step) * kStep + pair * kSide;
                store_pairs(even, even + p.weight_stride, mask, row + 1 < p.vocabulary, to, to + kTile);
            }
}

// Rounds the sums of 32 tokens x 32 columns into dx.
void store_block(const LinearCrossEntropyParams& p, int64_t token, int64_t column, const float* sums) {
    uint16_t* dx = static_cast<uint16_t*>(p.dx);
    for (int64_t t = 0; t < std::min(kSide, p.tokens - token); ++t) {
        const float* line = sums + t / 16 * 512 + t % 16 * 16;
        _mm512_mask_storeu_epi16(dx + (token + t) * p.width + column, column_mask(p.width, column),
                                 rounded(line, line + 256));
    }
}

}  // namespace

void linear_input_gradient(const LinearCrossEntropyParams& p) {
    const int64_t all = sides(p.vocabulary), parts_of_tokens = ceil_div(sides(p.tokens), kTaskBlocks);
    // Fewer columns where there would be too few tasks. No sum depends on it.
    const int64_t task_columns =
        std::clamp<int64_t>(sides(p.width) * parts_of_tokens / p.threads, 1, kTaskColumns);
    const int64_t parts_of_width = ceil_div(sides(p.width), task_columns);
    parallel_for(parts_of_tokens * parts_of_width, p.threads, [&](int64_t task) {
        const int64_t first = task / parts_of_width * kTaskBlocks,
                      first_column = task % parts_of_width * task_columns;
        const int64_t blocks = std::min(kTaskBlocks, sides(p.tokens) - first);
        const int64_t columns = std::min(task_columns, sides(p.width) - first_column);
        Workspace& workspace = Workspace::of_this_thread();
        workspace.reserve(static_cast<size_t>(2 * columns * kDepth * kStep + 4 * blocks * columns * kSums));
        uint16_t* weight = workspace.take<uint16_t>(columns * kDepth * kStep);
        float* sums = workspace.take<float>(blocks * columns * kSums);
        [[maybe_unused]] const Bf16Session session;
        for (int64_t part = 0; part < all; part += kDepth) {
            const int64_t depth = std::min(kDepth, all - part);
            pack_weight(p, first_column, columns, part, depth, weight);
            for (int64_t column = 0; column < columns; ++column)
                for (int64_t block = 0; block < blocks; ++block)
                    add_block(logits_rows(p, first + block, part), weight + column * depth * kStep, depth,
                              part > 0, sums + (column * blocks + block) * kSums);
        }
        for (int64_t column = 0; column < columns; ++column)
            for (int64_t block = 0; block < blocks; ++block)
                store_block(p, (first + block) * kSide, (first_column + column) * kSide,
                            sums + (column * blocks + block) * kSums);
    });
}

}  // namespace lmkern

#endif
