// What one call of an activation passes: filled by lmkern/kernels/activation/cpu.py, field for field, 8 bytes
// each. W is F, or 2F where the function gates.
#pragma once

#include <cstdint>

namespace lmkern {

// The codes that Python sends (lmkern/kernels/activation/cpu.py: FUNCTION_CODES).
enum class Function : int64_t { gelu = 0, gelu_tanh = 1, silu = 2, relu = 3, relu_squared = 4 };

struct ActivationParams {
    const void* x;     // (R, W), rows x_stride elements apart
    const void* bias;  // (W,) float32 (float64 for float64), or null
    void* y;           // (R, F) contiguous
    const void* dy;    // (R, F), rows dy_stride elements apart
    void* dx;          // (R, W) contiguous, or null: not wanted
    void* partials;    // (chunks, W) float32 (float64): dbias of a chunk of rows; or null
    void* dbias;       // (W,) float32 (float64), or null: not wanted
    int64_t x_stride, dy_stride, rows, columns, chunks;  // columns: F
    int64_t function, gated;
    int64_t dtype, threads;
};

}  // namespace lmkern
