"""RMS norms of transformers, known by their one parameter and by what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lmkern.huggingface.swapping import of_transformers, subclass, swap_if_same
from lmkern.ops import rms_norm
from lmkern.patching import Undo


def _epsilon(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def is_rms_norm(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    named = type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    return (
        of_transformers(module)
        and named
        and list(parameters) == ["weight"]
        and parameters["weight"].dim() == 1
        and not list(module.children())
    )


def _rms_forward(offset: float) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        return rms_norm(hidden_states, weight.shape, weight, _epsilon(self), offset=offset)

    return forward


def swap_rms_norm(module: nn.Module) -> Undo | str:
    if _epsilon(module) is not None:
        cls: Any = type(module)
        width = next(module.parameters()).shape[0]
        for offset in (0.0, 1.0):
            undo = swap_if_same(module, width, subclass(cls, forward=(_rms_forward, offset)))
            if undo is not None:
                return undo
    return f"{type(module).__name__} computes no RMS norm that lmkern.rms_norm knows"
