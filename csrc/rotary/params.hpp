// What one call of rotary passes: filled by lmkern/kernels/rotary/cpu.py, field for field, 8 bytes each.
#pragma once

#include <cstdint>

namespace lmkern {

struct RotaryParams {
    const void* x;                       // (B, H, N, D), elements of a row next to each other
    void* y;                             // the same shape, likewise; may be x
    const float* cos;                    // (positions, pairs), rows table_stride elements apart
    const float* sin;                    // likewise
    const int64_t* positions;            // (B, N) contiguous; or null: offset + n
    int64_t x_strides[3], y_strides[3];  // of B, H, N
    int64_t batch, heads, tokens, head_dim;
    int64_t pairs;  // the first 2 pairs columns of a row turn, the others are copied
    int64_t table_stride, offset;
    int64_t interleaved, inverse;
    int64_t dtype, threads;
};

}  // namespace lmkern
