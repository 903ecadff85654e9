"""`lmkern.scaled_dot_product_attention` against torch's, argument for argument."""

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lmkern
from lmkern.testing import leaves, seeded_randn

B, H, N_q, N_k, D = 2, 3, 10, 14, 8


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    randn = seeded_randn(0, dtype)
    return randn(B, H, N_q, D), randn(B, H, N_k, D), randn(B, H, N_k, D)


def assert_same_as_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> None:
    """Values and gradients, that of a floating mask among them."""
    results = []
    for function in (lmkern.scaled_dot_product_attention, F.scaled_dot_product_attention):
        arguments = list(leaves(q, k, v))
        attn_mask = mask
        if mask is not None and mask.is_floating_point():
            attn_mask = mask.clone().requires_grad_()
            arguments.append(attn_mask)
        out = function(*arguments[:3], attn_mask=attn_mask, **options)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        results.append((out, *torch.autograd.grad(out, arguments, weights)))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-9, atol=1e-9)


def test_signature_is_torchs() -> None:
    # torch's is a builtin: its arguments stand in its docstring alone.
    parameters = inspect.signature(lmkern.scaled_dot_product_attention).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    empty = inspect.Parameter.empty
    assert defaults == {
        "query": empty, "key": empty, "value": empty, "attn_mask": None,
        "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False,
    }  # fmt: skip
    assert list(defaults) == ["query", "key", "value", *list(defaults)[3:]]
    assert F.scaled_dot_product_attention.__doc__ is not None
    for name in defaults:
        assert name in F.scaled_dot_product_attention.__doc__


@pytest.mark.parametrize("lengths", [(10, 14), (14, 10), (9, 9), (1, 12)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_is_causal_counts_from_the_first_query_and_key(lengths: tuple[int, int], is_causal: bool) -> None:
    randn = seeded_randn(1, torch.float64)
    q, k, v = (randn(B, H, n, D) for n in (lengths[0], lengths[1], lengths[1]))
    assert_same_as_torch(q, k, v, is_causal=is_causal)


@pytest.mark.parametrize(
    "shape", [(N_q, N_k), (1, N_k), (N_q, 1), (H, N_q, N_k), (B, 1, N_q, N_k), (B, 1, 1, N_k)], ids=str
)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_every_shape(kind: str, shape: tuple[int, ...]) -> None:
    numbers = seeded_randn(2, torch.float64)(*shape)
    assert_same_as_torch(*inputs(), numbers > -2 if kind == "bool" else numbers)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_expanded_mask(kind: str) -> None:
    numbers = seeded_randn(2, torch.float64)(B, 1, 1, N_k).expand(B, H, N_q, N_k)
    if kind == "bool":
        assert_same_as_torch(*inputs(), numbers > -1)
        return
    (mask,) = leaves(numbers)
    assert mask.stride()[1:3] == (0, 0)
    gradients = []
    for function in (lmkern.scaled_dot_product_attention, F.scaled_dot_product_attention):
        out = function(*inputs(), attn_mask=mask)
        gradients.append(torch.autograd.grad(out.square().sum(), mask)[0])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(N_q + 1, N_k), (7, 1, 1, N_q, N_k), (4, N_q, N_k)], ids=str)
def test_mask_that_does_not_broadcast(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"attn_mask must broadcast to \(2, 3, 10, 14\); got \("):
        lmkern.scaled_dot_product_attention(*inputs(), attn_mask=torch.ones(shape, dtype=torch.bool))


def test_mask_of_integers() -> None:
    with pytest.raises(ValueError, match=r"attn_mask must be boolean .* or floating .*; got torch.int64"):
        lmkern.scaled_dot_product_attention(*inputs(), attn_mask=torch.ones(N_q, N_k, dtype=torch.int64))


def test_mask_of_a_wider_dtype() -> None:
    mask = torch.zeros(N_q, N_k, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"attn_mask .*float64"):
        lmkern.scaled_dot_product_attention(*inputs(torch.float32), attn_mask=mask)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_row_that_a_mask_hides_is_zero_with_zero_gradients(kind: str) -> None:
    q, k, v = leaves(*inputs())
    mask = torch.ones(N_q, N_k, dtype=torch.bool)
    mask[3] = False
    if kind == "float":
        mask = torch.zeros(N_q, N_k, dtype=torch.float64).masked_fill(~mask, -math.inf)
    out = lmkern.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert (out[:, :, 3] == 0).all()
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert (dq[:, :, 3] == 0).all()
    for gradient in (dq, dk, dv):
        assert gradient.isfinite().all()
        assert gradient.any()


