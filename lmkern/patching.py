"""A model's own modules on lmkern's kernels, in place, and back."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lmkern.nn import Dropout
from lmkern.nn.transformer import COUNTERPARTS
from lmkern.ops.dispatch import flag

Undo = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Rule:
    """How one kind of module comes to run on our kernels.

    name: of the kind, as `Patch` lists it.
    matches: whether a module is of the kind; False for one that is ours already.
    replace: changes the module where it stands, and returns what undoes that; or returns the reason why it is
        left. Parameters stay the same objects. `swap_class` is the way to do it.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    replace: Callable[[nn.Module], Undo | str]


@dataclass(slots=True)
class Patch:
    """What `patch` did. swapped: path of a module -> name of the rule. left: path -> why."""

    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    _undo: list[Undo] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Makes every swapped module what it was, bit for bit. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        counts = Counter(self.swapped.values())
        kinds = ", ".join(f"{name} x {count}" for name, count in counts.items()) or "nothing"
        reasons: dict[str, list[str]] = {}
        for path, reason in self.left.items():
            reasons.setdefault(reason, []).append(path or "the model itself")
        lines = [f"lmkern.patch: swapped {kinds}"]
        for reason, paths in reasons.items():
            more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            lines.append(f"  left {', '.join(paths[:3])}{more}: {reason}")
        return "\n".join(lines)


def swap_class(module: nn.Module, cls: type[nn.Module]) -> Undo:
    """Makes module an instance of cls, a class with the same attributes; returns what undoes it.

    The object stays, and with it its parameters, buffers, hooks, name and training flag, so optimizers made
    before go on and tied weights stay tied.
    """
    original = module.__class__

    def undo() -> None:
        module.__class__ = original

    module.__class__ = cls
    return undo


def patch(model: nn.Module, *, verbose: bool = True) -> Patch:
    """Puts every module of model for which there is a rule on lmkern's kernels, in place, from the top down.

    Of transformers' models: attention, rotary embedding, feed-forwards, RMS norms and the language models'
    loss (`lmkern.huggingface`). Of torch.nn: the Transformer and its parts, MultiheadAttention, LayerNorm,
    RMSNorm, Embedding, Dropout and, on CPUs, Linear. A module of a subclass of these is left, since it may
    compute something else. Further rules stand in `RULES`; the first that matches a module decides. Other
    losses and functions that a forward calls are not touched.

    Returns a `Patch`, printed unless verbose is False. Patching twice changes nothing more. If a rule raises,
    all is as before. Patch before torch.compile, and after what asks for torch's very classes, as
    torch.ao.quantization and torch.fx.symbolic_trace do. A model saved whole (torch.save(model)) is read
    where lmkern is installed; its state dict (save_pretrained) is read anywhere.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: expected a torch.nn.Module; got {type(model).__name__}")
    verbose = flag("patch", "verbose", verbose)
    for package in {type(module).__module__.partition(".")[0] for module in model.modules()}:
        if package in RULES_OF:
            importlib.import_module(RULES_OF[package])
    done = Patch()
    try:
        for path, module in model.named_modules():
            rule = next((rule for rule in RULES if rule.matches(module)), None)
            if rule is None:
                continue
            result = rule.replace(module)
            if isinstance(result, str):
                done.left[path] = result
            else:
                done.swapped[path] = rule.name
                done._undo.append(result)
    except BaseException:
        done.undo()
        raise
    if verbose:
        print(done)
    return done


def _rule(theirs: type[nn.Module], ours: type[nn.Module]) -> Rule:
    def matches(module: nn.Module) -> bool:
        # torch's name for the last map of its MultiheadAttention, which is a part of that.
        return isinstance(module, theirs) and not isinstance(module, (ours, NonDynamicallyQuantizableLinear))

    def replace(module: nn.Module) -> Undo | str:
        if type(module) is not theirs:
            name = type(module).__name__
            return f"{name} is a subclass of torch.nn.{theirs.__name__} and may compute something else"
        if isinstance(module, nn.Linear) and module.weight.device.type not in ("cpu", "meta"):
            return f"on {module.weight.device.type} torch's own product serves"
        return swap_class(module, ours)

    return Rule(theirs.__name__, matches, replace)


# In order: the first that matches decides. Rules for subclasses of torch's modules stand before these.
RULES: list[Rule] = [_rule(theirs, ours) for theirs, ours in {**COUNTERPARTS, nn.Dropout: Dropout}.items()]
# Whose modules need further rules: importing the file adds them.
RULES_OF = {"transformers": "lmkern.huggingface"}
