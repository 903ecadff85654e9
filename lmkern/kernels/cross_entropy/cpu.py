"""Cross-entropy on the CPU: csrc/cross_entropy/cpu_*.cpp, called through csrc/cross_entropy/params.hpp."""

from __future__ import annotations

import struct

from torch import Tensor

from lmkern.kernels import cpu_call, native
from lmkern.kernels.cpu_call import on_huge_pages, pointer, unavailable, unsupported
from lmkern.kernels.statistics import statistics_dtype

__all__ = ["backward", "forward", "forward_in_place", "forward_in_tiles", "unavailable", "unsupported"]

# CrossEntropyParams: 7 pointers; logits_stride, dloss_stride, dlogits_stride, rows, columns, ignore_index;
# label_smoothing, z_loss, softcap; dtype, tiles, threads.
_PARAMS = struct.Struct("=7q 6q 3d 3q")


def forward(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, row_max, log_sum = _statistics(logits)
    options = (ignore_index, label_smoothing, z_loss, softcap)
    native.function("cross_entropy_forward", logits.dtype)(
        _pack(logits, targets, loss, row_max, log_sum, None, None, *options)
    )
    return loss, row_max, log_sum


def forward_in_place(
    logits: Tensor,
    targets: Tensor,
    dloss: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """The loss; the gradient for dloss takes the place of the logits."""
    loss, row_max, log_sum = _statistics(logits)
    options = (ignore_index, label_smoothing, z_loss, softcap)
    native.function("cross_entropy_forward", logits.dtype)(
        _pack(logits, targets, loss, row_max, log_sum, dloss, logits, *options)
    )
    return loss


def forward_in_tiles(
    logits: Tensor,
    columns: int,
    targets: Tensor,
    dloss: Tensor | None,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """The same of logits in tiles (rows / 16, columns / 32, 16, 32), for products of bfloat16 pairs; without
    dloss they stay.

    Rows and columns are rounded up to 32. Columns beyond the last hold 0, rows get a gradient of 0.
    """
    R = targets.shape[0]
    loss, row_max, log_sum = (logits.new_empty(R, dtype=statistics_dtype(logits)) for _ in range(3))
    options = (ignore_index, label_smoothing, z_loss, softcap)
    dlogits = None if dloss is None else logits
    native.function("cross_entropy_forward", logits.dtype)(
        _pack(logits, targets, loss, row_max, log_sum, dloss, dlogits, *options, shape=(R, columns))
    )
    return loss


def backward(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    dlogits = on_huge_pages(logits.new_empty(*logits.shape))
    options = (ignore_index, label_smoothing, z_loss, softcap)
    native.function("cross_entropy_backward", logits.dtype)(
        _pack(logits, targets, None, row_max, log_sum, dloss, dlogits, *options)
    )
    return dlogits


def _statistics(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for loss, row_max and log_sum."""
    dtype, R = statistics_dtype(logits), logits.shape[0]
    return (
        logits.new_empty(R, dtype=dtype),
        logits.new_empty(R, dtype=dtype),
        logits.new_empty(R, dtype=dtype),
    )


def _pack(
    logits: Tensor,
    targets: Tensor,
    loss: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    dloss: Tensor | None,
    dlogits: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    shape: tuple[int, int] | None = None,
) -> bytes:
    """shape: of logits in tiles."""
    return _PARAMS.pack(
        *(pointer(tensor) for tensor in (logits, targets, loss, row_max, log_sum, dloss, dlogits)),
        logits.stride(0),
        0 if dloss is None else dloss.stride(0),
        0 if dlogits is None else dlogits.stride(0),
        *(shape or logits.shape),
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        cpu_call.DTYPE_CODES[logits.dtype],
        shape is not None,
        native.threads(),
    )
