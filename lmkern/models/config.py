"""What the configurations of the models have in common: their checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_args


def require(config: object, holds: bool, what: str, got: object) -> None:
    """ValueError in the name of the configuration unless holds."""
    if not holds:
        raise ValueError(f"{type(config).__name__}: {what}; got {got}")


def check_fields(
    config: object,
    *,
    at_least_1: Sequence[str] = (),
    at_least_0: Sequence[str] = (),
    positive: Sequence[str] = (),
    probabilities: Sequence[str] = (),
    choices: Mapping[str, Any] | None = None,
) -> None:
    """ValueError, naming the field, for one out of its range, or a bool that is none.

    choices: a Literal for each field.
    """
    for field in fields(config):  # type: ignore[arg-type]
        if field.type in (bool, "bool"):
            value = getattr(config, field.name)
            require(config, isinstance(value, bool), f"{field.name} must be True or False", repr(value))
    for name in (*at_least_1, *at_least_0):
        value = getattr(config, name)
        require(config, is_number(value, int), f"{name} must be int", repr(value))
    for name in (*positive, *probabilities):
        value = getattr(config, name)
        require(config, is_number(value, int | float), f"{name} must be float", repr(value))
    for name in at_least_1:
        require(config, getattr(config, name) >= 1, f"{name} must be at least 1", getattr(config, name))
    for name in at_least_0:
        require(config, getattr(config, name) >= 0, f"{name} must be at least 0", getattr(config, name))
    for name in positive:
        require(config, getattr(config, name) > 0.0, f"{name} must be positive", getattr(config, name))
    for name in probabilities:
        value = getattr(config, name)
        require(config, 0.0 <= value < 1.0, f"{name} must lie in [0, 1)", value)
    for name, kind in (choices or {}).items():
        value, among = getattr(config, name), get_args(kind)
        require(config, value in among, f"{name} must be one of {', '.join(among)}", repr(value))


def is_number(value: object, kind: Any) -> bool:
    """Whether it is a number of this kind: True would count as 1."""
    return isinstance(value, kind) and not isinstance(value, bool)


def check_heads(config: object, width: int, heads: int, kv_heads: int, head_dim: int = 0) -> None:
    """That heads divide the width, unless head_dim is given, and kv_heads (0: as many) the heads."""
    require(
        config,
        bool(head_dim) or width % heads == 0,
        "width must be a multiple of heads",
        f"width {width}, heads {heads}",
    )
    require(
        config,
        heads % (kv_heads or heads) == 0,
        "heads must be a multiple of kv_heads",
        f"heads {heads}, kv_heads {kv_heads}",
    )
