"""The Triton kernels, run by Triton's interpreter on the CPU, against the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from lmkern.kernels import triton_runtime
from lmkern.kernels.attention import Options
from lmkern.kernels.attention import reference as attention_reference
from lmkern.kernels.attention import triton as attention
from lmkern.kernels.backends import Call
from lmkern.kernels.layer_norm import triton as layer_norm

pytestmark = [
    pytest.mark.skipif(
        not triton_runtime.interpreted(), reason="needs TRITON_INTERPRET=1 (make test sets it)"
    ),
    # The interpreter computes with numpy, which warns where NaN and infinity are part of the test.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

ALL = (True, True, True)

# Relative to the largest element of the exact result: a few roundings of the format.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# (B, H, H_kv, N_q, N_k, D, diagonal): block edges, both signs of N_k - N_q, grouped heads, padded head_dim.
SHAPES = {
    "one-element": (1, 1, 1, 1, 1, 1, None),
    "odd": (2, 2, 2, 37, 53, 5, None),
    "causal-square": (1, 2, 2, 130, 130, 32, 0),
    "causal-more-keys": (1, 4, 2, 33, 150, 24, 117),
    "causal-more-queries": (1, 4, 1, 150, 70, 16, -80),
    "causal-top-left": (1, 1, 1, 40, 150, 40, 0),
    "beyond-every-key": (1, 1, 1, 20, 30, 8, 10**12),
    "no-key-visible": (1, 1, 1, 20, 30, 8, -(10**12)),
    "head-dim-80": (1, 1, 1, 70, 65, 80, -5),
    "head-dim-256": (1, 2, 1, 34, 36, 256, 2),
}


@pytest.fixture(autouse=True)
def nan_in_fresh_memory() -> Iterator[None]:
    """What a kernel forgets to write is NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attention_inputs(shape: tuple[int, int, int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, dout, dlse."""
    sequences, heads, heads_kv, n_q, n_k, head_dim = shape
    q = normal(sequences, heads, n_q, head_dim, dtype=dtype, seed=1)
    k = normal(sequences, heads_kv, n_k, head_dim, dtype=dtype, seed=2)
    v = normal(sequences, heads_kv, n_k, head_dim, dtype=dtype, seed=3)
    dout = normal(sequences, heads, n_q, head_dim, dtype=dtype, seed=4)
    return [q, k, v, dout, normal(sequences, heads, n_q, seed=5)]


def run_attention(backend, q, k, v, dout, dlse, diagonal, needs=ALL) -> tuple[Tensor | None, ...]:
    """(out, lse, dq, dk, dv)."""
    options = Options(softmax_scale=1 / math.sqrt(q.shape[3]), right=diagonal, top_left=True)
    out, lse = backend.forward(q, k, v, options)
    needs = (*needs, False, False, False)
    gradients = backend.backward(dout, q, k, v, out, lse, dlse, options, needs=needs)
    return out, lse, *gradients[:3]


def exact_attention(q, k, v, dout, dlse, diagonal) -> tuple[Tensor | None, ...]:
    dlse = None if dlse is None else dlse.double()
    return run_attention(
        attention_reference, q.double(), k.double(), v.double(), dout.double(), dlse, diagonal
    )


def assert_close(actual: Tensor | None, exact: Tensor | None, tolerance: float) -> None:
    """Equal where exact is infinite, and within tolerance of the largest finite element elsewhere."""
    assert actual is not None
    assert exact is not None
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    finite = exact.isfinite()
    torch.testing.assert_close(actual.double()[~finite], exact[~finite], rtol=0, atol=0)
    scale = max(1.0, exact[finite].abs().max().item()) if finite.any() else 1.0
    torch.testing.assert_close(actual.double()[finite], exact[finite], rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_attention_matches_reference(name: str, dtype: torch.dtype) -> None:
    *shape, diagonal = SHAPES[name]
    inputs = attention_inputs(tuple(shape), dtype)
    for actual, exact in zip(
        run_attention(attention, *inputs, diagonal), exact_attention(*inputs, diagonal), strict=True
    ):
        assert_close(actual, exact, TOLERANCE[dtype])


def test_attention_in_float16_matches_reference() -> None:
    inputs = attention_inputs((1, 2, 1, 40, 70, 24), torch.float16)
    for actual, exact in zip(
        run_attention(attention, *inputs, 30), exact_attention(*inputs, 30), strict=True
    ):
        assert_close(actual, exact, TOLERANCE[torch.float16])


def test_attention_takes_any_strides_and_lays_results_out_as_inputs() -> None:
    q, k, v, dout, _ = attention_inputs((2, 4, 2, 20, 24, 16), torch.float32)
    tokens_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    columns_first = k.mT.contiguous().mT
    spaced = torch.stack([v, v], -1)[..., 0]
    expanded = dout[:, :, :1].expand_as(dout)
    dlse = normal(2, 4, 1).expand(2, 4, 20)
    strided = run_attention(attention, tokens_first, columns_first, spaced, expanded, dlse, 4)
    dense = run_attention(attention, q, k, v, expanded.contiguous(), dlse.contiguous(), 4)
    for actual, expected in zip(strided, dense, strict=True):
        assert torch.equal(actual, expected)
    for result, like in zip(
        strided[:1] + strided[2:], (tokens_first, tokens_first, columns_first, spaced), strict=True
    ):
        assert result.stride() == torch.empty_like(like).stride()


@pytest.mark.parametrize(
    "shape", [(0, 2, 1, 3, 4, 8), (1, 0, 0, 3, 4, 8), (1, 2, 1, 0, 4, 8), (1, 2, 1, 3, 0, 8)]
)
def test_attention_of_nothing_is_empty_or_zero(shape: tuple[int, int, int, int, int, int]) -> None:
    inputs = attention_inputs(shape, torch.float32)
    for actual, exact in zip(run_attention(attention, *inputs, 1), exact_attention(*inputs, 1), strict=True):
        assert_close(actual, exact, 0.0)


def test_query_without_visible_key_is_zero_whatever_the_values_hold() -> None:
    q, k, v, dout, _ = attention_inputs((1, 1, 1, 50, 40, 16), torch.float32)
    v[:, :, 0] = torch.nan
    out, lse, dq, _, _ = run_attention(attention, q, k, v, dout, None, -10)
    assert (out[:, :, :10] == 0).all()
    assert (lse[:, :, :10] == -torch.inf).all()
    assert (dq[:, :, :10] == 0).all()


def test_query_whose_scores_are_all_minus_infinity_counts_as_seeing_nothing() -> None:
    q, k, v, dout, _ = attention_inputs((1, 1, 1, 64, 128, 16), torch.float32)
    q[:, :, 5:9] = -torch.inf
    out, lse, _, _, dv = run_attention(attention, q, k.abs() + 0.1, v, dout, None, None)
    assert (out[:, :, 5:9] == 0).all()
    assert (lse[:, :, 5:9] == -torch.inf).all()
    assert dv.isfinite().all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_in_key_reaches_only_queries_that_see_it(poison: float) -> None:
    inputs = attention_inputs((1, 1, 1, 100, 100, 16), torch.float32)
    clean = run_attention(attention, *inputs, 0)
    inputs[1][0, 0, 60, 3] = poison
    dirty = run_attention(attention, *inputs, 0)
    for before, after in zip(clean[:3], dirty[:3], strict=True):  # out, lse, dq
        assert torch.equal(before[:, :, :60], after[:, :, :60])
    if poison is torch.nan:
        assert all(result[:, :, 60:].isnan().all() for result in dirty[:2])
        assert dirty[2][:, :, 60:].isnan().all()


def test_nan_in_query_reaches_only_its_row_and_the_keys_it_sees() -> None:
    inputs = attention_inputs((1, 1, 1, 100, 100, 16), torch.float32)
    clean = run_attention(attention, *inputs, 0)
    inputs[0][0, 0, 60, 3] = torch.nan
    dirty = run_attention(attention, *inputs, 0)
    others = torch.arange(100) != 60
    for before, after in zip(clean[:3], dirty[:3], strict=True):  # out, lse, dq
        assert torch.equal(before[:, :, others], after[:, :, others])
        assert after[:, :, 60].isnan().all()
    for before, after in zip(clean[3:], dirty[3:], strict=True):  # dk, dv
        assert torch.equal(before[:, :, 61:], after[:, :, 61:])
        assert after[:, :, :61].isnan().all()


def test_nan_in_key_seen_by_no_query_reaches_nothing() -> None:
    inputs = attention_inputs((1, 1, 1, 20, 50, 16), torch.float32)
    inputs[1][0, 0, 30] = torch.nan
    for actual in run_attention(attention, *inputs, 0):
        assert not actual.isnan().any()


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3]
)
def test_attention_gives_only_the_gradients_asked_for(needs: tuple[bool, bool, bool]) -> None:
    inputs = attention_inputs((1, 2, 1, 20, 20, 8), torch.float32)
    some = run_attention(attention, *inputs, 0, needs)[2:]
    every = run_attention(attention, *inputs, 0)[2:]
    for need, one, full in zip(needs, some, every, strict=True):
        assert torch.equal(one, full) if need else one is None


def call(backend: str | None = "triton", dtype: torch.dtype = torch.float32, head_dim: int = 8) -> Call:
    x = torch.empty(1, 1, 2, head_dim, dtype=dtype)
    return Call("attention", {"q": x, "k": x, "v": x}, {}, backend)


def test_interpreter_serves_only_calls_that_name_it() -> None:
    assert attention.unsupported(call()) is None
    assert "interpreter" in attention.unsupported(call(backend=None))


def test_what_no_triton_kernel_takes_is_refused_in_words() -> None:
    assert "float64" in attention.unsupported(call(dtype=torch.float64))
    assert "head_dim up to 256; got 257" in attention.unsupported(call(head_dim=257))


def test_without_gpu_or_interpreter_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(triton_runtime, "interpreted", lambda: False)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        triton_runtime.unavailable.cache_clear()
        assert "needs a CUDA or ROCm GPU" in attention.unsupported(call())
        assert "needs a CUDA or ROCm GPU" in layer_norm.unavailable()
    triton_runtime.unavailable.cache_clear()


def test_a_gpu_without_a_compiler_for_the_launchers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(triton_runtime, "interpreted", lambda: False)
        patch.delenv("CC", raising=False)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(triton_runtime.shutil, "which", lambda name: None)
        triton_runtime.unavailable.cache_clear()
        assert "needs a C compiler" in layer_norm.unavailable()
        patch.setenv("CC", "/opt/bin/cc")
        triton_runtime.unavailable.cache_clear()
        assert layer_norm.unavailable() is None
    triton_runtime.unavailable.cache_clear()
