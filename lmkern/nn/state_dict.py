"""State dicts that fit or are refused whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def mismatches(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """A line "name: expected | got" for every tensor whose shape differs or that one side lacks ("-")."""
    lines = []
    for name in sorted({*expected, *found}):
        shapes = [str(tuple(side[name].shape)) if name in side else "-" for side in (expected, found)]
        if shapes[0] != shapes[1]:
            lines.append(f"  {name}: {shapes[0]} | {shapes[1]}")
    return lines


class LoadsWhole(nn.Module):
    """A module whose load_state_dict loads everything or, raising, nothing; torch's copies what fits."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """torch.nn.Module's. Raises RuntimeError, as that does, with every tensor that does not fit."""
        # A hook may rename or reshape what it is given, so of inner ones only torch can tell what fits.
        hooked = any(module._load_state_dict_pre_hooks for module in self.modules() if module is not self)
        # A tied parameter may stand in the state_dict once, and is loaded by each of its names.
        expected = {**self.state_dict(), **dict(self.named_parameters(remove_duplicate=False))}
        tensors = all(isinstance(x, Tensor) for x in (*expected.values(), *state_dict.values()))
        given = dict(state_dict)
        if strict and tensors and not hooked:
            for hook in self._load_state_dict_pre_hooks.values():
                hook(given, "", {}, strict, [], [], [])
        if strict and tensors and not hooked and (lines := mismatches(expected, given)):
            table = "\n".join(lines)
            raise RuntimeError(
                f"{type(self).__name__}.load_state_dict: nothing was loaded, since these tensors do not fit; "
                f"name: expected | got\n{table}"
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)
