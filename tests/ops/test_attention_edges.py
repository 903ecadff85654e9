"""`lmkern.attention` at its edges: nothing to sum over, NaN and infinity, arguments that make no sense."""

import pytest
import torch
from torch import Tensor

import lmkern
from lmkern.testing import (
    ALONE,
    AttentionShape,
    Target,
    attention_inputs,
    attention_results,
    attention_results_and_alone,
    leaves,
    our_attention,
    poisoned_memory,
    targets,
)

TARGETS = targets("attention")
IN_FLOAT32 = [target for target in TARGETS if target.takes(torch.float32)]
# The reference holds the whole score matrix and multiplies its zeros by NaN: its gradients, and what it makes
# of v, are no measure here.
KERNELS = [target for target in TARGETS if target.backend != "reference"]
# Keys that a kernel may take at once: a NaN in v may reach the queries that see another key of its block.
KEY_BLOCK = 128
KERNELS_DTYPES = [
    (target, dtype)
    for target in KERNELS
    for dtype in ((torch.float32, torch.bfloat16) if target.backend == "cpu" else (torch.float32,))
]


def assert_same(ill: Tensor, clean: Tensor, dtype: torch.dtype) -> None:
    """The same bits; of 16-bit inputs near them: without a bound on the scores their maximum is taken off."""
    if dtype == torch.float32:
        assert torch.equal(ill, clean)
    else:
        torch.testing.assert_close(ill, clean, rtol=0.02, atol=0.02)


def names(results: dict[str, Tensor], *wanted: str) -> list[str]:
    """Of the results, those of these names, with lse and without."""
    return [name for name in results if name.removesuffix(ALONE) in wanted]


def run(target: Target, shape: AttentionShape, *inputs: Tensor) -> dict[str, Tensor]:
    with poisoned_memory(), target.active():
        return attention_results_and_alone(shape, target.backend, *inputs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("B", "H", "H_kv", "N_q", "N_k"),
    [(0, 2, 1, 3, 3), (2, 0, 0, 3, 3), (2, 2, 1, 0, 3), (2, 2, 1, 3, 0), (2, 2, 1, 0, 0), (1, 1, 1, 200, 0)],
)
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_empty_sizes(target: Target, B: int, H: int, H_kv: int, N_q: int, N_k: int, causal: bool) -> None:
    shape = AttentionShape(B, H, N_q, 8, N_k, H_kv, causal)
    results = run(target, shape, *attention_inputs(shape, device=target.device))
    assert results["out"].shape == (B, H, N_q, 8)
    assert results["lse"].shape == (B, H, N_q)
    assert results["dk"].shape == results["dv"].shape == (B, H_kv, N_k, 8)
    assert (results["lse"] == -torch.inf).all()
    for result in ("out", "dq", "dk", "dv"):
        assert (results[result] == 0).all(), result


@pytest.mark.parametrize(("N_q", "N_k"), [(70, 5), (130, 66), (3, 1)])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_query_that_sees_no_key_is_zero_and_gives_no_gradient(target: Target, N_q: int, N_k: int) -> None:
    shape = AttentionShape(1, 2, N_q, 8, N_k, 2, causal=True)
    q, k, v, dout = attention_inputs(shape, device=target.device)
    blind = N_q - N_k
    dlse = torch.randn(1, 2, N_q).to(target.device)
    with poisoned_memory(), target.active():
        call = our_attention(shape, target.backend)
        results = attention_results(call, q, k, v, dout, dlse)
        # Whatever they and their gradients hold.
        q[:, :, :blind] = 1e30
        dout[:, :, :blind] = 1e30
        others = attention_results(call, q, k, v, dout, dlse)
    assert (results["out"][:, :, :blind] == 0).all()
    assert (results["lse"][:, :, :blind] == -torch.inf).all()
    assert (results["dq"][:, :, :blind] == 0).all()
    assert all(results[result].isfinite().all() for result in ("out", "dq", "dk", "dv"))
    assert torch.equal(results["dk"], others["dk"])
    assert torch.equal(results["dv"], others["dv"])


