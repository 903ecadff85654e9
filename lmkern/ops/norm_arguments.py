"""What the norms ask of their arguments, and the form in which the kernels take them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lmkern.ops.dispatch import check_dtype


def as_shape(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """The dimensions that are normalized; of one its size will do, as torch's modules take it."""
    return (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)


def check_input(name: str, input: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError unless input ends in normalized_shape and has a dtype that is served."""
    if not shape or input.dim() < len(shape) or input.shape[-len(shape) :] != shape:
        integers = all(isinstance(size, int) for size in shape)
        expected = shape if integers else f"(integers, not {type(shape[0]).__name__})"
        raise ValueError(f"{name}: input must end in normalized_shape {expected}; got {tuple(input.shape)}")
    check_dtype(name, "input", input.dtype)


def check_beside(
    name: str, what: str, tensor: Tensor | None, shape: tuple[int, ...], input: Tensor, of: str = "input"
) -> None:
    """ValueError unless tensor has this shape and lies beside input: its device, its dtype or float32."""
    if tensor is None:
        return
    if tensor.shape != shape:
        raise ValueError(f"{name}: {what} must be {shape}; got {tuple(tensor.shape)}")
    if tensor.dtype != input.dtype and not (
        tensor.dtype == torch.float32 and input.dtype in (torch.float16, torch.bfloat16)
    ):
        raise ValueError(
            f"{name}: {what} must have {of}'s dtype {input.dtype}, or float32 beside a 16-bit {of}; "
            f"got {tensor.dtype}; cast one of the two, as by {of}.to({tensor.dtype})"
        )
    if tensor.device != input.device:
        raise ValueError(f"{name}: {what} must be on {of}'s device {input.device}; got {tensor.device}")


def as_matrix(input: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(R, E): the normalized dimensions flattened into E, the others into R."""
    if input.dim() == 2 and len(shape) == 1:
        return input
    return input.reshape(math.prod(input.shape[: -len(shape)]), math.prod(shape))


def as_vector(parameter: Tensor | None) -> Tensor | None:
    """(E,)"""
    return parameter if parameter is None or parameter.dim() == 1 else parameter.reshape(-1)


def parameters(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """weight and bias contiguous and of one dtype, the wider of the two."""
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        dtype = torch.promote_types(weight.dtype, bias.dtype)
        weight, bias = weight.to(dtype), bias.to(dtype)
    return (
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
    )


def to_dtype_of(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """A parameter's gradient in the parameter's dtype."""
    if gradient is None or parameter is None or gradient.dtype == parameter.dtype:
        return gradient
    return gradient.to(parameter.dtype)
