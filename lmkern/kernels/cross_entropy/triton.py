"""Cross-entropy on GPUs through Triton: grids, block sizes and allocation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmkern.kernels import triton_runtime, tuning
from lmkern.kernels.statistics import statistics_dtype
from lmkern.kernels.triton_runtime import unavailable, unsupported

__all__ = [
    "NOTE",
    "backward",
    "constants",
    "forward",
    "forward_in_place",
    "unavailable",
    "unsupported",
]

NOTE = triton_runtime.NOTE

# Classes that a program holds at once, and the threads that share them.
BLOCK_V = {"forward": 8192, "backward": 4096}
ELEMENTS_PER_THREAD = {"forward": 32, "backward": 16}


def forward(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (ignore_index, label_smoothing, z_loss, softcap)
    loss = _empty(logits)
    row_max, log_sum = torch.empty_like(loss), torch.empty_like(loss)
    _forward(logits, targets, (loss, row_max, log_sum), None, *options)
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
    loss = _empty(logits)
    _forward(logits, targets, (loss, None, None), dloss, ignore_index, label_smoothing, z_loss, softcap)
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
    from lmkern.kernels.cross_entropy import triton_kernels

    R, V = logits.shape
    dlogits = logits.new_empty(R, V)
    options = constants("backward", *_kind(logits, label_smoothing, z_loss, softcap))
    grid = (R, -(-V // options["BLOCK_V"]))
    if all(grid):
        with triton_runtime.device_of(logits):
            triton_kernels.backward_kernel[grid](
                dloss, dloss.stride(0), logits, logits.stride(0), targets, row_max, log_sum, dlogits, V,
                V, ignore_index, label_smoothing, z_loss, softcap, **options,
            )  # fmt: skip
    return dlogits


def _kind(logits: Tensor, label_smoothing: float, z_loss: float, softcap: float) -> tuple[Any, ...]:
    """What the constants of a call's kernels depend on."""
    itemsize, V = logits.dtype.itemsize, logits.shape[1]
    return logits.device, itemsize, V, label_smoothing != 0, z_loss != 0, softcap != 0


@tuning.remembered
def constants(
    kernel: str,
    device: torch.device,
    itemsize: int,
    V: int,
    smoothed: bool,
    z_loss: bool,
    capped: bool,
) -> dict[str, int]:
    """The compile-time arguments of a kernel."""
    block = min(BLOCK_V[kernel], max(64, 1 << max(V - 1, 0).bit_length()))
    default = {
        "BLOCK_V": block,
        "num_warps": min(8, max(1, block // (32 * ELEMENTS_PER_THREAD[kernel]))),
    }
    shape_class = f"{itemsize}-{block}{'-capped' if capped else ''}"
    chosen = tuning.lookup("cross_entropy", kernel, tuning.architecture(device), shape_class, default)
    return {"SMOOTHED": smoothed, "Z_LOSS": z_loss, "CAPPED": capped, **chosen}


def _forward(
    logits: Tensor,
    targets: Tensor,
    results: tuple[Tensor, Tensor | None, Tensor | None],
    dloss: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    """With dloss the gradient takes the place of the logits."""
    from lmkern.kernels.cross_entropy import triton_kernels

    R, V = logits.shape
    if not R:
        return
    stride, dlogits = (0, None) if dloss is None else (dloss.stride(0), logits)
    with triton_runtime.device_of(logits):
        triton_kernels.forward_kernel[(R,)](
            logits, logits.stride(0), targets, *results, dloss, stride, dlogits, logits.stride(0), V,
            ignore_index, label_smoothing, z_loss, softcap,
            **constants("forward", *_kind(logits, label_smoothing, z_loss, softcap)),
        )  # fmt: skip


def _empty(logits: Tensor) -> Tensor:
    """Room for a number a row."""
    return logits.new_empty(logits.shape[0], dtype=statistics_dtype(logits))
