"""The arguments of attention: ValueError in words for what makes no sense, and one form for the rest."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lmkern.kernels.attention import Options
from lmkern.kernels.checked import checked
from lmkern.kernels.philox import threshold
from lmkern.kernels.statistics import statistics_dtype
from lmkern.ops.dispatch import DTYPE_NAMES, DTYPES, autocast, int32


def check_shapes(
    name: str, q: Tensor, k: Tensor, v: Tensor, *, grouped: bool = True, same_width: bool = True
) -> None:
    """Of q, k and v, and that they lie on one device."""

    def fail(what: str, got: str) -> None:
        raise ValueError(f"{name}: {what}; got {got}")

    if not (q.dim() == k.dim() == v.dim() == 4):
        fail("q, k and v must be (B, H, N, D)", shapes(q, k, v))
    if not (q.device == k.device == v.device):
        fail("q, k and v must be on one device; move them with .to()", f"{q.device}, {k.device}, {v.device}")
    (B, H, _, D), (B_k, H_kv, N_k, D_k), (B_v, H_v, N_v, D_v) = q.shape, k.shape, v.shape
    if D_k != D or D < 1 or (same_width and D_v != D):
        fail("q, k and v must share head_dim", shapes(q, k, v))
    if not (B == B_k == B_v):
        fail("q, k and v must share the batch size", shapes(q, k, v))
    if H_kv != H_v or N_k != N_v:
        fail("k and v must share heads and length", shapes(q, k, v))
    if H_kv != H and (not grouped or H_kv == 0 or H % H_kv):
        rule = "the number of query heads must be a multiple of the key/value heads"
        fail(
            rule if grouped else "q and k must share the number of heads unless enable_gqa=True",
            shapes(q, k, v),
        )


def cast(
    name: str, q: Tensor, k: Tensor, v: Tensor, what: str = "q, k and v"
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, what the caller calls so, in the dtype to compute in: autocast's, or the one they share."""
    q, k, v = autocast(q, k, v)
    if q.dtype not in DTYPES or not (q.dtype == k.dtype == v.dtype):
        raise ValueError(
            f"{name}: {what} must share one dtype of {DTYPE_NAMES}; cast them first; "
            f"got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    return q, k, v


def checked_band(
    name: str, window: tuple[int | None, int | None] | None, causal: bool
) -> tuple[int | None, int | None]:
    """left and right of a window, causal or not."""
    if window is None:
        return None, 0 if causal else None
    if (
        not isinstance(window, tuple | list)
        or len(window) != 2
        or any(bound is not None and bound < 0 for bound in window)
    ):
        raise ValueError(
            f"{name}: window must be (left, right), each at least 0 or None for no bound; got {window!r}"
        )
    left, right = window
    return left, 0 if causal else right


def checked_dropout(
    name: str, dropout_p: float, seed: Tensor | None, q: Tensor
) -> tuple[float, Tensor | None]:
    """The probability and its seed: the one given, or one from torch's generator; 0 and None without."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{name}: dropout_p must lie in [0, 1]; got {dropout_p}")
    if seed is not None:
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise ValueError(
                f"{name}: dropout_seed must be an int64 tensor without dimensions; "
                f"got {seed.dtype} {tuple(seed.shape)}"
            )
        check_device(name, "dropout_seed", seed, q)
    if not threshold(dropout_p):
        return 0.0, None
    if seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=q.device)
    return dropout_p, seed


def checked_bias(name: str, what: str, bias: Tensor, q: Tensor, scores: tuple[int, ...]) -> Tensor:
    """A bias as the contract takes it: 4 dimensions; in q's dtype, or that of q's statistics."""
    if not bias.dtype.is_floating_point:
        raise ValueError(f"{name}: {what} must be floating; got {bias.dtype}")
    check_broadcast(name, what, bias, scores)
    check_device(name, what, bias, q)
    if bias.dtype == torch.float64 and q.dtype != torch.float64:
        raise ValueError(f"{name}: {what} must be no wider than q; got {bias.dtype} and {q.dtype}")
    wide = statistics_dtype(q)
    return _four_dimensional(bias if bias.dtype in (q.dtype, wide) else bias.to(wide))


def checked_mask(name: str, what: str, mask: Tensor, q: Tensor, scores: tuple[int, ...]) -> Tensor:
    """A boolean mask with 4 dimensions."""
    if mask.dtype != torch.bool:
        raise ValueError(f"{name}: {what} must be boolean (True: seen); got {mask.dtype}")
    check_broadcast(name, what, mask, scores)
    check_device(name, what, mask, q)
    return _four_dimensional(mask)


def checked_relative_bias(name: str, relative_bias: Tensor, q: Tensor, n_k: int) -> Tensor:
    """(H or 1, 2 R + 1) in the dtype of q's statistics, contiguous."""
    heads, reach = q.shape[1], max(q.shape[2], n_k) - 1
    if (
        relative_bias.dim() != 2
        or relative_bias.shape[0] not in (1, heads)
        or relative_bias.shape[1] % 2 == 0
        or relative_bias.shape[1] < 2 * reach + 1
    ):
        raise ValueError(
            f"{name}: relative_bias must be ({heads} or 1, 2 R + 1) with R at least {max(reach, 0)}, "
            f"the longer of q and k less one; got {tuple(relative_bias.shape)}"
        )
    return _statistics(name, "relative_bias", relative_bias, q)


def checked_per_head(name: str, what: str, x: Tensor, q: Tensor) -> Tensor:
    """(H,) in the dtype of q's statistics, contiguous."""
    if x.shape != q.shape[1:2]:
        raise ValueError(f"{name}: {what} must be ({q.shape[1]},), one a query head; got {tuple(x.shape)}")
    return _statistics(name, what, x, q)


def checked_lengths(
    name: str, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, q: Tensor, k: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """cu_seqlens of queries and keys as the contract takes them. Their values: `check_documents`."""
    if cu_seqlens is None:
        if cu_seqlens_k is not None:
            raise ValueError(f"{name}: cu_seqlens_k needs cu_seqlens, the queries' beside it; got None")
        return None, None
    if cu_seqlens_k is None:
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"{name}: q and k of one length, or cu_seqlens_k beside cu_seqlens, expected; "
                f"got lengths {q.shape[2]} and {k.shape[2]}"
            )
        cu_seqlens_k = cu_seqlens
    if q.shape[0] != 1:
        raise ValueError(f"{name}: packed documents need a batch of 1, all in a row; got B = {q.shape[0]}")
    for what, x in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        check_cu_seqlens(name, what, x)
        check_device(name, what, x, q)
    if cu_seqlens.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{name}: cu_seqlens and cu_seqlens_k must have as many documents; "
            f"got {cu_seqlens.shape[0] - 1} and {cu_seqlens_k.shape[0] - 1}"
        )
    # One tensor where it is one: a backend then reads it once.
    queries = int32(cu_seqlens).contiguous()
    return queries, queries if cu_seqlens_k is cu_seqlens else int32(cu_seqlens_k).contiguous()


