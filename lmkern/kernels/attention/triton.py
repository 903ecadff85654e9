"""Attention on GPUs through Triton: grids, tile sizes and allocation. The kernels are in triton_kernels.py.

O(N) memory apart from a dense bias and its gradient, and no atomics: forward and backward give the same bits
every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import philox, triton_runtime, tuning
from lmkern.kernels.attention import Options
from lmkern.kernels.attention.few_queries import as_cache
from lmkern.kernels.attention.sinks import sink_gradient
from lmkern.kernels.backends import Call
from lmkern.kernels.cached_attention import triton as cached_attention
from lmkern.kernels.triton_runtime import unavailable

__all__ = ["NOTE", "backward", "constants", "delta_constants", "forward", "unavailable", "unsupported"]

MAX_HEAD_DIM = 256

# (BLOCK_M, BLOCK_N, num_warps, num_stages) of each kernel by (bytes an element, BLOCK_D). Chosen from the
# compiler's reports, not from timings: large tiles that spill nothing on sm_90 and keep within 99 KB of
# shared memory, which GPUs of compute capability 8.6, 8.9 and 12.0 have.
TILES: dict[str, dict[tuple[int, int], tuple[int, int, int, int]]] = {
    "forward": {
        (2, 32): (128, 64, 4, 3), (2, 64): (128, 64, 4, 3),
        (2, 128): (128, 64, 8, 2), (2, 256): (64, 32, 4, 2),
        (4, 32): (64, 32, 4, 2), (4, 64): (64, 32, 8, 2),
        (4, 128): (64, 16, 8, 2), (4, 256): (16, 16, 8, 2),
    },
    "dq": {
        (2, 32): (128, 64, 8, 2), (2, 64): (128, 64, 8, 2),
        (2, 128): (128, 32, 8, 2), (2, 256): (64, 16, 8, 2),
        (4, 32): (64, 32, 8, 2), (4, 64): (64, 32, 8, 2),
        (4, 128): (32, 16, 8, 2), (4, 256): (16, 16, 8, 2),
    },
    # dk and dv both stay in registers, which leaves head_dim 256 no tile of the 64 keys that wgmma needs.
    "dk_dv": {
        (2, 32): (64, 128, 8, 2), (2, 64): (32, 128, 8, 2),
        (2, 128): (32, 64, 8, 2), (2, 256): (32, 32, 8, 2),
        (4, 32): (16, 64, 4, 2), (4, 64): (16, 64, 8, 2),
        (4, 128): (16, 32, 8, 2), (4, 256): (16, 16, 8, 2),
    },
    "dbias": {
        (2, 32): (64, 64, 4, 1), (2, 64): (64, 64, 4, 1), (2, 128): (64, 64, 8, 1), (2, 256): (64, 32, 8, 1),
        (4, 32): (32, 32, 4, 1), (4, 64): (32, 32, 4, 1), (4, 128): (32, 32, 8, 1), (4, 256): (16, 16, 8, 1),
    },
    # BLOCK_M diagonals and queries, 2 BLOCK_M keys.
    "drelative": {
        (2, 32): (32, 64, 4, 1), (2, 64): (32, 64, 4, 1), (2, 128): (32, 64, 4, 1), (2, 256): (32, 64, 8, 1),
        (4, 32): (16, 32, 4, 1), (4, 64): (16, 32, 4, 1), (4, 128): (16, 32, 4, 1), (4, 256): (16, 32, 8, 1),
    },
}  # fmt: skip

# What a program reads or makes beside each score takes registers and shared memory: its tiles are smaller.
BESIDE: dict[str, tuple[int, int, int, int]] = {
    "forward": (64, 32, 4, 2), "dq": (64, 32, 4, 2), "dk_dv": (32, 64, 8, 2), "dbias": (64, 32, 8, 1),
    "drelative": (16, 32, 4, 1),
}  # fmt: skip

# Rows of the element-wise kernel that makes delta.
DELTA_ROWS = 64

# Bounds of the band beyond this are the same as none, and fit 32 bits with a length beside them.
_FAR = 1 << 30

# `_features` of a call without any: five arguments each for bias and mask, three each for the others.
_NO_FEATURES = (None, 0, 0, 0, 0, None, 0, 0, 0, 0, None, 0, 0, None, 0, 1.0)

NOTE = triton_runtime.NOTE


def unsupported(call: Call) -> str | None:
    if reason := triton_runtime.unsupported(call, float64=False):
        return reason
    q = call.tensors["q"]
    if q is not None and q.shape[3] > MAX_HEAD_DIM:
        return f"takes head_dim up to {MAX_HEAD_DIM}; got {q.shape[3]}"
    options: Options | None = call.options.get("options")
    if options is not None and options.bias is not None and options.bias.dtype == torch.float64:
        return "takes no float64 bias"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    from lmkern.kernels.attention import triton_kernels

    if (cached := as_cache(q, k, options)) is not None:
        return cached_attention.forward(q, k, v, cached)
    B, H, N, _ = q.shape
    out = torch.empty_like(q)
    lse = q.new_empty((B, H, N), dtype=torch.float32)
    grain, (q_, k_, v_, out_) = triton_runtime.strided(q, k, v, out)
    launch = constants("forward", grain, *_kind(q, options))
    with triton_runtime.device_of(q):
        blocks, documents = _blocks(options, options.cu_seqlens_q, N, launch["BLOCK_M"])
        if programs := B * H * blocks:
            triton_kernels.forward_kernel[(programs,)](
                *q_, *k_, *v_, *out_, lse, options.sinks, *_features(options),
                options.cu_seqlens_q, options.cu_seqlens_k, *documents, blocks,
                *_sizes(q, k, options), **launch,
            )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    options: Options,
    *,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    from lmkern.kernels.attention import triton_bias_kernels, triton_kernels

    batch, heads, n_q, head_dim = q.shape
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    features, sizes = _features(options), _sizes(q, k, options)
    bounds = (options.cu_seqlens_q, options.cu_seqlens_k)
    dq, dk, dv = (torch.empty_like(x) if need else None for x, need in zip((q, k, v), needs[:3], strict=True))
    dbias = drelative = None
    grain, (q_, k_, v_, out_, dout_, dq_, dk_, dv_) = triton_runtime.strided(q, k, v, out, dout, dq, dk, dv)
    kind = _kind(q, options)
    with triton_runtime.device_of(q):
        delta = torch.empty_like(lse)
        if programs := batch * heads * -(-n_q // DELTA_ROWS):
            triton_kernels.delta_kernel[(programs,)](
                *out_, *dout_, dlse, delta, heads, n_q, **delta_constants(head_dim, grain)
            )
        inputs = (*q_, *k_, *v_, *dout_, lse, delta)
        if dq is not None:
            launch = constants("dq", grain, *kind)
            blocks, documents = _blocks(options, bounds[0], n_q, launch["BLOCK_M"])
            if programs := batch * heads * blocks:
                triton_kernels.backward_dq_kernel[(programs,)](
                    *dq_, *inputs, *features, *bounds, *documents, blocks, *sizes, **launch
                )
        if dk is not None or dv is not None:
            launch = constants("dk_dv", grain, *kind)
            blocks, documents = _blocks(options, bounds[1], k.shape[2], launch["BLOCK_N"])
            if programs := batch * k.shape[1] * blocks:
                triton_kernels.backward_dk_dv_kernel[(programs,)](
                    *dk_,
                    *dv_,
                    *inputs,
                    *features,
                    *bounds,
                    *documents,
                    blocks,
                    *sizes,
                    **launch,
                )
        if needs[3] and options.bias is not None:
            launch = constants("dbias", grain, *kind)
            dbias = torch.zeros(options.bias.shape, dtype=torch.float32, device=q.device)
            *outer, rows, columns = dbias.shape
            tiles = -(-rows // launch["BLOCK_M"]) * -(-columns // launch["BLOCK_N"])
            if (programs := outer[0] * outer[1] * tiles) and batch * heads * n_q * k.shape[2]:
                triton_bias_kernels.backward_dbias_kernel[(programs,)](
                    dbias, *dbias.shape, *inputs, *features, batch, *sizes, **launch
                )
            dbias = dbias.to(options.bias.dtype)
        if needs[4] and options.relative_bias is not None:
            launch = constants("drelative", grain, *kind)
            drelative = torch.empty(options.relative_bias.shape, dtype=torch.float32, device=q.device)
            rows, diagonals = drelative.shape
            sequences = batch if bounds[0] is None else bounds[0].numel() - 1
            if programs := rows * -(-diagonals // launch["BLOCK_M"]):
                triton_bias_kernels.backward_drelative_kernel[(programs,)](
                    drelative,
                    rows,
                    *inputs,
                    *features,
                    *bounds,
                    sequences,
                    *sizes,
                    **{name: x for name, x in launch.items() if name != "BLOCK_N"},
                )
    dsinks = None
    if needs[5] and options.sinks is not None:
        dsinks = sink_gradient(dout, out, lse, dlse, options.sinks)
    return dq, dk, dv, dbias, drelative, dsinks


def _kind(q: Tensor, options: Options) -> tuple[Any, ...]:
    """What the constants of a call's kernels depend on beside GRAIN."""
    return (
        q.device, q.dtype.itemsize, q.shape[3], options.left is not None, options.right is not None,
        options.top_left, options.softcap != 0.0, _beside(options),
    )  # fmt: skip


