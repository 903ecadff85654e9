// Products of blocks of 32 x 32 sums computed a little at a time, so that other work comes between.
//
// AMX multiplies beside the vector units, as far as a core can look ahead: a few hundred instructions. In
// straight order it sees either tiles or vectors. Without AMX there is nothing beside the vector units, and a
// block is computed at once.
//
// A load that takes in several stores waits until they are written, and they wait for every tile that is stored
// before them: it would end what runs side by side. So what is queued is written field by field, never copied.
#pragma once

#include "simd/bf16_product.hpp"

#if defined(__AVX512BF16__)

namespace lmkern {

class Bf16Queue {
public:
    // Halves of steps, two tile products each, that wait; and of those the ones pushed with `first`.
    int64_t halves() const { return halves_[0] + halves_[1]; }
    int64_t first_halves() const { return halves_[0]; }

    // first: before all that wait without it.
    void push(Bf16Rows left, Bf16Right right, int64_t steps, float* sums, int64_t sum_stride, bool accumulate,
              bool first) {
#if defined(__AMX_BF16__)
        Ring& ring = rings_[first ? 0 : 1];
        Block& b = ring.blocks[ring.end++ % kBlocks];
        b.upper = left.upper;
        b.lower = left.lower;
        b.left_bytes = left.stride * 2;
        b.left_depth = left.depth_stride;
        b.right = right.data;
        b.right_depth = right.depth_stride;
        b.right_column = right.column_stride;
        b.sums = sums;
        b.sum_stride = sum_stride;
        b.halves = 2 * steps;
        b.accumulate = accumulate;
        halves_[first ? 0 : 1] += 2 * steps;
#else
        float* const below = sums + 16 * sum_stride;
        bf16_block<1>(left, right, steps, {{sums, sums + 16, below, below + 16}, sum_stride}, accumulate);
#endif
    }

    // The next half of a step, if there is one.
    [[gnu::always_inline]] void half() {
#if defined(__AMX_BF16__)
        if (current_ == nullptr) {
            if (halves() == 0) return;
            begin();
        }
        const Block& b = *current_;
        const int64_t step = half_ / 2;
        if (half_ % 2 == 0) {
            const bfloat16* right = b.right + step * b.right_depth;
            tile_load<4>(b.upper + step * b.left_depth, b.left_bytes);
            tile_load<6>(right, kTileRowBytes);
            tile_product<0, 4, 6>();
            tile_load<7>(right + b.right_column, kTileRowBytes);
            tile_product<1, 4, 7>();
        } else {
            tile_load<5>(b.lower + step * b.left_depth, b.left_bytes);
            tile_product<2, 5, 6>();
            tile_product<3, 5, 7>();
        }
        --halves_[ring_];
        if (++half_ == b.halves) end();
#endif
    }

    void finish_first() {
        while (halves_[0] > 0) half();
    }
    void finish() {
        while (halves() > 0) half();
    }

private:
    static constexpr uint64_t kBlocks = 32;

#if defined(__AMX_BF16__)
    [[gnu::always_inline]] void begin() {
        ring_ = halves_[0] > 0 ? 0 : 1;
        current_ = &rings_[ring_].blocks[rings_[ring_].first++ % kBlocks];
        half_ = 0;
        float *const above = current_->sums, *const below = above + 16 * current_->sum_stride;
        const int64_t bytes = current_->sum_stride * 4;
        if (current_->accumulate) {
            tile_load<0>(above, bytes);
            tile_load<1>(above + 16, bytes);
            tile_load<2>(below, bytes);
            tile_load<3>(below + 16, bytes);
        } else {
            tile_zero<0>();
            tile_zero<1>();
            tile_zero<2>();
            tile_zero<3>();
        }
    }
    [[gnu::always_inline]] void end() {
        float *const above = current_->sums, *const below = above + 16 * current_->sum_stride;
        const int64_t bytes = current_->sum_stride * 4;
        tile_store<0>(above, bytes);
        tile_store<1>(above + 16, bytes);
        tile_store<2>(below, bytes);
        tile_store<3>(below + 16, bytes);
        current_ = nullptr;
    }
#endif

    // Its sums = left right, or += with `accumulate`.
    struct Block {
        const bfloat16 *upper, *lower, *right;
        int64_t left_bytes, left_depth, right_depth, right_column;
        float* sums;
        int64_t sum_stride, halves;
        bool accumulate;
    };
    struct Ring {
        Block blocks[kBlocks];
        uint64_t first = 0, end = 0;
    };
    Ring rings_[2];
    const Block* current_ = nullptr;  // tiles hold its sums
    int64_t half_ = 0;
    int64_t halves_[2] = {0, 0};
    int ring_ = 0;
};

}  // namespace lmkern

#endif
