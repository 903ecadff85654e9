// The products under linear + cross-entropy, in bfloat16. In the modules that multiply pairs of them.
#pragma once

#include "linear_cross_entropy/params.hpp"

namespace lmkern {

// logits = x weight^T + bias; 0, or the bias, for tokens beyond the last. Writes packed_x too.
void linear_logits(const LinearCrossEntropyParams& p);

// dx = dlogits weight.
void linear_input_gradient(const LinearCrossEntropyParams& p);

// sums += dlogits^T x in float32. Writes packed_x too.
void linear_weight_gradient_add(const LinearCrossEntropyParams& p);

// dweight = sums, rounded.
void linear_weight_gradient_store(const LinearCrossEntropyParams& p);

}  // namespace lmkern
