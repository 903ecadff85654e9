"""Attention of the newest tokens over a cache of keys and values, for inference: no gradients.

The contract of every backend.

    forward(q, k_cache, v_cache, options) -> (out, lse)

    q, out              (B, H, N_q, D)        the newest tokens; any strides in; out is laid out as
                                              torch.empty_like(q) is
    k_cache, v_cache    (B, H_kv, N_max, D)   any strides; H is a multiple of H_kv; query head h reads
                                              key/value head h // (H / H_kv)
        with pages      (pages, H_kv, page_size, D)
    lse                 (B, H, N_q)           log-sum-exp of each query's scores, natural log; float32,
                                              float64 for float64 inputs; -inf for a query that sees no key
                                              and has no sink
    options             options.py

Sequence b has n = lengths[b] keys, those of the newest tokens among them. Query i stands at p = n - N_q + i
and sees the keys p - left <= j <= p; below p = 0 it sees none and has out = 0. Memory of the caches past n
and of keys before every window is not read, whatever it holds.

    score = softcap(q . k * softmax_scale) - alibi_slope * (p - j)

Scores, statistics and sums are at least float32.
"""

from lmkern.kernels.cached_attention.options import Options

BACKENDS = ("triton", "cpu", "reference")
PASSES = ("forward",)

__all__ = ["BACKENDS", "PASSES", "Options"]
