"""Linear + cross-entropy by chunks of tokens, whose logits are held a chunk at a time: what backends share.

A backend brings the size of a chunk, its cross-entropy, and the products of the two gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from lmkern.kernels import widened
from lmkern.kernels.cpu_call import on_huge_pages
from lmkern.kernels.statistics import gradient_dtype, statistics_dtype


class Sum(Protocol):
    """dlogits^T @ x summed over chunks."""

    def add(self, dlogits: Tensor, x: Tensor) -> None:
        """dlogits (T, V), x (T, E)."""

    def result(self) -> Tensor:
        """(V, E), in gradient_dtype of the weight's."""


class WeightSum:
    """By torch's products, in float32 (float64)."""

    def __init__(self, weight: Tensor) -> None:
        self.dtype = weight.dtype
        self.sums = weight.new_zeros(weight.shape, dtype=statistics_dtype(weight))

    def add(self, dlogits: Tensor, x: Tensor) -> None:
        if self.sums.dtype == x.dtype:
            self.sums.addmm_(dlogits.T, x)
        elif x.device.type == "cuda":
            torch.addmm(self.sums, dlogits.T, x, out_dtype=self.sums.dtype, out=self.sums)
        else:
            widened.add_weight_gradient(dlogits, x, self.sums)

    def result(self) -> Tensor:
        return self.sums.to(gradient_dtype(self.dtype))


def multiply_logits(x: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor) -> None:
    """Writes logits (T, V) = x (T, E) @ weight^T (E, V) + bias, by torch's product."""
    if bias is None:
        torch.mm(x, weight.T, out=logits)
    else:
        torch.addmm(bias, x, weight.T, out=logits)


def by_chunks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dloss: Tensor,
    needs: tuple[bool, bool, bool],
    options: dict[str, Any],
    *,
    chunk: int,
    cross_entropy: ModuleType,
    weight_sum: Callable[[Tensor], Sum],
    input_gradient: Callable[[Tensor, Tensor, Tensor], None],
    make_logits: Callable[[Tensor, Tensor, Tensor | None, Tensor], None] = multiply_logits,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """loss, dx, dweight and dbias as the contract's forward gives them.

    chunk: tokens. input_gradient(dlogits, weight, dx) writes dx (T, E) = dlogits (T, V) @ weight (V, E).
    """
    R, V = x.shape[0], weight.shape[0]
    buffer = on_huge_pages(x.new_empty(min(chunk, R), V))
    loss = x.new_empty(R, dtype=statistics_dtype(x))
    dx = on_huge_pages(x.new_empty(x.shape)) if needs[0] else None
    dweight = weight_sum(weight) if needs[1] else None
    dbias = x.new_zeros(V, dtype=statistics_dtype(x)) if needs[2] else None
    for start in range(0, R, chunk):
        part = slice(start, min(R, start + chunk))
        logits = buffer[: part.stop - start]  # (T, V)
        make_logits(x[part], weight, bias, logits)
        if not any(needs):
            loss[part] = cross_entropy.forward(logits, targets[part], **options)[0]
            continue
        loss[part] = cross_entropy.forward_in_place(logits, targets[part], dloss[part], **options)
        if dx is not None:
            input_gradient(logits, weight, dx[part])
        if dweight is not None:
            dweight.add(logits, x[part])
        if dbias is not None:
            dbias += logits.sum(0, dtype=statistics_dtype(x))
    return (
        loss,
        dx,
        None if dweight is None else dweight.result(),
        None if dbias is None else dbias.to(gradient_dtype(x.dtype)),
    )
