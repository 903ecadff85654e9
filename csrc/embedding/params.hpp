// What one call of embedding passes: filled by lmkern/kernels/embedding/cpu.py, field for field, 8 bytes
// each.
#pragma once

#include <cstdint>

namespace lmkern {

struct EmbeddingParams {
    const int64_t* tokens;  // (N,); forward throws std::out_of_range unless each lies in [0, V)
    const void* weight;     // (V, E) contiguous
    void* y;                // (N, E) contiguous
    const void* dy;         // (N, E), rows dy_stride elements apart
    void* dweight;          // (V, E) contiguous
    int64_t* starts;        // (V + 1,) scratch
    int64_t* order;         // (N,) scratch
    int64_t dy_stride, count, columns, vocabulary;  // count: N
    int64_t padding_idx;                            // its row of dweight is zero; -1: none
    int64_t dtype, threads;
};

}  // namespace lmkern
