"""Tensors from a file into a model: all of them, or none."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor, nn

from lmkern.nn.state_dict import mismatches


def check_tensors(
    function: str,
    where: str | os.PathLike[str],
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    remedy: str,
) -> None:
    """ValueError that lists, side by side, every tensor that is missing, not expected or of another shape.

    So it does with whole numbers where floating ones are expected.
    """
    lines = mismatches(expected, found)
    for name in sorted(expected.keys() & found.keys()):
        if expected[name].is_floating_point() and not found[name].is_floating_point():
            lines.append(f"  {name}: floating | {found[name].dtype}")
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
