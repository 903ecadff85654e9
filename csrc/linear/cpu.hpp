// Linear maps of a few rows on the CPU. Contract: lmkern/kernels/linear/__init__.py.
#pragma once

#include "linear/params.hpp"

namespace lmkern {

// Reads x, weight, bias; writes y.
void linear_forward(const LinearParams& p);

}  // namespace lmkern
