"""Ops as torch.library has them, with gradients that autograd and torch.func's transforms see alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmkern.ops.plain_gradients import Gradients, of_each

_formulas: dict[str, tuple[Callable[..., Gradients], Callable[..., None]]] = {}
_functions: dict[str, type[torch.autograd.Function]] = {}


def register_gradients(
    op: str, gradients: Callable[..., Gradients], setup_context: Callable[[Any, Any, Any], None]
) -> None:
    """torch.library.register_autograd for lmkern::op, and the same to torch.func, which has none of those.

    gradients: whatever it calls that is to be seen by transforms it calls by `call_registered`.
    """
    torch.library.register_autograd(f"lmkern::{op}", gradients, setup_context=setup_context)
    _formulas[op] = gradients, setup_context


def call_registered(op: str, *arguments: Any) -> Any:
    """The registered op lmkern::op, for compilers, dispatch modes, subclasses and torch.func's transforms."""
    registered = getattr(torch.ops.lmkern, op)
    if torch.compiler.is_compiling():
        return registered(*arguments)
    innermost = torch._C._functorch.peek_interpreter_stack()
    kinds = torch._C._functorch.TransformType
    if innermost is None or innermost.key() not in (kinds.Grad, kinds.Vmap):
        return registered(*arguments)
    if op not in _functions:
        _functions[op] = _function(op)
    return _functions[op].apply(*arguments)


def _function(op: str) -> type[torch.autograd.Function]:
    """The op as a function that torch.func may transform; its derivative raises where it has none."""

    def refuse(_ctx: Any, *_incoming: Tensor | None) -> Gradients:
        raise RuntimeError(
            f"lmkern: {op} has no derivative of its own; where the second derivative of an op is wanted "
            "take torch's own function in its place"
        )

    def each(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        return of_each(partial(call_registered, op), in_dims, info.batch_size, arguments)

    backward, setup_context = _formulas.get(op, (refuse, lambda ctx, inputs, output: None))
    members = {
        "__doc__": f"lmkern::{op} to torch.func.",
        "forward": staticmethod(getattr(torch.ops.lmkern, op)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "vmap": staticmethod(each),
    }
    return type(op, (torch.autograd.Function,), members)
