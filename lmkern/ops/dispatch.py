"""What the ops share: what they take, when the direct path may be taken, and autocast."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature
from itertools import chain
from numbers import Real
from typing import ParamSpec, TypeVar

import numpy
import torch
from torch import Tensor
from torch.autograd import forward_ad

from lmkern.kernels.autocast import has_autocast

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPE_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)

P = ParamSpec("P")
R = TypeVar("R")

# What an argument takes by its annotation, in words and as types. A tensor may be a number.
_NUMBER = (Real, Tensor, torch.SymFloat, torch.SymInt)
_TAKES: dict[str, tuple[str, tuple[type, ...]]] = {
    "Tensor": ("torch.Tensor", (Tensor,)),
    "Tensor | None": ("torch.Tensor", (Tensor, type(None))),
    "float": ("number", _NUMBER),
    "float | None": ("number", (*_NUMBER, type(None))),
}

# torch.SymBool: what a comparison of lengths is where a compiler traces.
_TRUTH_VALUES = (bool, torch.SymBool, numpy.bool_)

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def takes_tensors(op: Callable[P, R]) -> Callable[P, R]:
    """The op, whose failure says which argument is no tensor or number, if one is not that should be one."""
    types = {name: _TAKES.get(declared.annotation) for name, declared in signature(op).parameters.items()}

    @wraps(op)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return op(*args, **kwargs)
        except (AttributeError, TypeError, ValueError, struct.error):
            # Only now: in a call that succeeds the arguments need no look.
            for name, given in chain(zip(types, args, strict=False), kwargs.items()):
                expected = types.get(name)
                if expected is not None and not isinstance(given, expected[1]):
                    raise TypeError(
                        f"{op.__name__}: {name} must be a {expected[0]}; got {type(given).__name__}"
                    ) from None
            raise

    return checked


def direct(*tensors: Tensor | None) -> bool:
    """Whether an op may call its kernel straight away instead of through its torch.library registration.

    True in eager mode on plain tensors. A compiler, a functorch transform, a dispatch mode (fake tensors,
    tracing), torch.jit.trace or a tensor subclass must see the registered op. The direct path computes the
    same bits and costs half as much.

    Raises NotImplementedError for a tensor with a tangent: torch would give a registered op's output none.
    """
    if forward_ad._current_level >= 0:
        _refuse_tangents(tensors)
    return eager(*tensors)


def eager(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd looks at a call, and forward-mode derivatives perhaps; and whether memory
    holds the tensors' numbers, not their negatives (z.conj().imag), which the dispatcher sets right."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or not _PLAIN.issuperset(map(type, tensors))
    ):
        return False
    for x in tensors:  # noqa: SIM110, since a generator costs more
        if x is not None and x.is_neg():
            return False
    return True


def _refuse_tangents(tensors: Sequence[Tensor | None]) -> None:
    for x in tensors:
        if x is None or not x.dtype.is_floating_point:
            continue
        # A compiler cannot ask, and a transform inside another hides the tangent of the outer one.
        wrapped = torch.compiler.is_compiling() or torch._C._functorch.maybe_get_level(x) != -1
        if wrapped or forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                "lmkern: forward-mode derivatives (torch.func.jvp, jacfwd, hessian, dual tensors) are not "
                f"served: expected tensors without a tangent; got {tuple(x.shape)} with one, or inside a "
                "transform that may hide one. Use reverse mode (backward), or torch's own functions here"
            )


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a call on these must be seen by autograd."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in their device's autocast dtype, as torch's matrix products take them; float64 is left."""
    device_type = tensors[0].device.type
    if not (has_autocast(device_type) and torch.is_autocast_enabled(device_type)):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def rows(x: Tensor) -> Tensor:
    """x (R, E) with the elements of a row next to each other, as the kernels read it."""
    if x.is_contiguous() or (x.stride(1) == 1 and x.stride(0) >= x.shape[1]):
        return x
    return x.contiguous()


def dense(x: Tensor) -> bool:
    """Whether x fills its memory without gaps or overlaps, in whatever order of dimensions."""
    if x.is_contiguous() or not x.numel():
        return True
    expected = 1
    for stride, size in sorted((d, n) for d, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def overlaps_itself(x: Tensor) -> bool:
    """Whether two elements of x may lie in one place: its dimensions do not nest."""
    reach = 0
    for stride, size in sorted((d, n) for d, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def as_tensors(gradients: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """What a registered op returns, which is tensors only: an empty one for a gradient nobody asked for."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def fake_gradients(
    tensors: Sequence[Tensor | None], needs: Sequence[bool], like: Tensor
) -> tuple[Tensor, ...]:
    """What `as_tensors` returns of the gradients of tensors, contiguous, as a compiler traces it."""
    wanted = zip(tensors, needs, strict=True)
    return as_tensors([t.new_empty(t.shape) if need and t is not None else None for t, need in wanted], like)


def as_optional(gradients: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The way back from `as_tensors`."""
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))


def flag(function: str, name: str, given: bool) -> bool:
    """An option that is on or off, Python's bool or NumPy's; TypeError in words for all else.

    "no" and None would count as on and off.
    """
    if isinstance(given, _TRUTH_VALUES):
        return bool(given)
    raise TypeError(f"{function}: {name} must be True or False; got {given!r}")


def check_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    """ValueError in words for a dtype that no op computes in."""
    if dtype not in DTYPES:
        raise ValueError(f"{op}: {name} must be one of {DTYPE_NAMES}; got {dtype}")


def checked_softcap(name: str, softcap: float | None) -> float:
    """As the contract takes it: 0 for none."""
    if softcap is None:
        return 0.0
    if not 0.0 <= softcap < float("inf"):
        raise ValueError(f"{name}: softcap must be above 0, or None or 0 for none; got {softcap}")
    return float(softcap)


def int32(x: Tensor) -> Tensor:
    """Indices x as int32; a number beyond its range becomes the end of it, which no check lets pass."""
    return x if x.dtype == torch.int32 else x.clamp(-(2**31), 2**31 - 1).to(torch.int32)
