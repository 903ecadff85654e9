"""Dropout of attention weights: the same mask for the same seed, on every backend and in every pass."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lmkern
from lmkern.kernels.philox import keep_mask, keep_scale
from lmkern.testing import (
    AttentionFeatures,
    AttentionShape,
    Target,
    attention_inputs,
    attention_results,
    leaves,
    our_attention,
    targets,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
P = 0.3
TARGETS_DTYPES = [
    (t, dtype)
    for t in targets("attention")
    for dtype in DTYPES
    if t.takes(dtype, options=AttentionFeatures(dropout_p=P).kernel_options(dtype))
]
TARGETS = [target for target, dtype in TARGETS_DTYPES if dtype == torch.float32]
IN_FLOAT32 = [target for target in TARGETS if target.takes(torch.float32)]
PACKED = AttentionFeatures(dropout_p=P, documents=((1, 1),))
PACKING = [target for target in TARGETS if target.takes(torch.float32, options=PACKED.kernel_options())]


def seed(number: int, device: str = "cpu") -> Tensor:
    return torch.tensor(number, dtype=torch.int64, device=device)


def weights(
    target: Target, B: int, H: int, n_q: int, n_k: int, dtype: torch.dtype = torch.float32, **options: object
) -> Tensor:
    """(B, H, N_q, N_k): what each key counts where scores are equal, read off with the identity as values."""
    q = torch.zeros(B, H, n_q, n_k, dtype=dtype, device=target.device)
    k = torch.zeros(B, H, n_k, n_k, dtype=dtype, device=target.device)
    v = torch.eye(n_k, dtype=dtype, device=target.device).expand(B, H, n_k, n_k)
    with target.active():
        out = lmkern.attention(q, k, v, dropout_p=P, backend=target.backend, **options)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    return out.cpu()


@pytest.mark.parametrize("number", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
@pytest.mark.parametrize(("target", "dtype"), TARGETS_DTYPES, ids=str)
def test_mask_is_the_contracts(target: Target, dtype: torch.dtype, number: int) -> None:
    found = weights(target, 2, 3, 37, 101, dtype, dropout_seed=seed(number, target.device))
    kept = keep_mask(seed(number), P, (2, 3, 37, 101))
    assert torch.equal(found != 0, kept)
    expected = (kept.double() * keep_scale(P) / 101).to(dtype)
    torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("target", PACKING, ids=str)
def test_mask_of_a_packed_document_counts_within_it(target: Target) -> None:
    ends = [0, 20, 20, 75, 101]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=target.device)
    found = weights(target, 1, 2, 101, 101, cu_seqlens=cu_seqlens, dropout_seed=seed(9, target.device))
    for number, (start, end) in enumerate(pairwise(ends)):
        length = end - start
        kept = keep_mask(seed(9), P, (1, 2, length, length), outermost=number)
        assert torch.equal(found[:, :, start:end, start:end] != 0, kept)


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_backward_has_the_mask_of_forward(target: Target) -> None:
    # With equal scores dv of an identity dout is the weights as they were dropped, transposed.
    n = 60
    q, k, v = leaves(*(torch.zeros(1, 2, n, n, device=target.device) for _ in range(3)))
    with target.active():
        out = lmkern.attention(
            q, k, v, dropout_p=P, dropout_seed=seed(4, target.device), backend=target.backend
        )
        dout = torch.eye(n, device=target.device).expand(1, 2, n, n)
        (dv,) = torch.autograd.grad(out, v, dout)
    assert torch.equal(dv.mT.cpu() != 0, keep_mask(seed(4), P, (1, 2, n, n)))


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_seed_comes_from_torchs_generator(target: Target) -> None:
    found = []
    for number in (3, 3, 4):
        torch.manual_seed(number)
        found.append(weights(target, 1, 1, 30, 30))
    again = weights(target, 1, 1, 30, 30)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[2], again)


def test_seeds_from_the_generator_use_all_their_bits() -> None:
    seeds = []
    original = torch.randint

    def randint(*arguments: object, **options: object) -> Tensor:
        seeds.append(original(*arguments, **options))  # type: ignore[call-overload]
        return seeds[-1]

    q = torch.zeros(1, 1, 2, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", randint)
        for _ in range(64):
            lmkern.attention(q, q, q, dropout_p=P)
    assert len({int(x) for x in seeds}) == 64
    for bit in (0, 31, 32, 62, 63):
        assert {int(x) >> bit & 1 for x in seeds} == {0, 1}, bit


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.0}, {"dropout_p": 1e-6}])
def test_no_dropout_draws_no_seed(options: dict[str, float]) -> None:
    q, k, v, _ = attention_inputs(AttentionShape(1, 2, 20, 8, 20, 2))
    before = torch.random.get_rng_state()
    out = lmkern.attention(q, k, v, **options)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(out, lmkern.attention(q, k, v))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_mask(use_reentrant: bool) -> None:
    *inputs, dout = attention_inputs(AttentionShape(2, 2, 40, 16, 40, 2), torch.float64)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = lmkern.attention(q, k, v, dropout_p=P)
        assert isinstance(out, Tensor)
        return out

    def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = checkpoint(call, q, k, v, use_reentrant=use_reentrant)
        assert isinstance(out, Tensor)
        return out

    found = []
    for function in (call, checkpointed):
        torch.manual_seed(5)
        arguments = leaves(*inputs)
        out = function(*arguments)
        torch.rand(7)
        out.backward(dout)
        found.append((out.detach(), *(x.grad for x in arguments)))
    for plain, recomputed in zip(*found, strict=True):
        assert plain is not None
        assert recomputed is not None
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_dropout_of_everything_is_zero(target: Target) -> None:
    shape = AttentionShape(1, 2, 40, 8, 30, 2)
    inputs = attention_inputs(shape, device=target.device)
    options = {"dropout_p": 1.0, "dropout_seed": seed(1, target.device)}
    with target.active():
        results = attention_results(our_attention(shape, target.backend), *inputs, options=options)
    assert all((results[name] == 0).all() for name in ("out", "dq", "dk", "dv"))
    assert results["lse"].isfinite().all()


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_lse_is_that_of_all_keys(target: Target) -> None:
    shape = AttentionShape(1, 2, 40, 8, 30, 2)
    q, k, v, _ = attention_inputs(shape, device=target.device)
    call: Callable[..., tuple[Tensor, Tensor]] = our_attention(shape, target.backend)
    with target.active():
        _, lse = call(q, k, v, dropout_p=P, dropout_seed=seed(1, target.device))
        torch.testing.assert_close(lse, call(q, k, v)[1])


def test_scaled_dot_product_attention_drops_on_the_kernels_path() -> None:
    n = 40
    q, v = torch.zeros(1, 2, n, n), torch.eye(n).expand(1, 2, n, n)
    torch.manual_seed(6)
    out = lmkern.scaled_dot_product_attention(q, q, v, dropout_p=P)
    torch.manual_seed(6)
    assert torch.equal(out, lmkern.attention(q, q, v, dropout_p=P))
    assert math.isclose((out == 0).double().mean().item(), P, abs_tol=0.05)
