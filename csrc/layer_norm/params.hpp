// What one call of layer norm passes: filled by lmkern/kernels/layer_norm/{cpu,cuda}.py, field for field, 8
// bytes each.
#pragma once

#include <cstdint>

namespace lmkern {

struct LayerNormParams {
    const void* x;       // (R, E), rows x_stride elements apart
    const void* weight;  // (E,) or null
    const void* bias;    // (E,) or null
    void* y;             // (R, E) contiguous
    void* mean;          // (R,) float32 (float64 for float64)
    void* rstd;          // (R,) likewise
    const void* dy;      // (R, E), rows dy_stride elements apart
    void* dx;            // (R, E) contiguous, or null: not wanted
    void* partials;      // (chunks, 2, E) float32 (float64): dweight and dbias of a chunk of rows; or null
    void* dweight;       // (E,) float32 (float64), or null
    void* dbias;         // (E,) float32 (float64), or null
    int64_t x_stride, dy_stride, rows, columns, chunks;
    double eps;
    int64_t dtype, parameter_dtype;  // Dtype of x and of weight and bias
    int64_t threads;                 // CPU
    int64_t device, stream;          // CUDA
};

}  // namespace lmkern
