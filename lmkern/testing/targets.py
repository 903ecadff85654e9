"""What a test of an op runs on: each usable backend, and the CPU backend once for each instruction set."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from lmkern.kernels import backends, native, triton_runtime
from lmkern.testing.interpreter import quicken
from lmkern.testing.shapes import AttentionShape

Item = TypeVar("Item")

# What tells whether a module serves an op, where that is not what it does for all others.
_KERNELS_OF = {
    "attention": ("attention_forward",),
    "cached_attention": ("cached_attention_forward",),
    "embedding": ("embedding_forward",),
    "linear": ("linear_forward",),
    "linear_cross_entropy": ("linear_logits", "cross_entropy_forward"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """A backend of an op; for "cpu" the compiled modules up to one instruction set (None: the default)."""

    op: str
    backend: str
    instruction_set: str | None = None

    def __str__(self) -> str:
        return self.backend if self.instruction_set is None else f"{self.backend}_{self.instruction_set}"

    @property
    def interpreted(self) -> bool:
        """Whether this is Triton's interpreter: right, and a thousand times slower than anything else."""
        return self.backend == "triton" and triton_runtime.interpreted()

    @property
    def slow(self) -> bool:
        """Whether tests get a sample of shapes and features: on a GPU too, where Triton takes seconds to
        compile a kernel for each new head_dim, width, dtype or option.
        """
        return self.backend == "triton"

    @property
    def device(self) -> str:
        """Where its tensors lie."""
        return "cuda" if self.backend in ("cuda", "triton") and not self.interpreted else "cpu"

    @property
    def units_beside(self) -> float:
        """Units in the last place that an error may have beside twice torch's (error_budget.py)."""
        return 0.0 if self.backend == "cpu" else 1.0

    def some(self, items: Iterable[Item], step: int) -> list[Item]:
        """The items; of a slow target every step-th of them."""
        return list(items)[:: step if self.slow else 1]

    def lighter(self, shape: AttentionShape) -> AttentionShape:
        """The shape, of an even number of heads; of a slow target with half of them, in groups as large."""
        return replace(shape, H=shape.H // 2, H_kv=shape.H_kv // 2) if self.slow else shape

    def takes(self, dtype: torch.dtype, **options: Any) -> bool:
        """Whether the backend takes this dtype and these options of the call; a missing one is said to.

        An instruction set takes the dtypes of its own module: for the others the next one's is called, which
        is a target itself.
        """
        if backends.load(self.op, self.backend).unavailable():
            return True
        if not self.serves(dtype):
            return False
        x = torch.empty(1, 1, 1, 1, dtype=dtype, device=self.device)
        tensors = {"q": x, "k": x, "v": x} if self.op == "attention" else {"x": x.view(1, 1)}
        return backends.load(self.op, self.backend).unsupported(
            backends.Call(self.op, tensors, options, self.backend)
        ) is None  # fmt: skip

    def serves(self, dtype: torch.dtype) -> bool:
        """Whether the module of its instruction set has the op's kernels for this dtype; True without one."""
        if self.instruction_set is None:
            return True
        kernels = _KERNELS_OF.get(self.op, ("norm_forward",))
        return any(native.serves(self.instruction_set, kernel, dtype) for kernel in kernels)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it the CPU backend's calls go to this target's instruction set.

        Triton's interpreter computes with numpy, whose warnings of overflow and NaN are silenced.
        """
        if self.interpreted:
            quicken()
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                yield
            return
        if self.instruction_set is None:
            yield
            return
        chosen, name = native.instruction_set, self.instruction_set
        native.instruction_set = lambda: name  # type: ignore[assignment]
        try:
            yield
        finally:
            native.instruction_set = chosen


def targets(op: str) -> list[Target]:
    """Every usable backend of an op, fastest first; "cpu" in any case: a missing build fails its tests."""
    found: list[Target] = []
    for backend in backends.backend_names(op):
        if backend == "cpu" and native.cpu_modules():
            each = [Target(op, backend, name) for name in native.cpu_modules()]
            found += [target for target in each if any(map(target.serves, native.DTYPE_CODES))]
        elif backend == "cpu" or backends.load(op, backend).unavailable() is None:
            found.append(Target(op, backend))
    return found