def test_floating_mask_in_another_dtype_and_16_bit_inputs() -> None:
    q, k, v = inputs(torch.bfloat16)
    mask = torch.randn(N_q, N_k, dtype=torch.bfloat16)
    ours = lmkern.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert ours.dtype == torch.bfloat16
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask.double())
    torch.testing.assert_close(ours, exact.bfloat16(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("scale", [0.1, 2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_scale(scale: float, masked: bool) -> None:
    mask = torch.ones(N_q, N_k, dtype=torch.bool).tril(3) if masked else None
    assert_same_as_torch(*inputs(), mask, scale=scale)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"mask": True}], ids=str)
def test_enable_gqa(options: dict[str, bool]) -> None:
    randn = seeded_randn(3, torch.float64)
    q, k, v = randn(B, 6, N_q, D), randn(B, 2, N_k, D), randn(B, 2, N_k, D)
    mask = torch.randn(N_q, N_k, dtype=torch.float64) if options.get("mask") else None
    assert_same_as_torch(q, k, v, mask, enable_gqa=True, is_causal=options.get("is_causal", False))
    with pytest.raises(ValueError, match="share the number of heads unless enable_gqa=True"):
        lmkern.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 3, 4), (1, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_any_number_of_leading_dimensions(lead: tuple[int, ...], masked: bool) -> None:
    randn = seeded_randn(4, torch.float64)
    q, k, v = randn(*lead, N_q, D), randn(*lead, N_k, D), randn(*lead, N_k, D)
    mask = randn(*lead, N_q, N_k) if masked else None
    assert_same_as_torch(q, k, v, mask)


@pytest.mark.parametrize("shape", [(3, N_q, N_k), (2, 1, 1, N_q, N_k), (2, 4, 1, N_q, N_k)], ids=str)
def test_mask_that_broadcasts_over_five_dimensions(shape: tuple[int, ...]) -> None:
    randn = seeded_randn(5, torch.float64)
    q, k, v = randn(2, 4, 3, N_q, D), randn(2, 4, 3, N_k, D), randn(2, 4, 3, N_k, D)
    assert_same_as_torch(q, k, v, randn(*shape))


@pytest.mark.parametrize("width", [5, 12])
@pytest.mark.parametrize("is_causal", [False, True])
def test_values_of_another_width(width: int, is_causal: bool) -> None:
    q, k, _ = inputs()
    v = seeded_randn(6, torch.float64)(B, H, N_k, width)
    assert_same_as_torch(q, k, v, is_causal=is_causal)


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    # Equal weights, v the identity: out is the weights, 1 / N_k each before dropout.
    n, p = 200, 0.3
    q, k = torch.zeros(1, 4, n, n), torch.zeros(1, 4, n, n)
    v = torch.eye(n).expand(1, 4, n, n)
    out = lmkern.scaled_dot_product_attention(q, k, v, dropout_p=p)
    kept = 1 / n / (1 - p)
    assert ((out == 0) | ((out - kept).abs() < 1e-6)).all()
    # Five standard deviations of 160,000 throws.
    assert abs((out == 0).double().mean() - p) < 5 * math.sqrt(p * (1 - p) / out.numel())
    other = lmkern.scaled_dot_product_attention(q, k, v, dropout_p=p)
    assert not torch.equal(out, other)


def test_dropout_of_everything_is_zero() -> None:
    q, k, v = leaves(*inputs())
    out = lmkern.scaled_dot_product_attention(q, k, v, dropout_p=1.0)
    assert (out == 0).all()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(out.sum(), (q, k, v)))


def test_dropout_is_the_same_for_the_same_seed() -> None:
    outs = []
    for _ in range(2):
        torch.manual_seed(3)
        outs.append(lmkern.scaled_dot_product_attention(*inputs(), dropout_p=0.5, is_causal=True))
    assert torch.equal(*outs)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.1, math.nan])
def test_dropout_outside_of_its_range(dropout_p: float) -> None:
    with pytest.raises(ValueError, match=r"dropout_p must lie in \[0, 1\]; got"):
        lmkern.scaled_dot_product_attention(*inputs(), dropout_p=dropout_p)


def test_mask_and_is_causal_together() -> None:
    mask = torch.ones(N_q, N_k, dtype=torch.bool)
    with pytest.raises(ValueError, match="give attn_mask or is_causal=True, not both"):
        lmkern.scaled_dot_product_attention(*inputs(), attn_mask=mask, is_causal=True)


def test_ranks_that_do_not_match() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"must be \(\.\.\., N, D\) of equal rank; got q \(2, 3, 10, 8\)"):
        lmkern.scaled_dot_product_attention(q, k[0], v)


def test_compiled_with_and_without_a_mask() -> None:
    q, k, v = inputs(torch.float32)
    mask = torch.randn(N_q, N_k)
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}):
        torch.compiler.reset()
        compiled = torch.compile(lmkern.scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
        ours = lmkern.scaled_dot_product_attention(q, k, v, **options)
        assert torch.equal(compiled(q, k, v, **options), ours)


def test_values_of_another_width_under_autocast() -> None:
    """The reference's products stay in float32: errors are torch's."""
    randn = seeded_randn(0, torch.float32)
    q, k, v = randn(1, 2, 64, 32), randn(1, 2, 64, 32), randn(1, 2, 64, 16)
    narrow = [x.bfloat16() for x in (q, k, v)]
    exact = F.scaled_dot_product_attention(*(x.double() for x in narrow))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (
            (sdpa(q, k, v).double() - exact).abs().mean()
            for sdpa in (lmkern.scaled_dot_product_attention, F.scaled_dot_product_attention)
        )
    assert ours <= 1.05 * theirs
