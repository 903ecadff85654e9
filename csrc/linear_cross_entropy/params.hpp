// What the products under linear + cross-entropy pass, for one chunk of tokens: filled by
// lmkern/kernels/linear_cross_entropy/bf16.py, field for field, 8 bytes each.
//
// logits and, in their place, dlogits lie in tiles of 16 tokens x 32 columns, row by row of tiles, T rounded
// up to 32 tokens. Tiles are what a product reads, and come from memory whole.
#pragma once

#include <cstdint>

namespace lmkern {

struct LinearCrossEntropyParams {
    const void* x;       // (T, E) bfloat16, rows x_stride elements apart
    const void* weight;  // (V, E) bfloat16, rows weight_stride elements apart
    const void* bias;    // (V,) bfloat16, contiguous; null: none
    void* logits;        // (T / 16, V / 32, 16, 32) bfloat16
    void* packed_x;      // scratch: T and E rounded up to 32, bfloat16
    float* sums;         // V and E rounded up to 32, kept from one chunk to the next
    void* dx;            // (T, E) bfloat16, contiguous
    void* dweight;       // (V, E) bfloat16, contiguous
    int64_t x_stride, weight_stride, tokens, vocabulary, width;
    int64_t first;  // 1: there is nothing in sums yet
    int64_t threads;
};

}  // namespace lmkern
