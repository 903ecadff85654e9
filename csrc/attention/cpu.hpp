// Attention on the CPU: out = softmax(q k^T softmax_scale) v and its gradients. Contract:
// lmkern/kernels/attention/__init__.py.
#pragma once

#include "attention/params.hpp"
#include "core/types.hpp"

namespace lmkern {

// The types that attention takes in this module: with AMX float32 too, in three parts of bfloat16.
#if defined(__AMX_BF16__)
constexpr int64_t kAttentionTypes = kServedTypes | int64_t{1} << static_cast<int64_t>(Dtype::float32);
#else
constexpr int64_t kAttentionTypes = kServedTypes;
#endif

// Reads q, k, v; writes out and lse.
void attention_forward(const AttentionParams& p);

// Reads q, k, v, out, lse, dout and dlse; writes those of dq, dk, dv, dbias and
// drelative_bias that are not null.
void attention_backward(const AttentionParams& p);

}  // namespace lmkern
