"""The residual stream between two halves of a Transformer: what a half adds to it waits for the next norm,
which takes both in one pass (`lmkern.add_norm`)."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lmkern.nn.dropout import Dropout, dropout
from lmkern.nn.norm import LayerNorm, RMSNorm
from lmkern.ops import add_norm

M = TypeVar("M", bound=nn.Module)


class Seam(NamedTuple):
    """stream + dropout(branch), not added yet.

    stream, branch: one shape; dtypes may differ, as under autocast. dropout_p: what falls on branch.
    """

    stream: Tensor
    branch: Tensor
    dropout_p: float

    @classmethod
    def of(cls, stream: Tensor, branch: Tensor, dropout: nn.Module) -> Seam:
        """dropout: torch's or ours; anything else is called now."""
        if plain(dropout, nn.Dropout) or plain(dropout, Dropout):
            return cls(stream, branch, float(dropout.p) if dropout.training else 0.0)
        return cls(stream, dropout(branch), 0.0)

    def wide(self) -> Seam:
        """With the branch in the dtype of the sum, and so the norm of the sum."""
        dtype = torch.promote_types(self.stream.dtype, self.branch.dtype)
        return self._replace(branch=self.branch.to(dtype))


def closed(x: Tensor | Seam) -> Tensor:
    """The sum, with the mask that `normed` would have drawn: hooks on norms and blocks change no number."""
    if not isinstance(x, Seam):
        return x
    if x.dropout_p and _fits(x):
        return add_norm(x.branch, x.stream, dropout_p=x.dropout_p)[1]
    return x.stream + dropout(x.branch, x.dropout_p)


def normed(norm: nn.Module, x: Tensor | Seam) -> tuple[Tensor, Tensor]:
    """norm(h) and h, the sum; of a Seam in one pass where the norm is ours, norm(h) in the branch's dtype."""
    if isinstance(x, Seam) and (options := _fused(norm, x)) is not None:
        return add_norm(x.branch, x.stream, dropout_p=x.dropout_p, **options)
    h = closed(x)
    return norm(h), h


def plain(module: Any, cls: type[M]) -> TypeGuard[M]:
    """Whether a module is of exactly this class, with its forward, and nobody listens to it or to all."""
    return type(module) is cls and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or _has_any_global_hook()
    )


def _fits(x: Seam) -> bool:
    """Whether add_norm takes these dtypes together."""
    narrow = x.branch.dtype in (torch.float16, torch.bfloat16)
    return x.stream.dtype == x.branch.dtype or (narrow and x.stream.dtype == torch.float32)


def _fused(norm: nn.Module, x: Seam) -> dict[str, Any] | None:
    """add_norm's arguments for this norm; None where it does not serve."""
    if not _fits(x):
        return None
    if plain(norm, LayerNorm) and len(norm.normalized_shape) == 1:
        return {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}
    if plain(norm, RMSNorm) and len(norm.normalized_shape) == 1 and norm.eps is not None:
        return {"weight": norm.weight, "eps": norm.eps, "norm": "rms"}
    return None
