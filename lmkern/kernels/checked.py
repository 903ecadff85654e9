"""Whether indices that tensors hold are looked at before a kernel uses them."""

from __future__ import annotations

import os

from torch import Tensor


def checked(index: Tensor) -> bool:
    """On the CPU, where it costs nothing; on a GPU on request alone: LMKERN_CHECKED=1.

    There the host would wait for the device. Without the request the Triton kernels give NaN for an index out
    of range (cached attention: what the nearest length or the first page has), and never read or write beyond
    a tensor.
    """
    return index.device.type == "cpu" or os.environ.get("LMKERN_CHECKED", "0").lower() in ("1", "true", "on")


def check_range(function: str, name: str, index: Tensor, count: int) -> None:
    """IndexError in words unless index lies in [0, count), where that is looked at."""
    if not index.numel() or not checked(index):
        return
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or high >= count:
        raise IndexError(f"{function}: {name} must lie in [0, {count}); got {low} to {high}")