# Of the second shape whole blocks of rows are operands as they lie.
@pytest.mark.parametrize(("tokens", "width"), [(150, 16), (160, 32)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(("target", "dtype"), KERNELS_DTYPES, ids=str)
def test_nan_or_infinity_in_q_reaches_its_own_query_alone(
    target: Target, bad: float, dtype: torch.dtype, tokens: int, width: int
) -> None:
    shape = AttentionShape(1, 2, tokens, width, tokens, 2, causal=True)
    q, k, v, dout = attention_inputs(shape, dtype, device=target.device)
    k = k.abs()
    clean = run(target, shape, q, k, v, dout)
    query = 70
    q[0, 1, query, 3] = bad
    ill = run(target, shape, q, k, v, dout)
    for result in names(ill, "out", "lse", "dq"):
        assert not ill[result][0, 1, query].isfinite().any(), result
        ill[result][0, 1, query] = clean[result][0, 1, query]
        assert_same(ill[result], clean[result], dtype)
    for result in names(ill, "dk", "dv"):
        assert ill[result][0, 1, : query + 1].isnan().any(-1).all(), result
        ill[result][0, 1, : query + 1] = clean[result][0, 1, : query + 1]
        assert_same(ill[result], clean[result], dtype)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(("target", "dtype"), KERNELS_DTYPES, ids=str)
def test_nan_or_infinity_in_k_reaches_exactly_the_queries_that_see_it(
    target: Target, bad: float, dtype: torch.dtype
) -> None:
    shape = AttentionShape(1, 2, 150, 16, 150, 2, causal=True)
    q, k, v, dout = attention_inputs(shape, dtype, device=target.device)
    q = q.abs()
    clean = run(target, shape, q, k, v, dout)
    key = 70
    k[0, 1, key, 3] = bad
    ill = run(target, shape, q, k, v, dout)
    for result in names(ill, "out", "lse", "dq"):
        assert not ill[result][0, 1, key:].isfinite().any(), result
        ill[result][0, 1, key:] = clean[result][0, 1, key:]
        assert_same(ill[result], clean[result], dtype)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("target", "dtype"), KERNELS_DTYPES, ids=str)
def test_nan_or_infinity_in_v_stays_in_its_key_block_and_column(
    target: Target, bad: float, dtype: torch.dtype
) -> None:
    shape = AttentionShape(1, 2, 200, 16, 200, 2, causal=True)
    q, k, v, dout = attention_inputs(shape, dtype, device=target.device)
    clean = run(target, shape, q, k, v, dout)
    key, column = 140, 3
    block = key // KEY_BLOCK * KEY_BLOCK
    v[0, 1, key, column] = bad
    ill = run(target, shape, q, k, v, dout)
    for result in names(ill, "out"):
        assert not ill[result][0, 1, key:, column].isfinite().any()
        ill[result][0, 1, block:, column] = clean[result][0, 1, block:, column]
    for result in names(ill, "out", "lse", "dv"):
        assert_same(ill[result], clean[result], dtype)
    for result in names(ill, "dq"):
        assert not ill[result][0, 1, key:].isfinite().any()
        assert_same(ill[result][0, 1, :block], clean[result][0, 1, :block], dtype)
        assert_same(ill[result][0, 0], clean[result][0, 0], dtype)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("target", [t for t in KERNELS if t.takes(torch.bfloat16)], ids=str)
def test_hidden_keys_have_no_weight_at_all(target: Target, return_lse: bool) -> None:
    shape = AttentionShape(1, 2, 150, 64, 150, 2, causal=True)
    q, k, v, _ = attention_inputs(shape, torch.bfloat16, device=target.device)
    huge = v.clone()
    huge[:, :, 100:] *= 2.0**30
    with poisoned_memory(), target.active():
        outs = [
            lmkern.attention(q, k, x, causal=True, return_lse=return_lse, backend=target.backend)
            for x in (v, huge)
        ]
    out, with_huge = (x[0] if isinstance(x, tuple) else x for x in outs)
    assert torch.equal(out[:, :, :100], with_huge[:, :, :100])
    assert not torch.equal(out[:, :, 100:], with_huge[:, :, 100:])


@pytest.mark.parametrize("which", [0, 1])
def test_nan_in_q_or_k_reaches_the_queries_that_see_it_in_the_reference(which: int) -> None:
    shape, position = AttentionShape(1, 2, 50, 16, 50, 2, causal=True), 20
    inputs = list(attention_inputs(shape)[:3])
    clean = lmkern.attention(*inputs, causal=True, backend="reference")
    inputs[which][0, 1, position, 3] = torch.nan
    ill = lmkern.attention(*inputs, causal=True, backend="reference")
    reached = [position] if which == 0 else range(position, 50)
    for query in range(50):
        if query in reached:
            assert ill[0, 1, query].isnan().all()
        else:
            assert torch.equal(ill[0, 1, query], clean[0, 1, query])


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_no_nan_becomes_finite_without_a_mask(target: Target) -> None:
    shape = AttentionShape(1, 1, 70, 8, 130, 1)
    for position in (0, 63, 64, 129):
        for which in (1, 2):
            inputs = list(attention_inputs(shape, device=target.device))
            inputs[which][0, 0, position] = torch.nan
            with target.active():
                out = lmkern.attention(*inputs[:3], backend=target.backend)
            assert out.isnan().all()


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_scores_that_overflow_exp_are_no_trouble(target: Target) -> None:
    shape = AttentionShape(1, 2, 70, 16, 70, 2, causal=True)
    q, k, v, dout = attention_inputs(shape, device=target.device)
    results = run(target, shape, q * 1e4, k, v, dout)
    assert all(value.isfinite().all() for value in results.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target", KERNELS, ids=str)
def test_a_bias_that_hides_all_keys_of_a_query_gives_no_large_gradients(
    target: Target, dtype: torch.dtype
) -> None:
    if not target.takes(dtype) or target.backend == "cuda":
        pytest.skip(f"{target} takes no {dtype} with a bias")
    shape = AttentionShape(1, 1, 16, 64, 64, 1)
    q, k, v, dout = attention_inputs(shape, dtype, device=target.device)
    bias = torch.zeros(16, 64, device=target.device)
    # Added to a score it leaves nothing of it: every weight of the first query is e^0, or 1 of 64.
    bias[0] = -1e9
    inputs = leaves(q, k, v)
    with target.active():
        out = lmkern.attention(*inputs, bias=bias, backend=target.backend)
        dq, dk, dv = (x.double() for x in torch.autograd.grad(out, inputs, dout))
    most = dout.double().abs().sum(2, keepdim=True)
    assert (dv.abs() <= 1.01 * most).all()
    # |dS| is at most |dP| + |delta|.
    dscore = 2 * (dout.double() @ v.double().mT).abs().amax()
    assert dq.abs().max() <= dscore * k.double().abs().sum(2).max() / 8
    assert dk.abs().max() <= dscore * q.double().abs().sum(2).max() / 8


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_a_bias_on_all_keys_of_a_query_leaves_a_mean(target: Target) -> None:
    if target.backend == "cuda":
        pytest.skip("takes no bias")
    q, k, v, _ = attention_inputs(AttentionShape(1, 1, 3, 8, 70, 1), device=target.device)
    bias = torch.full((70,), -1e9, device=target.device)
    with target.active():
        out = lmkern.attention(q, k, v, bias=bias, backend=target.backend)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))


