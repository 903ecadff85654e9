// The gradient of the weight under linear + cross-entropy, in bfloat16 with AMX, summed in float32 over
// chunks of tokens. In the module for AMX alone.
#pragma once

#include "linear_cross_entropy/params.hpp"

namespace lmkern {

// sums += dlogits^T x. Reads x and dlogits.
void weight_gradient_add(const WeightGradientParams& p);

// dweight = sums, rounded to bfloat16.
void weight_gradient_store(const WeightGradientParams& p);

// dx = dlogits weight. Reads dlogits and weight.
void input_gradient(const InputGradientParams& p);

}  // namespace lmkern
