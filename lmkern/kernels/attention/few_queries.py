"""Few queries over many keys: when a call of attention is one of cached attention, whatever the backend."""

from __future__ import annotations

from torch import Tensor

from lmkern.kernels.attention.options import Options
from lmkern.kernels.cached_attention.options import Options as CachedOptions

# For so few queries, of so many keys each, reading the keys takes longer than the products with them.
_MOST_QUERIES, _KEYS_A_QUERY = 8, 32


def as_cache(q: Tensor, k: Tensor, options: Options) -> CachedOptions | None:
    """What the call says to the same backend's cached attention, where it is of few queries and many keys;
    None where it is not, or asks for what cached attention does not do."""
    queries = q.shape[2]
    if queries > _MOST_QUERIES or k.shape[2] < _KEYS_A_QUERY * queries or not _sees_a_cache(queries, options):
        return None
    return CachedOptions(
        options.softmax_scale, left=options.left, softcap=options.softcap, sinks=options.sinks
    )


def _sees_a_cache(queries: int, options: Options) -> bool:
    """Whether the keys are a cache to the queries, and nothing else is asked for."""
    if (
        options.bias is not None
        or options.mask is not None
        or options.relative_bias is not None
        or options.cu_seqlens_q is not None
        or options.dropout_p > 0
    ):
        return False
    if options.left is None and options.right is None:
        return queries == 1
    return not options.top_left and (options.right == 0 or (queries == 1 and options.right is None))
