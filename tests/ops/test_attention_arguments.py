"""Options of `lmkern.attention`: their dtypes, and what is refused."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import lmkern
from lmkern.testing import (
    AttentionShape,
    attention_inputs,
    leaves,
    targets,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# More keys than queries.
SHAPE = AttentionShape(2, 4, 70, 24, 90, 2)


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("parameter", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_parameters_may_have_another_dtype_and_their_gradient_has_it_too(
    dtype: torch.dtype, parameter: torch.dtype
) -> None:
    q, k, v, _ = attention_inputs(SHAPE, dtype)
    options = {
        "bias": torch.randn(4, 70, 90),
        "relative_bias": torch.randn(4, 179),
        "alibi_slopes": torch.rand(4),
        "sinks": torch.randn(4),
    }
    options = dict(zip(options, leaves(*(x.to(parameter) for x in options.values())), strict=True))
    if parameter == torch.float64 and dtype != torch.float64:
        with pytest.raises(ValueError, match=r"bias must be no wider than q; got torch\.float64"):
            lmkern.attention(q, k, v, **options)
        del options["bias"]
    out = lmkern.attention(q, k, v, **options)
    assert out.dtype == dtype
    wide = {name: x.detach().double() for name, x in options.items()}
    exact = lmkern.attention(q.double(), k.double(), v.double(), **wide)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=16 * torch.finfo(dtype).eps)
    out.sum().backward()
    for name, x in options.items():
        assert x.grad is not None
        assert x.grad.dtype == parameter, name


@pytest.mark.parametrize("name", ["bias", "sinks"])
def test_option_changed_before_the_backward_pass_is_an_error(name: str) -> None:
    q, k, v = leaves(*attention_inputs(SHAPE)[:3])
    option = torch.zeros(70, 90) if name == "bias" else torch.zeros(4)
    out = lmkern.attention(q, k, v, **{name: option})
    assert isinstance(out, Tensor)
    option += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_backend_says_what_it_does_not_take() -> None:
    q, k, v, _ = attention_inputs(SHAPE, torch.float64)
    for target in (target for target in targets("attention") if target.interpreted):
        with pytest.raises(
            lmkern.UnsupportedBackend, match="'triton' takes float32, float16 and bfloat16, not float64"
        ):
            lmkern.attention(q, k, v, backend=target.backend)


WRONG = [
    (
        {"window": (-1, 0)},
        r"window must be \(left, right\), each at least 0 or None for no bound; got \(-1, 0\)",
    ),
    ({"softcap": -1.0}, r"softcap must be above 0, or None or 0 for none; got -1.0"),
    ({"softcap": math.nan}, r"softcap must be above 0, or None or 0 for none; got nan"),
    ({"dropout_p": 1.5}, r"dropout_p must lie in \[0, 1\]; got 1.5"),
    (
        {"dropout_p": 0.5, "dropout_seed": torch.tensor(1.0)},
        r"dropout_seed must be an int64 tensor without dim",
    ),
    (
        {"dropout_p": 0.5, "dropout_seed": torch.tensor([1])},
        r"dropout_seed must be .* without dimensions; got torch.int64 \(1,\)",
    ),
    ({"bias": torch.zeros(3, 70, 90)}, r"bias must broadcast to \(2, 4, 70, 90\); got \(3, 70, 90\)"),
    ({"bias": torch.zeros(1, 2, 4, 70, 90)}, r"bias must broadcast to \(2, 4, 70, 90\); got"),
    ({"bias": torch.zeros(70, 90, dtype=torch.int32)}, r"bias must be floating; got torch.int32"),
    ({"bias": torch.zeros(70, 90, device="meta")}, r"bias must be on q's device, cpu; move it with .to\(\)"),
    (
        {"mask": torch.ones(70, 91, dtype=torch.bool)},
        r"mask must broadcast to \(2, 4, 70, 90\); got \(70, 91\)",
    ),
    ({"mask": torch.ones(70, 90)}, r"mask must be boolean \(True: seen\); got torch.float32"),
    (
        {"relative_bias": torch.zeros(4, 177)},
        r"relative_bias must be \(4 or 1, 2 R \+ 1\) with R at least 89",
    ),
    ({"relative_bias": torch.zeros(4, 180)}, r"relative_bias must be .*; got \(4, 180\)"),
    ({"relative_bias": torch.zeros(2, 179)}, r"relative_bias must be .*; got \(2, 179\)"),
    ({"relative_bias": torch.zeros(179)}, r"relative_bias must be .*; got \(179,\)"),
    ({"alibi_slopes": torch.zeros(2)}, r"alibi_slopes must be \(4,\), one a query head; got \(2,\)"),
    ({"sinks": torch.zeros(4, 1)}, r"sinks must be \(4,\), one a query head; got \(4, 1\)"),
    ({"sinks": torch.zeros(4, dtype=torch.int64)}, r"sinks must be floating; got torch.int64"),
    ({"sinks": torch.zeros(4, device="meta")}, r"sinks must be on q's device, cpu"),
]


@pytest.mark.parametrize(
    ("options", "message"), WRONG, ids=lambda x: "-".join(x) if isinstance(x, dict) else ""
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    q, k, v, _ = attention_inputs(SHAPE)
    with pytest.raises(ValueError, match=f"^attention: {message}"):
        lmkern.attention(q, k, v, **options)
