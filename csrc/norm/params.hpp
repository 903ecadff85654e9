// What one call of a norm passes: filled by lmkern/kernels/norm_call.py, field for field, 8 bytes each. One
// family serves layer_norm, rms_norm and add_norm.
#pragma once

#include <cstdint>

namespace lmkern {

struct NormParams {
    const void* x;         // (R, E), rows x_stride elements apart; backward does not read it
    const void* residual;  // (R, E), rows residual_stride apart, or null: h is x, and forward writes no h
    const void* weight;    // (E,) or null: ones
    const void* bias;      // (E,) or null: zeros; null without centring
    void* y;               // (R, E) contiguous
    void* h;               // (R, E), rows h_stride apart: written by forward, contiguous, read by backward
    void* mean;            // (R,) float32 (float64 for float64); null without centring
    void* rstd;            // (R,) likewise
    const void* dy;        // (R, E), rows dy_stride apart
    const void* dh;        // (R, E), rows dh_stride apart, or null: zeros
    void* dx;              // (R, E) contiguous, or null: not wanted
    void* dresidual;       // (R, E) contiguous, or null: not wanted
    void* partials;        // (chunks, 2, E) float32 (float64): dweight and dbias of a chunk of rows; on a
                           // GPU counters behind them
    void* dweight;         // (E,) float32 (float64), or null
    void* dbias;           // (E,) float32 (float64), or null
    int64_t x_stride, residual_stride, h_stride, dy_stride, dh_stride;
    int64_t rows, columns, chunks;
    double eps, offset;       // weight counts as offset + weight
    double keep_scale;        // what an element that dropout keeps is multiplied by
    int64_t keep_threshold;   // an element is dropped if its 16 random bits are less; 0: no dropout
    int64_t seed;             // the key of the random bits; on a GPU its address
    int64_t dtype;            // Dtype of x, y, dy and dx
    int64_t residual_dtype;   // of residual, h, dh and dresidual: dtype, or float32 beside a 16-bit one
    int64_t parameter_dtype;  // of weight and bias: likewise
    int64_t centred;          // 1: layer norm; 0: RMS norm
    int64_t threads;
};

}  // namespace lmkern
