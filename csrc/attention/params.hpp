// What one call of attention passes, 8 bytes a field: filled by lmkern/kernels/attention/cpu.py.
// lmkern/kernels/attention/__init__.py says what each option means.
#pragma once

#include <algorithm>
#include <cstdint>

namespace lmkern {

// The widest heads that the kernels on a CPU have room for (lmkern/kernels/attention/cpu.py: MAX_HEAD_DIM).
constexpr int64_t kMaxHeadDim = 256;

// Elements between neighbours along each dimension; 0 where a tensor is broadcast.
struct Strides {
    int64_t batch, head, row, column;
};

// C below: float32, float64 for float64 inputs.
struct AttentionParams {
    const void* q;                // (B, H, N_q, D)
    const void* k;                // (B, H_kv, N_k, D)
    const void* v;                // (B, H_kv, N_k, D)
    void* out;                    // (B, H, N_q, D)
    void* lse;                    // (B, H, N_q) contiguous, C
    const void* dout;             // (B, H, N_q, D)
    const void* dlse;             // (B, H, N_q) contiguous, C, or null
    void* dq;                     // (B, H, N_q, D), or null: not wanted
    void* dk;                     // (B, H_kv, N_k, D), or null
    void* dv;                     // (B, H_kv, N_k, D), or null
    const void* bias;             // (B, H, N_q, N_k) through its strides, bias_dtype, or null
    const uint8_t* mask;          // (B, H, N_q, N_k) through its strides, 0: hidden, or null
    const void* relative_bias;    // (H or 1, 2 relative_radius + 1), C, or null
    const void* sinks;            // (H,), C, or null
    void* dbias;                  // as bias is, C, zeroed, or null
    void* drelative_bias;         // (sequences, H, 2 relative_radius + 1), double, zeroed, or null
    const int32_t* cu_seqlens_q;  // (sequences + 1,), or null
    const int32_t* cu_seqlens_k;  // likewise
    Strides q_strides, k_strides, v_strides, out_strides, dout_strides, dq_strides, dk_strides, dv_strides;
    Strides bias_strides, mask_strides, dbias_strides;
    int64_t batch, heads, heads_kv, n_q, n_k, head_dim;
    int64_t sequences;    // documents, or batch
    int64_t left, right;  // keys seen before and after a query's position; kUnbounded: all
    int64_t top_left;     // whether a query's position is its index
    int64_t relative_radius, relative_head_stride;
    int64_t dropout_threshold;  // of 65536; 0: no dropout
    int64_t seed;
    double softmax_scale, softcap;
    int64_t exact_lse;          // whether lse is a result, and not only for the backward pass
    int64_t dtype, bias_dtype;  // Dtype
    int64_t threads;
};

constexpr int64_t kUnbounded = int64_t{1} << 40;

// One sequence of a call: a batch element or a document.
struct Sequence {
    int64_t index, batch;
    int64_t first_query, n_q;  // within the tensors
    int64_t first_key, n_k;
    int64_t offset;  // a query's position less its index
};

constexpr Sequence sequence_of(const AttentionParams& p, int64_t index) {
    Sequence s{index, index, 0, p.n_q, 0, p.n_k, 0};
    if (p.cu_seqlens_q != nullptr) {
        s.batch = 0;
        s.first_query = p.cu_seqlens_q[index];
        s.n_q = p.cu_seqlens_q[index + 1] - s.first_query;
        s.first_key = p.cu_seqlens_k[index];
        s.n_k = p.cu_seqlens_k[index + 1] - s.first_key;
    }
    s.offset = p.top_left ? 0 : s.n_k - s.n_q;
    return s;
}

// The keys that queries of a sequence see, apart from masks: from begin(query) to end(query), neither of
// which falls as the query grows. No query sees a key where end <= begin.
struct Band {
    int64_t n_k, before, after;

    constexpr Band(const AttentionParams& p, const Sequence& s)
        : n_k(s.n_k), before(s.offset - p.left), after(s.offset + p.right + 1) {}

    constexpr int64_t begin(int64_t query) const { return std::clamp<int64_t>(query + before, 0, n_k); }
    constexpr int64_t end(int64_t query) const { return std::clamp<int64_t>(query + after, 0, n_k); }
    // The first query that may see the key, and one past the last; not clamped.
    constexpr int64_t first_query(int64_t key) const { return key - after + 1; }
    constexpr int64_t end_query(int64_t key) const { return key - before + 1; }
};

}  // namespace lmkern
