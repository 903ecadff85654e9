"""Tensors from a file into a model: all of them, or none."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor, nn


def check_tensors(
    function: str,
    where: str | os.PathLike[str],
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    remedy: str,
) -> None:
    """ValueError that lists, side by side, every tensor that is missing, not expected or of another shape."""
    lines = []
    for name in sorted({*expected, *found}):
        shapes = [str(tuple(side[name].shape)) if name in side else "-" for side in (expected, found)]
        if shapes[0] != shapes[1]:
            lines.append(f"  {name}: {shapes[0]} | {shapes[1]}")
    if lines:
        table = "\n".join(lines)
        raise ValueError(
            f"{function}: the tensors of {where} do not fit; name: expected | got\n{table}\n{remedy}"
        )


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads tensors that have been checked, each in the dtype that it has."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(tensors[name].dtype)
    model.load_state_dict(tensors)
