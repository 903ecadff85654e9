"""What models check of what they are given: a configuration, tokens, targets, packed documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmkern.kernels.checked import checked
from lmkern.nn.positions import positions_within


def check_config(config: Any, kind: type[Any]) -> None:
    """TypeError, in the name of the model, for what is no configuration of this kind."""
    if not isinstance(config, kind):
        model = kind.__name__.removesuffix("Config")
        raise TypeError(
            f"{model}: config must be a {kind.__name__}; got {type(config).__name__}. "
            f"Give {model}({kind.__name__}(...)), with the sizes as its arguments"
        )


def check_tokens(name: str, what: str, tokens: Any) -> None:
    """TypeError for what is no tensor, ValueError for one that is not (B, N) int64."""
    if not isinstance(tokens, Tensor):
        raise TypeError(
            f"{name}: {what} must be a torch.Tensor (B, N) int64; got {type(tokens).__name__}. "
            "Give torch.tensor([[...]]), a row for each sequence"
        )
    if tokens.dim() != 2 or tokens.dtype != torch.int64:
        raise ValueError(f"{name}: {what} must be (B, N) int64; got {tuple(tokens.shape)} {tokens.dtype}")


def check_targets(name: str, targets: Any, shape: Sequence[int], of: str = "") -> None:
    """TypeError for what is no tensor, ValueError unless it is int64 of this shape; of: whose it is."""
    if not isinstance(targets, Tensor):
        raise TypeError(f"{name}: targets must be a torch.Tensor; got {type(targets).__name__}")
    if targets.shape != torch.Size(shape) or targets.dtype != torch.int64:
        raise ValueError(
            f"{name}: targets must be int64 {of}{tuple(shape)}; got {targets.dtype} {tuple(targets.shape)}"
        )


def check_packed(name: str, tokens: Tensor, cu_seqlens: Tensor, context: int, **others: Any) -> None:
    """ValueError unless the tokens are one row of documents, each within the context where that is looked at.

    others: arguments that packed documents do not go with, by name.
    """
    given = [what for what, x in others.items() if x is not None]
    if tokens.shape[0] != 1 or given:
        without = " or ".join(others)
        raise ValueError(
            f"{name}: packed documents (cu_seqlens) stand in one row, tokens (1, N), without {without}; "
            f"got tokens {tuple(tokens.shape)}" + "".join(f" and a {what}" for what in given)
        )
    positions = positions_within(name, cu_seqlens, tokens.shape[1])
    if positions.numel() and not torch.compiler.is_compiling() and checked(positions):
        longest = int(positions.max()) + 1
        if longest > context:
            raise ValueError(f"{name}: the context is {context} tokens; got a document of {longest}")
