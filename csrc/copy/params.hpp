// What one call of copy passes: filled by lmkern/kernels/copy/cpu.py, field for field, 8 bytes each.
#pragma once

#include <cstdint>

namespace lmkern {

struct CopyParams {
    const void* x;                     // (B, R, C), elements of a row next to each other
    void* y;                           // (B, R, C), transposed (B, C, R), contiguous
    int64_t batch_stride, row_stride;  // of x
    int64_t batch, rows, columns;
    int64_t transposed;
    int64_t from_dtype, to_dtype, threads;
};

}  // namespace lmkern
