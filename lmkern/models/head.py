"""The loss of a model whose last map gives logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lmkern.nn.linear import plain_linear
from lmkern.ops import cross_entropy, linear_cross_entropy


def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """cross_entropy(head(hidden), targets, **options), without the logits where head is a plain nn.Linear."""
    if plain_linear(head):
        return linear_cross_entropy(hidden, head.weight, targets, bias=head.bias, **options)
    return cross_entropy(head(hidden), targets, **options)
