"""What a benchmark of an op declares: its cases, the work of each, and who computes it on which inputs.

benchmarks/ops/bench_<op>.py is all that an op needs: conftest.py, report.py and pictures.py know none by
name. It holds OP, CASES and QUICK_CASES, and one function that conftest.py runs for every case, direction,
dtype and backend:

    def bench_gelu(case, direction, dtype, backend, device, compete):
        x, dy = ...
        compete(Contest(ours=partial(gelu, backend=backend), competitors={EAGER: F.gelu}, eager="F.gelu",
                        inputs=Inputs((x,), leaves=(x,), gradients=(dy,)), work=Work(flops, bytes, "copy")))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Of a file of results; a change that benchmarks/report.py cannot read gets the next number.
FORMAT = 1
DTYPES = (torch.float32, torch.bfloat16)
# "both" is forward and backward in one call, for an op that computes gradients ahead or whose backward pass
# cannot be told from its forward.
DIRECTIONS = ("forward", "backward", "both")
EAGER, COMPILED = "torch eager", "torch.compile"


@dataclass(frozen=True)
class Case:
    """One shape of an op, named in the results by its words.

    shape: anything whose str() tells the sizes.
    note: what else sets the row apart, in a word or two: "peaky".
    main: its rows stand in README.md.
    kept_memory: the process keeps freed memory as a training run does (lmkern.memory). That cannot
        be undone, so these rows run after all others; their names say "kept-memory".
    peak_memory: the memory that a call takes is measured too (on a CPU not together with kept_memory).
    """

    shape: Any
    note: str = ""
    main: bool = False
    kept_memory: bool = False
    peak_memory: bool = False
    directions: tuple[str, ...] = ("forward", "backward")
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def __str__(self) -> str:
        words = (str(self.shape), self.note, "kept-memory" if self.kept_memory else "")
        return "-".join(word for word in words if word)


@dataclass(frozen=True)
class Work:
    """How much is computed.

    flops: multiplications and additions of the algorithm; what a kernel computes twice counts once.
    bytes: each input read once and each output written once.
    bound: the ceiling to hold it against, "matmul" or "copy".
    """

    flops: int
    bytes: int
    bound: str


@dataclass(frozen=True)
class Inputs:
    """What every contestant is called with.

    leaves: those of the arguments that get gradients. gradients: of the outputs, as many as there are.
    """

    arguments: tuple[Any, ...]
    leaves: tuple[Tensor, ...] = ()
    gradients: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Contest:
    """One row of the results: ours beside the others on the same inputs.

    ours, competitors: functions of the arguments that return a tensor or a tuple of tensors. EAGER is among
        the competitors, and COMPILED is it under torch.compile unless compiles is False.
    eager: which of torch's kernels EAGER is here, in words.
    reference: what ours must agree with instead of EAGER, where torch's own result is far off.
    within: entered around everything that runs.
    baseline: other inputs of ours, by name; the row also says how much faster ours is on those (below 1 for
        slower): "ordinary logits".
    """

    ours: Callable[..., Any]
    competitors: Mapping[str, Callable[..., Any]]
    eager: str
    inputs: Inputs
    work: Work
    reference: Callable[..., Any] | None = None
    compiles: bool = True
    within: AbstractContextManager[Any] = field(default_factory=nullcontext)
    baseline: tuple[str, Inputs] | None = None


# The fixture `compete`: times the contest and keeps the row.
Compete = Callable[[Contest], None]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
