// What one call of AdamW passes: filled by lmkern/kernels/adamw/cpu.py, field for field, 8 bytes each.
#pragma once

#include <cstdint>

namespace lmkern {

struct AdamwParams {
    void* param;       // (n,), updated
    const void* grad;  // (n,)
    void* exp_avg;     // (n,) float32 (float64 for float64), updated
    void* exp_avg_sq;  // (n,) likewise
    void* copy;        // (n,) bfloat16: the new parameter once more; or null
    int64_t count;     // n
    double decay;      // 1 - lr weight_decay
    double one_minus_beta1, beta2;
    double step_size;          // lr / (1 - beta1^step)
    double second_correction;  // sqrt(1 - beta2^step)
    double eps, grad_scale;
    int64_t param_dtype, grad_dtype, threads;
};

}  // namespace lmkern
