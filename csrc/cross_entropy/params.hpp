// What one call of cross-entropy passes: filled by lmkern/kernels/cross_entropy/cpu.py, field for field, 8
// bytes each.
#pragma once

#include <cstdint>

namespace lmkern {

struct CrossEntropyParams {
    const void* logits;      // (R, V), rows logits_stride elements apart
    const int64_t* targets;  // (R,) contiguous
    void* loss;              // (R,) float32 (float64 for float64)
    void* row_max;           // (R,) likewise: the largest logit, capped if they are
    void* log_sum;           // (R,) likewise: log sum exp of the logits less row_max
    const void* dloss;       // (R,) likewise, dloss_stride elements apart
    void* dlogits;           // (R, V), rows dlogits_stride apart; may be logits; null in forward: not wanted
    int64_t logits_stride, dloss_stride, dlogits_stride, rows, columns, ignore_index;
    double label_smoothing, z_loss;
    double softcap;  // 0: none
    int64_t dtype;   // Dtype of logits and dlogits
    int64_t tiles;   // 1: logits and dlogits lie in tiles, as linear_cross_entropy/params.hpp has them, whose
                     // rows of tiles are the strides apart. For bfloat16 where it is multiplied in pairs
    int64_t threads;
};

}  // namespace lmkern
