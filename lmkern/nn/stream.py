"""What runs through a module, and the dtype of the module's parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# What autocast makes one.
_CAST = frozenset((torch.float32, torch.float16, torch.bfloat16))


def check_stream(module: torch.nn.Module, name: str, x: Any, width: int) -> None:
    """TypeError for what is no tensor, ValueError for one that is not (B, N, width)."""
    owner = type(module).__name__
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner}: {name} must be a torch.Tensor; got {type(x).__name__}")
    if x.dim() != 3 or x.shape[2] != width:
        one = f". One sequence is {name}[None]" if x.dim() == 2 and x.shape[1] == width else ""
        raise ValueError(f"{owner}: {name} must be (B, N, {width}); got {tuple(x.shape)}{one}")


def takes_dtype(*names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a module's forward: its failure says so where one of the arguments named has another dtype than the
    module's parameters, and no autocast makes them one."""

    def decorator(forward: Callable[P, R]) -> Callable[P, R]:
        arguments = signature(forward)

        @wraps(forward)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return forward(*args, **kwargs)
            except RuntimeError as error:
                # Only now: a layer that took a linear map's place may take another dtype than it stores.
                given = arguments.bind(*args, **kwargs).arguments
                _refuse_dtypes(given["self"], {name: given.get(name) for name in names}, error)
                raise

        return checked

    return decorator


def _refuse_dtypes(module: torch.nn.Module, given: dict[str, Any], error: RuntimeError) -> None:
    expected = next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), None)
    for name, x in given.items():
        if expected is None or not isinstance(x, Tensor) or x.dtype == expected:
            continue
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            continue
        remedy = f"Give {name}.to({expected})"
        if _CAST.issuperset((expected, x.dtype)):
            remedy += f", or run the model under torch.autocast({device!r})"
        raise ValueError(
            f"{type(module).__name__}: {name} must have the parameters' dtype {expected}; got {x.dtype}. "
            + remedy
        ) from error
