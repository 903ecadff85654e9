// Layer norm on the CPU. Contract: lmkern/kernels/layer_norm/__init__.py.
#pragma once

#include "layer_norm/params.hpp"

namespace lmkern {

// Reads x, weight, bias; writes y, mean, rstd.
void layer_norm_forward(const LayerNormParams& p);

// Reads x, weight, mean, rstd, dy; writes those of dx, dweight and dbias that are not null.
void layer_norm_backward(const LayerNormParams& p);

}  // namespace lmkern
