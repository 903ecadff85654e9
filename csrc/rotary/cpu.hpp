// Rotary positions on the CPU. Contract: lmkern/kernels/rotary/__init__.py.
#pragma once

#include "rotary/params.hpp"

namespace lmkern {

// Reads x, cos, sin, positions; writes y. The backward pass is the same with inverse.
void rotary_forward(const RotaryParams& p);

}  // namespace lmkern
