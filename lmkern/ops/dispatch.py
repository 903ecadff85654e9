"""What the ops share: when the direct path may be taken, and autocast."""

from __future__ import annotations

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def direct(*tensors: Tensor | None) -> bool:
    """Whether an op may call its kernel straight away instead of through its torch.library registration.

    True in eager mode on plain tensors. A compiler, a functorch transform, a dispatch mode (fake tensors,
    tracing) or a tensor subclass must see the registered op. The direct path computes the same bits and costs
    half as much.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or any(tensor is not None and type(tensor) not in _PLAIN for tensor in tensors)
    )


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a call on these must be recorded by autograd."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in their device's autocast dtype, as torch's matrix products take them; float64 is left."""
    device_type = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums and statistics over x: float32, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
