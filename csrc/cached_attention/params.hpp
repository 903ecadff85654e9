// What one call of cached attention passes, 8 bytes a field: filled by
// lmkern/kernels/cached_attention/cpu.py.
#pragma once

#include <cstdint>

#include "attention/params.hpp"

namespace lmkern {

struct CachedAttentionParams {
    const void* q;              // (B, H, N_q, D)
    const void* k;              // (B, H_kv, N_max, D); with pages (pages, H_kv, page_size, D)
    const void* v;              // likewise
    void* out;                  // (B, H, N_q, D)
    void* lse;                  // (B, H, N_q) contiguous, float32 (float64 for float64)
    const int32_t* lengths;     // (B,), or null: n_max keys each
    const int32_t* page_table;  // (B, n_max / page_size), or null: no pages
    const void* sinks;          // (H,) float32 (float64), or null
    const void* alibi_slopes;   // (H,) likewise, or null
    // (B, H_kv, ceil(n_max / split), H / H_kv * N_q, 2 + D rounded up to 16) float32 (float64): of each range
    // of keys the maxima, sums and accumulated values
    void* partials;
    Strides q_strides, k_strides, v_strides, out_strides;
    int64_t batch, heads, heads_kv, n_q, n_max, head_dim;
    int64_t page_size, page_table_stride;
    int64_t split;  // keys of a range, a multiple of 64
    int64_t left;   // a query at position p sees the keys p - left <= j <= p; negative: every j <= p
    double softmax_scale, softcap;  // softcap: 0 for none
    int64_t dtype;                  // Dtype
    int64_t threads;
};

}  // namespace lmkern
