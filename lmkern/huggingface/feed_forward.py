"""Feed-forward modules of transformers, known by their parts' names: bias and activation in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmkern.huggingface.swapping import of_transformers, subclass, swap_if_same
from lmkern.nn.linear import plain_linear
from lmkern.nn.residual import plain
from lmkern.ops import activation, linear
from lmkern.patching import Undo

# The names of their parts: the activation, what it is applied to, the gated
# value or None, dropout or None, what follows or None.
_FEED_FORWARDS = (
    ("act", "c_fc", None, None, "c_proj", "dropout"),
    ("act", "wi", None, "dropout", "wo", None),
    ("act", "wi_0", "wi_1", "dropout", "wo", None),
    ("act_fn", "gate_proj", "up_proj", None, "down_proj", None),
    ("intermediate_act_fn", "dense", None, None, None, None),
    ("transform_act_fn", "dense", None, None, "LayerNorm", None),
)
_ACTIVATIONS = ("act", "act_fn", "activation_fn", "intermediate_act_fn", "transform_act_fn")
_FUNCTIONS: dict[Any, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
}


def feed_forward_parts(module: nn.Module) -> tuple[str | None, ...] | None:
    children = {name for name, _ in module.named_children()}
    found = (parts for parts in _FEED_FORWARDS if children == {name for name in parts if name})
    return next(found, None)


def feeds_forward(module: nn.Module) -> bool:
    """Whether it has parts we know, or an activation between parts of its own."""
    if not of_transformers(module):
        return False
    names = {name for name, _ in module.named_children()}
    return feed_forward_parts(module) is not None or not names.isdisjoint(_ACTIVATIONS)


def _product_and_bias(module: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the activation adds up; what took a map's place since, or is listened to, gives the sum."""
    if plain_linear(module):
        return linear(x, module.weight), module.bias
    if type(module).__name__ == "Conv1D" and plain(module, type(module)):
        return x @ module.weight, module.bias
    return module(x), None


def _feed_forward(
    parts: tuple[str | None, ...], function: Any, kind: type[nn.Module], options: str
) -> Callable[[Any, Tensor], Tensor]:
    """kind, options: of the activation that computes this function."""
    act, gate, value, dropout, down, last = parts

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        given = getattr(self, str(act))
        if not plain(given, kind) or given.extra_repr() != options:
            # Another took its place since, or it is listened to.
            return self._made_of[0].forward(self, hidden_states)  # type: ignore[no-any-return]
        up = getattr(self, str(gate))
        if value is None:
            hidden = activation(*_product_and_bias(up, hidden_states), function)  # (..., F)
        else:
            halves = up(hidden_states), getattr(self, value)(hidden_states)
            hidden = activation(torch.cat(halves, -1), None, function, gated=True)
        if dropout is not None:
            hidden = getattr(self, dropout)(hidden)
        if down is not None:
            following = getattr(self, down)
            if down == "wo" and not torch.is_autocast_enabled(hidden.device.type):
                # T5 keeps this weight in float32 in models of 16 bits.
                hidden = hidden.to(following.weight.dtype)
            hidden = following(hidden)
        return hidden if last is None else getattr(self, last)(hidden)

    return forward


def swap_feed_forward(module: nn.Module) -> Undo | str:
    parts = feed_forward_parts(module)
    if parts is None:
        return f"{type(module).__name__} has an activation between parts that are not known here"
    act, first = getattr(module, str(parts[0])), getattr(module, str(parts[1]))
    if type(first).__name__ not in ("Linear", "Conv1D"):
        return f"its first layer is a {type(first).__name__}"
    if not plain(act, type(act)):
        return f"its activation {type(act).__name__} has hooks or a forward of its own"
    # Far out too: relu6 and gelu_10 are relu and gelu up to there.
    x = torch.cat([torch.linspace(-end, end, 97) for end in (6.0, 12.0, 100.0, 1e4)])
    with torch.no_grad():
        function = next(
            (name for name, f in _FUNCTIONS.items() if torch.allclose(act(x), f(x), atol=1e-6)), None
        )
    if function is None:
        return f"its activation {type(act).__name__} is none of {', '.join(_FUNCTIONS)}"
    width = first.weight.shape[1 if isinstance(first, nn.Linear) else 0]
    theirs: Any = type(module)
    cls = subclass(theirs, forward=(_feed_forward, parts, function, type(act), act.extra_repr()))
    return swap_if_same(module, width, cls) or f"{cls.__name__} computes something else than we would"