def _beside(options: Options) -> bool:
    """Whether something is read or made beside each score."""
    return not (options.bias is options.mask is options.relative_bias is options.seed is None)


@tuning.remembered
def constants(
    kernel: str,
    grain: int,
    device: torch.device,
    itemsize: int,
    head_dim: int,
    has_left: bool,
    has_right: bool,
    top_left: bool,
    softcap: bool,
    beside: bool,
) -> dict[str, Any]:
    """The compile-time arguments and launch options of a kernel of TILES."""
    block_d = _block_d(head_dim)
    tile = TILES[kernel][itemsize, max(block_d, 32)]
    shape_class = f"{itemsize}-{max(block_d, 32)}"
    if beside:
        block_m, block_n, num_warps, num_stages = BESIDE[kernel]
        tile = (min(tile[0], block_m), min(tile[1], block_n), num_warps, num_stages)
        shape_class += "-beside"
    default = dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tile, strict=True))
    return {
        "D": head_dim,
        "GRAIN": grain,
        "HAS_LEFT": has_left,
        "HAS_RIGHT": has_right,
        "TOP_LEFT": top_left,
        "SOFTCAP": softcap,
        "BLOCK_D": block_d,
        **tuning.lookup("attention", kernel, tuning.architecture(device), shape_class, default),
    }


