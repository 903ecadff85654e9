"""Linear + cross-entropy in bfloat16 on AMX and BF16: csrc/linear_cross_entropy and, on its tiles,
csrc/cross_entropy.

The products are our own: torch's know no logits in tiles, and none of bfloat16 into float32.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import native
from lmkern.kernels.cpu_call import on_huge_pages, pointer
from lmkern.kernels.cross_entropy import cpu as cross_entropy

# LinearCrossEntropyParams: 8 pointers; x_stride, weight_stride, tokens, vocabulary, width, first, threads.
PARAMS = struct.Struct("=8q 7q")

# What the tokens of a chunk, V and E are rounded up to, and a tile of logits.
SIDE = 32
_TILE = (16, 32)


def usable(x: Tensor) -> bool:
    return native.serves(native.instruction_set(), "linear_logits", x.dtype)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dloss: Tensor,
    needs: tuple[bool, bool, bool],
    options: dict[str, Any],
    *,
    chunk: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """loss, dx, dweight and dbias as the contract's forward gives them; logits of `chunk` tokens at once."""
    R, V = x.shape[0], weight.shape[0]
    products = _Products(x, weight, bias, min(chunk, R), needs[1])
    loss = x.new_empty(R, dtype=torch.float32)
    dx = on_huge_pages(x.new_empty(x.shape)) if needs[0] else None
    dbias = x.new_zeros(V, dtype=torch.float32) if needs[2] else None
    for start in range(0, R, chunk):
        part = slice(start, min(R, start + chunk))
        logits = products.logits(x[part])
        gradient = dloss[part] if any(needs) else None
        loss[part] = cross_entropy.forward_in_tiles(logits, V, targets[part], gradient, **options)
        if dx is not None:
            products.input_gradient(dx[part])
        if needs[1]:
            products.add_weight_gradient()
        if dbias is not None:
            dbias += logits.sum((0, 2), dtype=torch.float32).view(-1)[:V]
    dweight = products.weight_gradient() if needs[1] else None
    return loss, dx, dweight, None if dbias is None else dbias.to(x.dtype)


class _Products:
    """The products of one chunk of tokens after the other, and what they keep: the logits, and later their
    gradient, in tiles (T / 16, V / 32, 16, 32), and the sums of the weight's gradient."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, tokens: int, sums: bool) -> None:
        self.weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        rows, columns, width = (rounded_up(n) for n in (tokens, *weight.shape))
        self.tiles = on_huge_pages(x.new_empty(rows // _TILE[0], columns // _TILE[1], *_TILE))
        self.packed_x = x.new_empty(rows * width)
        self.sums = on_huge_pages(x.new_empty(columns * width, dtype=torch.float32)) if sums else None
        self.summed = 0  # chunks

    def logits(self, x: Tensor) -> Tensor:
        self.x = x if x.stride(1) == 1 else x.contiguous()
        self._run("linear_logits")
        return self.tiles[: rounded_up(x.shape[0]) // _TILE[0]]

    def input_gradient(self, dx: Tensor) -> None:
        self._run("linear_input_gradient", dx=dx)

    def add_weight_gradient(self) -> None:
        self._run("linear_weight_gradient_add")
        self.summed += 1

    def weight_gradient(self) -> Tensor:
        dweight = on_huge_pages(self.weight.new_empty(self.weight.shape))
        if self.summed == 0:
            return dweight.zero_()
        self._run("linear_weight_gradient_store", dweight=dweight)
        return dweight

    def _run(self, product: str, dx: Tensor | None = None, dweight: Tensor | None = None) -> None:
        x, weight = self.x, self.weight
        tensors = (x, weight, self.bias, self.tiles, self.packed_x, self.sums, dx, dweight)
        native.function(product, weight.dtype)(
            PARAMS.pack(
                *(pointer(tensor) for tensor in tensors),
                x.stride(0),
                weight.stride(0),
                x.shape[0],
                *weight.shape,
                self.summed == 0,
                native.threads(),
            )
        )


def rounded_up(n: int) -> int:
    """To a multiple of SIDE."""
    return -(-n // SIDE) * SIDE
