// What one call of attention passes, 8 bytes a field: filled by lmkern/kernels/attention/cpu.py.
#pragma once

#include <cstdint>

namespace lmkern {

// Elements between neighbours along each dimension.
struct Strides {
    int64_t batch, head, row, column;
};

struct AttentionParams {
    const void* q;     // (B, H, N_q, D)
    const void* k;     // (B, H_kv, N_k, D)
    const void* v;     // (B, H_kv, N_k, D)
    void* out;         // (B, H, N_q, D)
    void* lse;         // (B, H, N_q) contiguous, float32 (float64 for float64)
    const void* dout;  // (B, H, N_q, D)
    const void* dlse;  // (B, H, N_q) contiguous, or null
    void* dq;          // (B, H, N_q, D), or null: not wanted
    void* dk;          // (B, H_kv, N_k, D), or null
    void* dv;          // (B, H_kv, N_k, D), or null
    Strides q_strides, k_strides, v_strides, out_strides, dout_strides, dq_strides, dk_strides, dv_strides;
    int64_t batch, heads, heads_kv, n_q, n_k, head_dim;
    int64_t has_diagonal, diagonal;  // query i sees the keys j <= i + diagonal
    double softmax_scale;
    int64_t dtype;  // Dtype
    int64_t threads;
};

// One past the last key that a query sees.
inline int64_t visible_keys(const AttentionParams& p, int64_t query) {
    if (!p.has_diagonal) return p.n_k;
    const int64_t end = query + p.diagonal + 1;
    return end < 0 ? 0 : (end < p.n_k ? end : p.n_k);
}

}  // namespace lmkern
