// Layer norm on NVIDIA GPUs. Contract: lmkern/kernels/layer_norm/__init__.py. Both enqueue on the stream and
// return; std::runtime_error when the GPU refuses the launch.
#pragma once

#include "layer_norm/params.hpp"

namespace lmkern::cuda {

// Reads x, weight, bias; writes y, mean, rstd.
void layer_norm_forward(const LayerNormParams& p);

// Reads x, weight, mean, rstd, dy; writes those of dx, dweight and dbias that are not null, through partials.
void layer_norm_backward(const LayerNormParams& p);

}  // namespace lmkern::cuda