def test_the_reference_has_the_gradients_of_a_mean_there() -> None:
    shape = AttentionShape(1, 1, 3, 8, 70, 1)
    q, k, v, dout = attention_inputs(shape)
    inputs = leaves(q, k, v)
    out = lmkern.attention(*inputs, bias=torch.full((70,), -1e9), backend="reference")
    mine = torch.autograd.grad(out, inputs, dout)
    weights = torch.full((1, 1, 3, 70), 1 / 70)
    torch.testing.assert_close(mine[2], weights.mT @ dout)
    dweights = dout @ v.mT
    dscores = weights * (dweights - dweights.mean(-1, keepdim=True)) / 8**0.5
    torch.testing.assert_close(mine[:2], (dscores @ k, dscores.mT @ q))


@pytest.mark.parametrize("head_dim", [40, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target", [t for t in KERNELS if t.backend == "cpu"], ids=str)
def test_a_score_of_millions_has_its_weight_in_the_backward_pass(
    target: Target, dtype: torch.dtype, head_dim: int
) -> None:
    q, k, v, dout = attention_inputs(AttentionShape(1, 2, 96, head_dim, 96, 2), dtype)
    q, k, v = inputs = leaves(q * 500, k * 500, v)
    with target.active():
        (dv,) = torch.autograd.grad(lmkern.attention(*inputs, backend=target.backend), v, dout)
    exact = torch.softmax((q.double() @ k.double().mT) / head_dim**0.5, -1).mT @ dout.double()
    assert (dv.double() - exact).norm() <= 5e-3 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_16_bit_number_comes_through(target: Target, dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).to(target.device)
    numbers = bits.view(dtype)
    v = numbers.view(1, 256, 1, 256)
    # One key has all the weight: out is v.
    q = torch.zeros_like(v)
    with target.active():
        out = lmkern.attention(q, q, v, backend=target.backend).flatten()
    kept = (out == numbers) | (out.isnan() & numbers.isnan())
    if dtype == torch.bfloat16:
        # Its subnormal numbers are float32's too, which kernels may flush to zero.
        tiny = torch.finfo(dtype).tiny
        kept |= (numbers.abs() < tiny) & (out.abs() <= tiny)
    assert kept.all(), numbers[~kept]


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_every_bit_of_float32_comes_through(target: Target) -> None:
    # One key has all the weight: out is its value, dv the gradient of out.
    D = 256
    magnitudes = torch.logspace(-30, 38, D, dtype=torch.float64).float()
    numbers = torch.randn(64, D).sign() * torch.rand(64, D).add(0.5) * magnitudes
    numbers[:, :3] = torch.tensor([torch.finfo(torch.float32).max, -3.4e38, 3.39e38])
    quiet = numbers.view(torch.int32)
    quiet[0, 0], quiet[1, 1], quiet[2, 2], quiet[3, 3] = -1, 0x7FFFFFFF, 0x7FC00000, 0x7F800001  # NaN
    v, dout = (x.view(64, 1, 1, D).to(target.device) for x in (numbers, numbers.flip(0)))
    q = torch.zeros_like(v)
    results = run(target, AttentionShape(64, 1, 1, D, 1, 1), q, q.clone(), v, dout)
    torch.testing.assert_close(results["out"], v, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(results["dv"], dout, rtol=0, atol=0, equal_nan=True)


def tensors(
    q: tuple[int, ...] = (1, 2, 3, 4),
    k: tuple[int, ...] = (1, 2, 3, 4),
    v: tuple[int, ...] = (1, 2, 3, 4),
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c = (torch.zeros(shape, dtype=dtype) for shape in (q, k, v))
    return a, b, c


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((2, 3, 4), (2, 3, 4), (2, 3, 4), r"attention: q, k and v must be \(B, H, N, D\); got q \(2, 3, 4\)"),
        (
            (1, 2, 3, 4),
            (1, 2, 3, 5),
            (1, 2, 3, 5),
            r"must share head_dim; got q \(1, 2, 3, 4\), k \(1, 2, 3, 5\)",
        ),
        ((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 5), r"must share head_dim; got .* v \(1, 2, 3, 5\)"),
        ((1, 2, 3, 0), (1, 2, 3, 0), (1, 2, 3, 0), r"must share head_dim; got q \(1, 2, 3, 0\)"),
        ((2, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4), r"must share the batch size; got q \(2, 2, 3, 4\)"),
        (
            (1, 2, 3, 4),
            (1, 2, 3, 4),
            (1, 2, 5, 4),
            r"k and v must share heads and length; got .* v \(1, 2, 5, 4\)",
        ),
        (
            (1, 3, 3, 4),
            (1, 2, 3, 4),
            (1, 2, 3, 4),
            r"query heads must be a multiple of the key/value heads; got",
        ),
        (
            (1, 2, 3, 4),
            (1, 0, 3, 4),
            (1, 0, 3, 4),
            r"query heads must be a multiple of the key/value heads; got",
        ),
    ],
)
def test_shapes_that_do_not_match(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lmkern.attention(*tensors(q, k, v))


def test_dtypes_that_do_not_match() -> None:
    q, k, v = tensors()
    with pytest.raises(ValueError, match=r"share one dtype of float32, .*cast them first; got .*bfloat16"):
        lmkern.attention(q, k.bfloat16(), v)
    with pytest.raises(ValueError, match=r"share one dtype of float32, .*; got torch.int64"):
        lmkern.attention(q.long(), k.long(), v.long())


def test_devices_that_do_not_match() -> None:
    q, k, v = tensors()
    with pytest.raises(ValueError, match=r"on one device; move them with \.to\(\); got cpu, meta, cpu"):
        lmkern.attention(q, k.to("meta"), v)


def test_meta_tensors_give_shapes() -> None:
    q = torch.empty(2, 4, 10, 8, device="meta", dtype=torch.bfloat16)
    k = torch.empty(2, 2, 12, 8, device="meta", dtype=torch.bfloat16)
    out, lse = lmkern.attention(q, k, k, causal=True, return_lse=True)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "meta")
    assert (lse.shape, lse.dtype) == ((2, 4, 10), torch.float32)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"attention: no backend 'cdua'; expected one of .*cpu.*reference"):
        lmkern.attention(*tensors(), backend="cdua")


def test_head_dim_beyond_the_kernels_goes_to_the_reference_unless_one_is_named() -> None:
    q, k, v = tensors(*[(1, 1, 2, 257)] * 3)
    assert lmkern.attention(q, k, v).shape == q.shape
    with pytest.raises(
        lmkern.UnsupportedBackend,
        match=r"backend 'cpu' takes head_dim up to 256; got 257. Here: .*reference",
    ):
        lmkern.attention(q, k, v, backend="cpu")


def test_float64_under_autocast_stays_and_float32_becomes_the_autocast_dtype() -> None:
    shape = AttentionShape(1, 2, 20, 16, 20, 2)
    q, k, v, dout = attention_inputs(shape)
    q, k, v = leaves(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        out = lmkern.attention(q, k, v)
        mixed = lmkern.attention(q, k.bfloat16(), v)
        wide = lmkern.attention(q.double(), k.double(), v.double())
    assert out.dtype == mixed.dtype == torch.bfloat16
    assert torch.equal(out, mixed)
    assert torch.equal(out, lmkern.attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    assert wide.dtype == torch.float64
    out.backward(dout.bfloat16())
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


def test_mixed_float64_under_autocast_is_an_error_in_words() -> None:
    q, k, v = tensors()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="share one dtype"):
        lmkern.attention(q.double(), k, v)
