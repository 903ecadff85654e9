// What the products under linear + cross-entropy pass: filled by lmkern/kernels/linear_cross_entropy/cpu.py,
// field for field, 8 bytes each.
#pragma once

#include <cstdint>

namespace lmkern {

struct WeightGradientParams {
    const void* x;        // (T, E) bfloat16, rows x_stride elements apart
    const void* dlogits;  // (T, V) bfloat16, rows dlogits_stride elements apart
    void* packed_x;       // scratch: E and T rounded up to 32, bfloat16
    float* sums;          // V and E rounded up to 32, kept from one chunk of tokens to the next
    void* dweight;        // (V, E) bfloat16, contiguous
    int64_t x_stride, dlogits_stride, tokens, vocabulary, width;
    int64_t first;  // 1: there is nothing in sums yet
    int64_t threads;
};

struct InputGradientParams {
    const void* dlogits;  // (T, V) bfloat16, rows dlogits_stride elements apart
    const void* weight;   // (V, E) bfloat16, rows weight_stride elements apart
    void* dx;             // (T, E) bfloat16, contiguous
    int64_t dlogits_stride, weight_stride, tokens, vocabulary, width;
    int64_t threads;
};

}  // namespace lmkern
