// Cross-entropy on the CPU. Contract: lmkern/kernels/cross_entropy/__init__.py.
#pragma once

#include "cross_entropy/params.hpp"

namespace lmkern {

// Reads logits and targets; writes loss, row_max and log_sum, and dlogits too if that is not null.
void cross_entropy_forward(const CrossEntropyParams& p);

// Reads logits, targets, row_max, log_sum and dloss; writes dlogits.
void cross_entropy_backward(const CrossEntropyParams& p);

}  // namespace lmkern
