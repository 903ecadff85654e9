// Attention on the CPU: out = softmax(q k^T softmax_scale) v and its gradients. Contract:
// lmkern/kernels/attention/__init__.py.
#pragma once

#include "attention/params.hpp"

namespace lmkern {

// Reads q, k, v; writes out and lse.
void attention_forward(const AttentionParams& p);

// Reads q, k, v, out, lse, dout and dlse; writes those of dq, dk, dv, dbias and
// drelative_bias that are not null.
void attention_backward(const AttentionParams& p);

}  // namespace lmkern
