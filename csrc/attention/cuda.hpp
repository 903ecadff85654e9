// Attention on NVIDIA GPUs of compute capability 9.0. Contract: lmkern/kernels/attention/__init__.py; which
// part of it is taken: lmkern/kernels/attention/cuda.py. All enqueue on the stream and return;
// std::runtime_error, with the shapes, when the GPU refuses.
#pragma once

#include <cstdint>

#include "attention/params.hpp"

namespace lmkern {

// What a call passes beside AttentionParams.
struct CudaAttentionParams {
    AttentionParams attention;
    void* delta;   // (B, H, N_q) float32: rowsum(dout * out) - dlse
    void* dq_sum;  // (B, H, N_q, D) float32, zeroed
    void* turns;   // (B * H * query blocks,) int32, zeroed: the key block that adds to a block of dq next
    int64_t processors, device, stream;
};

namespace cuda {

// Reads q, k, v; writes out and lse.
void attention_forward(const CudaAttentionParams& p);

// Reads q, k, v, out, lse, dout, dlse; writes dq, dk, dv through delta and dq_sum.
void attention_backward(const CudaAttentionParams& p);

}  // namespace cuda
}  // namespace lmkern