def check_documents(name: str, options: Options, n_q: int, n_k: int) -> None:
    """That cu_seqlens begin at 0, never fall and end at the lengths of q and k.

    Only on the CPU, where looking costs nothing; on a GPU it would wait for everything queued there, and is
    done with LMKERN_CHECKED=1 alone.
    """
    if options.cu_seqlens_q is None:
        return
    for what, x, tokens in (
        ("cu_seqlens", options.cu_seqlens_q, n_q),
        ("cu_seqlens_k", options.cu_seqlens_k, n_k),
    ):
        if x is not None:
            check_ends(name, what, x, tokens)


def check_cu_seqlens(name: str, what: str, x: Tensor) -> None:
    """Of shape and dtype."""
    if x.dim() != 1 or not x.shape[0] or x.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: {what} must be (documents + 1,) int32 or int64; got {tuple(x.shape)} {x.dtype}"
        )


def check_ends(name: str, what: str, x: Tensor, tokens: int) -> None:
    """That cu_seqlens begin at 0, never fall and end at the number of tokens, where that is looked at."""
    if not checked(x):
        return
    ends = x.tolist()
    if ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in pairwise(ends)):
        raise ValueError(f"{name}: {what} must begin at 0, never fall and end at {tokens}; got {_few(ends)}")


def shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def check_broadcast(name: str, what: str, x: Tensor, scores: tuple[int, ...]) -> None:
    """That x broadcasts to the scores, and does not widen them."""
    try:
        fits = torch.broadcast_shapes(x.shape, scores) == torch.Size(scores)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{name}: {what} must broadcast to {scores}; got {tuple(x.shape)}")


def _statistics(name: str, what: str, x: Tensor, q: Tensor) -> Tensor:
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name}: {what} must be floating; got {x.dtype}")
    check_device(name, what, x, q)
    return x.to(statistics_dtype(q)).contiguous()


def check_device(name: str, what: str, x: Tensor, q: Tensor) -> None:
    """That x lies where q does."""
    if x.device != q.device:
        raise ValueError(
            f"{name}: {what} must be on q's device, {q.device}; move it with .to(); got {x.device}"
        )


def _four_dimensional(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x[(None,) * (4 - x.dim())]


def _few(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:8]))}, ...]"
