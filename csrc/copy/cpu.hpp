// Casts and transposing copies on the CPU. Contract: lmkern/kernels/copy/__init__.py.
#pragma once

#include "copy/params.hpp"

namespace lmkern {

// Reads x; writes y.
void copy_forward(const CopyParams& p);

// The transposed half of it.
void transposed_copy(const CopyParams& p);

}  // namespace lmkern
