// AdamW on the CPU. Contract: lmkern/kernels/adamw/__init__.py.
#pragma once

#include "adamw/params.hpp"

namespace lmkern {

// Reads grad; updates param, exp_avg and exp_avg_sq; writes copy where it is not null.
void adamw_step(const AdamwParams& p);

}  // namespace lmkern