@tuning.remembered
def delta_constants(head_dim: int, grain: int) -> dict[str, int]:
    """The compile-time arguments of the kernel that makes delta."""
    return {"D": head_dim, "GRAIN": grain, "BLOCK_M": DELTA_ROWS, "BLOCK_D": _block_d(head_dim)}


def _block_d(head_dim: int) -> int:
    """The power of two that holds head_dim; a matrix product takes at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _features(options: Options) -> Sequence[Any]:
    """bias, mask, relative bias and dropout, as the kernels take them."""
    if not _beside(options):
        return _NO_FEATURES
    arguments: list[Any] = []
    for x in (options.bias, None if options.mask is None else options.mask.view(torch.uint8)):
        strides = (0,) * 4 if x is None else _broadcast_strides(x)
        arguments += [x, *strides]
    relative = options.relative_bias
    shared = relative is None or relative.shape[0] == 1
    radius = 0 if relative is None else relative.shape[1] // 2
    arguments += [
        None if relative is None else relative.contiguous(),
        0 if shared else 2 * radius + 1,
        radius,
    ]
    if options.dropout_p and options.seed is not None and philox.threshold(options.dropout_p):
        p = options.dropout_p
        return [*arguments, options.seed, philox.threshold(p), philox.keep_scale(p)]
    return [*arguments, None, 0, 1.0]


def _broadcast_strides(x: Tensor) -> tuple[int, ...]:
    """x's strides, 0 along the dimensions of size 1."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _blocks(
    options: Options, bounds: Tensor | None, length: int, block: int
) -> tuple[int, tuple[Tensor | None, Tensor | None, int]]:
    """How many blocks a head has; for packed documents also the document of each block (their number for one
    beyond the last), how many blocks come before each document, and the number of documents.

    Each document may add one block that is not full: the bound needs no look at the lengths on the device.
    """
    if bounds is None:
        return -(-length // block), (None, None, 0)
    documents = bounds.numel() - 1
    blocks = length // block + documents
    first = torch.zeros_like(bounds)
    torch.cumsum((bounds.diff() + (block - 1)) // block, 0, dtype=torch.int32, out=first[1:])
    numbers = torch.arange(blocks, dtype=torch.int32, device=bounds.device)
    return blocks, (torch.searchsorted(first[1:], numbers, right=True, out_int32=True), first, documents)


def _sizes(q: Tensor, k: Tensor, options: Options) -> tuple[Any, ...]:
    """H, H_kv, N_q, N_k, left, right (0 where there is none), softmax_scale, softcap."""
    (_, H, N_q, _), (_, H_kv, N_k, _) = q.shape, k.shape
    left, right = _within(options.left), _within(options.right)
    return H, H_kv, N_q, N_k, left, right, options.softmax_scale, options.softcap


def _within(bound: int | None) -> int:
    return max(-_FAR, min(bound, _FAR)) if bound else 0
