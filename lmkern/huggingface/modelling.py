"""What the modelling file beside a configuration's says of its attention, read from its source."""

from __future__ import annotations

import ast
import inspect
import sys
from functools import cache
from typing import Any

import torch

_REGISTRY = "ALL_ATTENTION_FUNCTIONS"


# A compiler takes both answers as constants and reads no files.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def asks_registry(config: Any) -> bool:
    """Whether its models' own attention asks transformers' registry; True if none is known."""
    sources = _attentions(config.__class__)
    return not sources or any(_REGISTRY in source for source in sources)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def says_causal(config: Any) -> bool:
    """Whether each of its models' own attentions has a flag `is_causal`; False if none is known."""
    asking = [source for source in _attentions(config.__class__) or () if _REGISTRY in source]
    return bool(asking) and all("is_causal" in source for source in asking)


@cache
def _attentions(config_class: Any) -> tuple[str, ...] | None:
    """The sources of the classes of attention in the modelling file; None if there is no such file."""
    for cls in config_class.__mro__:
        name = cls.__module__.replace(".configuration_", ".modeling_")
        if name != cls.__module__ and name in sys.modules:
            try:
                source = inspect.getsource(sys.modules[name])
            except OSError:
                return None
            lines, tree = source.splitlines(), ast.parse(source)
            classes = [x for x in tree.body if isinstance(x, ast.ClassDef) and "Attention" in x.name]
            return tuple("\n".join(lines[x.lineno - 1 : x.end_lineno]) for x in classes)
    return None
