"""Triton's attention over drawn combinations of features, in the interpreter, against float64.

Blocks are 16 wide, so that a few tokens are several blocks.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import numpy as np

from lmkern.kernels import triton_runtime, tuning
from lmkern.kernels.attention import Options, reference
from lmkern.kernels.attention import triton as attention
from lmkern.testing.inputs import seeded_randn
from lmkern.testing.interpreter import quicken

pytestmark = [
    pytest.mark.skipif(
        not triton_runtime.interpreted(), reason="needs TRITON_INTERPRET=1 (make test sets it)"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

SMALL = {
    ("attention", kernel): {"BLOCK_M": 16, "BLOCK_N": 32 if kernel == "drelative" else 16}
    for kernel in attention.TILES
}
# Relative to the largest element of the exact result: a few roundings of the format.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
CASES = 275

bounds = st.one_of(st.none(), st.integers(0, 24))
broadcast = st.one_of(st.none(), st.tuples(*[st.booleans()] * 4))


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, int], torch.dtype, dict[str, object]]:
    """Sizes, dtype, and what stands for the options."""
    sizes = {
        "H_kv": 1,
        "H": draw(st.sampled_from([1, 1, 2])),
        "B": draw(st.sampled_from([1, 1, 2])),
        "N_q": draw(st.integers(1, 21)),
        "N_k": draw(st.integers(1, 21)),
        "D": draw(st.sampled_from([1, 4, 8, 17])),
    }
    packed = draw(st.booleans()) if sizes["B"] == 1 else False
    what: dict[str, object] = {
        "left": draw(bounds),
        "right": draw(bounds),
        "top_left": draw(st.booleans()),
        "softcap": draw(st.sampled_from([0.0, 0.0, 1.5])),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.25])),
        "relative": draw(st.sampled_from([None, None, 1, sizes["H"]])),
        "sinks": draw(st.booleans()),
        "cuts": draw(st.lists(st.floats(0, 1), max_size=3)) if packed else None,
        "bias": None if packed else draw(broadcast),
        "mask": None if packed else draw(broadcast),
        "dlse": draw(st.booleans()),
        "needs": draw(st.sampled_from([None, None, 0, 1, 2])),
        "seed": draw(st.integers(0, 2**40)),
    }
    return sizes, draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])), what


def options_of(sizes: dict[str, int], what: dict[str, object]) -> Options:
    """Float32 wherever a tensor is floating."""
    randn = seeded_randn(int(what["seed"]) % 1000 + 1, torch.float32)
    full = (sizes["B"], sizes["H"], sizes["N_q"], sizes["N_k"])

    def part(kept: tuple[bool, ...] | None) -> Tensor | None:
        return (
            None if kept is None else randn(*(n if keep else 1 for n, keep in zip(full, kept, strict=True)))
        )

    def cumulative(cuts: list[float] | None, tokens: int) -> Tensor | None:
        if cuts is None:
            return None
        inner = sorted(round(cut * tokens) for cut in cuts)
        return torch.tensor([0, *inner, tokens], dtype=torch.int32)

    bias, mask = part(what["bias"]), part(what["mask"])
    rows, radius = what["relative"], max(sizes["N_q"], sizes["N_k"]) - 1
    return Options(
        softmax_scale=1 / math.sqrt(sizes["D"]),
        left=what["left"],
        right=what["right"],
        top_left=what["top_left"],
        softcap=what["softcap"],
        dropout_p=what["dropout_p"],
        seed=torch.tensor(what["seed"]) if what["dropout_p"] else None,
        bias=None if bias is None else bias.masked_fill(bias > 1.5, -torch.inf),
        mask=None if mask is None else mask > -0.7,
        relative_bias=None if rows is None else randn(rows, 2 * radius + 1),
        sinks=randn(sizes["H"]) if what["sinks"] else None,
        cu_seqlens_q=cumulative(what["cuts"], sizes["N_q"]),
        cu_seqlens_k=cumulative(what["cuts"], sizes["N_k"]),
    )


def widened(options: Options) -> Options:
    names = ("bias", "relative_bias", "sinks")
    wide = {name: None if (x := getattr(options, name)) is None else x.double() for name in names}
    others = {name: getattr(options, name) for name in Options.__slots__ if name not in names}
    return Options(**others, **wide)


def run(backend, q, k, v, dout, dlse, options, needs) -> dict[str, Tensor | None]:
    out, lse = backend.forward(q, k, v, options)
    if dlse is not None:
        dlse = dlse.masked_fill(lse == -torch.inf, 0.0)
    gradients = backend.backward(dout, q, k, v, out, lse, dlse, options, needs=needs)
    names = ("dq", "dk", "dv", "dbias", "drelative_bias", "dsinks")
    return {"out": out, "lse": lse, **dict(zip(names, gradients, strict=True))}


@settings(max_examples=CASES, deadline=None, derandomize=True, database=None)
@given(calls())
def test_every_result_of_every_combination(
    call: tuple[dict[str, int], torch.dtype, dict[str, object]],
) -> None:
    sizes, dtype, what = call
    quicken()
    B, H, H_kv, N_q, N_k, D = (sizes[name] for name in ("B", "H", "H_kv", "N_q", "N_k", "D"))
    randn = seeded_randn(int(what["seed"]) % 1000, dtype)
    q, k, v, dout = randn(B, H, N_q, D), randn(B, H_kv, N_k, D), randn(B, H_kv, N_k, D), randn(B, H, N_q, D)
    dlse = randn(B, H, N_q).float() if what["dlse"] else None
    options = options_of(sizes, what)
    given_ones = (
        True,
        True,
        True,
        *(x is not None for x in (options.bias, options.relative_bias, options.sinks)),
    )
    only = what["needs"]
    needs = tuple(one and (only is None or i == only) for i, one in enumerate(given_ones))
    with np.errstate(all="ignore"), tuning.override(SMALL):
        ours = run(attention, q, k, v, dout, dlse, options, needs)
    wide = (x if x is None else x.double() for x in (q, k, v, dout, dlse))
    exact = run(reference, *wide, widened(options), needs)
    for name, wanted in exact.items():
        result = ours[name]
        if wanted is None:
            assert result is None, name
            continue
        assert result is not None, name
        finite = wanted.isfinite()
        assert torch.equal(result.double()[~finite], wanted[~finite]), name
        scale = max(1.0, float(wanted[finite].abs().max())) if finite.any() else 1.0
        error = float((result.double() - wanted)[finite].abs().max()) if finite.any() else 0.0
        assert error <= TOLERANCE[dtype] * scale, f"{name}: {error / scale:.1e}"
