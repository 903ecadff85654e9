// What one call of linear passes: filled by lmkern/kernels/linear/cpu.py, field for field, 8 bytes each.
#pragma once

#include <cstdint>

namespace lmkern {

struct LinearParams {
    const void* x;       // (R, K), rows x_stride elements apart
    const void* weight;  // (N, K), rows weight_stride elements apart
    const void* bias;    // (N,) or null
    void* y;             // (R, N) contiguous
    int64_t x_stride, weight_stride;
    int64_t rows, outputs, inputs;  // R, N, K
    int64_t dtype, threads;
};

}  // namespace lmkern
