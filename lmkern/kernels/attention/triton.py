"""Attention on GPUs through Triton: grids, tile sizes and allocation. The kernels are in triton_kernels.py.

O(N) memory and no atomics: forward and backward give the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import triton_runtime
from lmkern.kernels.attention import Options
from lmkern.kernels.backends import Call

MAX_HEAD_DIM = 256

# (BLOCK_M, BLOCK_N, num_warps, num_stages) of each kernel by (bytes an element, BLOCK_D). Chosen from the
# compiler's reports, not from timings: large tiles that spill nothing on sm_90 and keep within 99 KB of
# shared memory, which GPUs of compute capability 8.6, 8.9 and 12.0 have. dk_dv spills up to 32 bytes a thread
# for a head_dim between 64 and 256 that has to be padded, and some on sm_80 and gfx942.
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
        (4, 32): (16, 64, 8, 2), (4, 64): (16, 64, 8, 2),
        (4, 128): (16, 32, 8, 2), (4, 256): (16, 16, 8, 2),
    },
}  # fmt: skip

# Rows of the element-wise kernel that makes delta.
DELTA_ROWS = 64


NOTE = triton_runtime.NOTE


def unavailable() -> str | None:
    return triton_runtime.unavailable()


def unsupported(call: Call) -> str | None:
    if reason := triton_runtime.unsupported(call):
        return reason
    q = call.tensors["q"]
    if q is not None and q.shape[3] > MAX_HEAD_DIM:
        return f"takes head_dim up to {MAX_HEAD_DIM}; got {q.shape[3]}"
    options: Options | None = call.options.get("options")
    return None if options is None else _not_taken_yet(options)


def _not_taken_yet(options: Options) -> str | None:
    features = {
        "a sliding window": options.left,
        "softcap": options.softcap or None,
        "dropout": options.dropout_p or None,
        "bias": options.bias,
        "mask": options.mask,
        "relative_bias": options.relative_bias,
        "sinks": options.sinks,
        "packed documents": options.cu_seqlens_q,
    }
    given = [name for name, value in features.items() if value is not None]
    return f"does not take {' and '.join(given)} yet" if given else None


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    from lmkern.kernels.attention import triton_kernels

    diagonal = _diagonal(options, q, k)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    launch = constants("forward", q.dtype, q.shape[3], causal=diagonal is not None)
    if programs := q.shape[0] * q.shape[1] * _blocks(q.shape[2], launch["BLOCK_M"]):
        with triton_runtime.device_of(q):
            triton_kernels.forward_kernel[(programs,)](
                *_strided(q, k, v, out), lse, *_sizes(q, k, diagonal), options.softmax_scale, **launch
            )
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
    from lmkern.kernels.attention import triton_kernels

    sequences, heads, n_q, head_dim = q.shape
    heads_kv, n_k = k.shape[1:3]
    lse = lse.contiguous()
    diagonal = _diagonal(options, q, k)
    sizes = _sizes(q, k, diagonal)
    key: dict[str, Any] = {"dtype": q.dtype, "head_dim": head_dim, "causal": diagonal is not None}
    dq = dk = dv = None
    with triton_runtime.device_of(q):
        delta = torch.empty_like(lse)
        if programs := sequences * heads * _blocks(n_q, DELTA_ROWS):
            dlse = None if dlse is None else dlse.contiguous()
            triton_kernels.delta_kernel[(programs,)](
                *_strided(out, dout), dlse, delta, heads, n_q, **delta_constants(head_dim)
            )
        if needs[0]:
            dq = torch.empty_like(q)
            launch = constants("dq", **key)
            if programs := sequences * heads * _blocks(n_q, launch["BLOCK_M"]):
                triton_kernels.backward_dq_kernel[(programs,)](
                    *_strided(dq, q, k, v, dout), lse, delta, *sizes, options.softmax_scale, **launch
                )
        # One kernel makes both: a caller who wants only one of them is rare.
        if needs[1] or needs[2]:
            dk, dv = torch.empty_like(k), torch.empty_like(v)
            launch = constants("dk_dv", **key)
            if programs := sequences * heads_kv * _blocks(n_k, launch["BLOCK_N"]):
                triton_kernels.backward_dk_dv_kernel[(programs,)](
                    *_strided(dk, dv, q, k, v, dout), lse, delta, *sizes, options.softmax_scale, **launch
                )
    return dq, dk if needs[1] else None, dv if needs[2] else None, None, None, None


def constants(kernel: str, dtype: torch.dtype, head_dim: int, *, causal: bool) -> dict[str, Any]:
    """The compile-time arguments and launch options of the kernel "forward", "dq" or "dk_dv"."""
    block_d = _block_d(head_dim)
    block_m, block_n, num_warps, num_stages = TILES[kernel][dtype.itemsize, max(block_d, 32)]
    return {
        "D": head_dim,
        "CAUSAL": causal,
        "WIDEN": triton_runtime.widen(dtype),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def delta_constants(head_dim: int) -> dict[str, int]:
    """The compile-time arguments of the kernel that makes delta."""
    return {"D": head_dim, "BLOCK_M": DELTA_ROWS, "BLOCK_D": _block_d(head_dim)}


def _block_d(head_dim: int) -> int:
    """The power of two that holds head_dim; a matrix product takes at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _diagonal(options: Options, q: Tensor, k: Tensor) -> int | None:
    """Query i sees the keys j <= i + diagonal; None: all."""
    if options.right is None:
        return None
    return options.right + (0 if options.top_left else k.shape[2] - q.shape[2])


def _sizes(q: Tensor, k: Tensor, diagonal: int | None) -> tuple[int, int, int, int, int]:
    """H, H_kv, N_q, N_k and a diagonal that shows the same keys and fits 32 bits."""
    n_q, n_k = q.shape[2], k.shape[2]
    return q.shape[1], k.shape[1], n_q, n_k, max(-n_q, min(diagonal or 0, n_k))


def _strided(*tensors: Tensor) -> list[Any]:
    """Each tensor followed by its strides, as the kernels take them."""
    return [argument for x in tensors for argument in (x, *x.stride())]


def _blocks(length: int, block: int) -> int:
    return -(-length // block)
