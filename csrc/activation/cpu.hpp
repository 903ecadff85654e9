// Activations on the CPU. Contract: lmkern/kernels/activation/__init__.py.
#pragma once

#include "activation/params.hpp"

namespace lmkern {

// Reads x, bias; writes y.
void activation_forward(const ActivationParams& p);

// Reads x, bias, dy; writes those of dx and dbias that are not null.
void activation_backward(const ActivationParams& p);

}  // namespace lmkern
