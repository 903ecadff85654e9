"""Autocast, which takes matrix products to a dtype of its own: kernels choose theirs themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# Of a device's type: there is none for "meta".
has_autocast = cache(torch.amp.is_autocast_available)


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """The function of tensors, the first of which says on what device, with autocast off."""

    @wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        if not has_autocast(first.device.type):
            return function(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return outside
