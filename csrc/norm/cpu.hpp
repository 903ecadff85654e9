// Layer norm and RMS norm on the CPU, alone or after dropout and the addition of a residual. Contracts:
// lmkern/kernels/{layer_norm,rms_norm,add_norm}/__init__.py.
#pragma once

#include "norm/params.hpp"

namespace lmkern {

// Reads x, residual, weight, bias; writes y, mean, rstd, and h where there is a residual.
void norm_forward(const NormParams& p);

// Reads h, weight, mean, rstd, dy, dh; writes those of dx, dresidual, dweight and dbias that are not null.
void norm_backward(const NormParams& p);

}  // namespace lmkern
