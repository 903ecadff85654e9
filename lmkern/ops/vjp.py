"""torch's own gradients of a formula, by which a kernel's backward pass is differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def leaf(x: Tensor | None) -> Any:
    return None if x is None else x.detach().requires_grad_()


def vjp(
    outputs: Sequence[Tensor | None], cotangents: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradient of each input, itself differentiable; None where an input is None or has no influence."""
    pairs = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output is not None and cotangent is not None and output.requires_grad
    ]
    present = [x for x in inputs if x is not None]
    if not pairs:
        return [None] * len(inputs)
    found = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            present,
            [cotangent for _, cotangent in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [None if x is None else next(found) for x in inputs]
