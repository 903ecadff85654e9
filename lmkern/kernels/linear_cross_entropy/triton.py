"""Linear + cross-entropy on GPUs, by chunks of tokens whose logits are held one chunk at a time.

torch multiplies matrices; a kernel of lmkern/kernels/cross_entropy turns a chunk's logits into its loss and,
in their place, their gradient. Beyond results and the float32 sums of the weight's gradient this takes
the logits of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import triton_runtime
from lmkern.kernels.backends import Call
from lmkern.kernels.cross_entropy import triton as cross_entropy

__all__ = ["NOTE", "backward", "forward", "unavailable", "unsupported"]

NOTE = triton_runtime.NOTE

# A chunk's logits take at most so many bytes, unless it has this few tokens. The weight's gradient is read
# and written once a chunk: in bfloat16, 1536 tokens of 131,072 classes are work enough to hide that.
CHUNK_BYTES = 384 * 2**20
MIN_CHUNK_TOKENS = 128
# Tokens of a chunk are rounded up to a tile of a product.
ROUND_TOKENS = 128

# Rows of dweight that a product in float32 of 16-bit factors makes at once, where torch has none of its own.
_WIDENED_ROWS = 4096


def unavailable() -> str | None:
    return triton_runtime.unavailable()


def unsupported(call: Call) -> str | None:
    return triton_runtime.unsupported(call, float64=True)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dloss: Tensor,
    *,
    needs: tuple[bool, bool, bool],
    **options: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    R, V = x.shape[0], weight.shape[0]
    sums_dtype = triton_runtime.compute_dtype(x)
    chunk = chunk_tokens(R, V * x.element_size())
    buffer = x.new_empty(min(chunk, R), V)
    loss = x.new_empty(R, dtype=sums_dtype)
    dx = x.new_empty(x.shape) if needs[0] else None
    dweight = weight.new_zeros(weight.shape, dtype=sums_dtype) if needs[1] else None
    dbias = x.new_zeros(V, dtype=sums_dtype) if needs[2] else None
    for start in range(0, R, chunk):
        part = slice(start, min(R, start + chunk))
        logits = buffer[: part.stop - start]  # (T, V)
        if bias is None:
            torch.mm(x[part], weight.T, out=logits)
        else:
            torch.addmm(bias, x[part], weight.T, out=logits)
        if not any(needs):
            loss[part] = cross_entropy.forward(logits, targets[part], **options)[0]
            continue
        loss[part] = cross_entropy.forward_in_place(logits, targets[part], dloss[part], **options)
        if dx is not None:
            torch.mm(logits, weight, out=dx[part])
        if dweight is not None:
            _add_product(dweight, logits.T, x[part])
        if dbias is not None:
            dbias += logits.sum(0, dtype=sums_dtype)
    return (
        loss,
        dx,
        None if dweight is None else dweight.to(x.dtype),
        None if dbias is None else dbias.to(x.dtype),
    )


def backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    needs: tuple[bool, bool, bool],
    **options: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return forward(x, weight, bias, targets, dloss, needs=needs, **options)[1:]


def chunk_tokens(R: int, row_bytes: int) -> int:
    """Tokens of a chunk: a function of the shapes alone, and chunks of one size but for the last."""
    most = max(MIN_CHUNK_TOKENS, CHUNK_BYTES // max(row_bytes, 1) // ROUND_TOKENS * ROUND_TOKENS)
    chunks = max(1, -(-R // most))
    return max(1, -(-R // (chunks * ROUND_TOKENS))) * ROUND_TOKENS


def _add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """sums += a @ b, added up in the dtype of sums."""
    if a.dtype == sums.dtype:
        sums.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(sums, a, b, out_dtype=sums.dtype, out=sums)
    else:
        b = b.to(sums.dtype)
        for first in range(0, sums.shape[0], _WIDENED_ROWS):
            rows = slice(first, first + _WIDENED_ROWS)
            sums[rows].addmm_(a[rows].to(sums.dtype), b)
