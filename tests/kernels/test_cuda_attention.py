"""Attention's CUDA kernels: on a GPU, and on the CPU through tests/csrc/cuda_emulator.

The first is what RUN_ON_HARDWARE in the backend's cuda.py stands for; the second has copies, barriers and
products as the PTX manual defines them.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad

from lmkern.kernels import cuda_call
from lmkern.kernels.attention import Options, cuda, reference
from lmkern.kernels.backends import Call
from lmkern.testing import AttentionShape, attention_inputs, measure, over_budget, poisoned_memory

ROOT = Path(__file__).parents[2]
BRAIN, HALF = torch.bfloat16, torch.float16
ALL = (True, True, True, False, False, False)


@pytest.fixture
def device(device: str) -> str:
    if device == "cuda" and (reason := cuda.unavailable()):
        pytest.skip(reason)
    return device


def run(
    kernels: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    options: Options,
    needs: tuple[bool, ...] = ALL,
    dlse: Tensor | None = None,
) -> dict[str, Tensor | None]:
    with poisoned_memory():
        out, lse = kernels.forward(q, k, v, options)
        found: dict[str, Tensor | None] = {"out": out, "lse": lse}
        gradients = kernels.backward(dout, q, k, v, out, lse, dlse, options, needs=needs)
        return found | dict(zip(("dq", "dk", "dv"), gradients, strict=False))


def assert_close(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, options: Options, dlse: Tensor | None = None
) -> None:
    """Against float64, the reference's error in q's dtype being the measure; a second run is bit-equal."""
    wide = (x.double() for x in (q, k, v, dout))
    exact = run(reference, *wide, options, dlse=None if dlse is None else dlse.double())
    torchs = run(reference, q, k, v, dout, options, dlse=dlse)
    ours, again = (run(cuda, q, k, v, dout, options, dlse=dlse) for _ in range(2))
    for name, result in ours.items():
        one, other, wanted = again[name], torchs[name], exact[name]
        assert result is not None and one is not None and other is not None and wanted is not None
        assert torch.equal(result, one), name
        unseen = wanted == -torch.inf
        assert torch.equal(result == -torch.inf, unseen), name
        kept = [x.masked_fill(unseen, 0.0) for x in (result, other, wanted)]
        assert not (reason := over_budget(name, measure(*kept), 1.0)), reason


def shape(
    B: int, H: int, N_q: int, D: int, N_k: int | None = None, H_kv: int | None = None
) -> AttentionShape:
    return AttentionShape(B, H, N_q, D, N_q if N_k is None else N_k, H if H_kv is None else H_kv)


# What each has beside the one before: whole tiles; several of keys, and of queries; ragged ones and shared
# heads; each size of tile; a head_dim that fills none.
SHAPES = (
    shape(1, 1, 128, 64),
    shape(1, 1, 64, 64, 384),
    shape(1, 1, 400, 64, 128),
    shape(2, 2, 140, 64, 150, 1),
    shape(1, 2, 140, 128, 150, 1),
    shape(1, 1, 200, 256, 150),
    shape(1, 2, 70, 136, 90, 1),
    shape(1, 2, 130, 72, 129),
    shape(1, 1, 33, 8, 52),
    # One key alone would have a dq of exactly zero, beside which any error is infinite.
    shape(1, 1, 1, 16, 3),
)


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_every_result_matches_float64(sizes: AttentionShape, causal: bool, device: str) -> None:
    inputs = attention_inputs(sizes, BRAIN if causal else HALF, device=device)
    assert_close(*inputs, Options(sizes.D**-0.5, right=0 if causal else None))


@pytest.mark.parametrize("bounds", [(0, 0), (70, 40), (None, 40), (200, None)], ids=str)
@pytest.mark.parametrize("lengths", [(170, 300), (300, 170)], ids=str)
def test_windows(bounds: tuple[int | None, int | None], lengths: tuple[int, int], device: str) -> None:
    top_left = bounds[0] == 70
    inputs = attention_inputs(shape(1, 1, lengths[0], 64, lengths[1]), BRAIN, device=device)
    assert_close(*inputs, Options(0.2, *bounds, top_left=top_left))


def documents(device: str, *lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("right", [None, 0])
@pytest.mark.parametrize("D", [64, 128, 256])
def test_packed_documents_and_empty_ones(D: int, right: int | None, device: str) -> None:
    queries, keys = documents(device, 0, 130, 5, 0, 65), documents(device, 10, 90, 5, 35, 80)
    inputs = attention_inputs(shape(1, 2, 200, D, 220, 1), BRAIN, device=device)
    assert_close(*inputs, Options(0.1, right=right, cu_seqlens_q=queries, cu_seqlens_k=keys))


@pytest.mark.parametrize("D", [64, 256])
def test_what_is_not_finite_stays_in_its_document(D: int, device: str) -> None:
    bounds = documents(device, 70, 50, 180)
    options = Options(0.1, right=0, cu_seqlens_q=bounds, cu_seqlens_k=bounds)
    inputs = attention_inputs(shape(1, 1, 300, D), BRAIN, device=device)
    clean = run(cuda, *inputs, options)
    for x in inputs:
        x[:, :, 70:120] = torch.nan
    dirty = run(cuda, *inputs, options)
    others = torch.cat((torch.arange(70), torch.arange(120, 300)))
    for name, result in dirty.items():
        before = clean[name]
        assert result is not None and before is not None
        assert torch.equal(result[:, :, others], before[:, :, others]), name
        assert result[:, :, 70:120].isnan().all(), name


# The weights of key 160 are made by the polynomial.
@pytest.mark.parametrize(("place", "D"), [(150, 64), (160, 64), (150, 128), (40, 256)])
@pytest.mark.parametrize("name", ["q", "k"])
def test_nan_reaches_only_the_pairs_that_see_it(name: str, place: int, D: int, device: str) -> None:
    q, k, v, dout = attention_inputs(shape(1, 1, 300, D), BRAIN if D > 64 else HALF, device=device)
    options = Options(0.1, right=0)
    clean = run(cuda, q, k, v, dout, options)
    {"q": q, "k": k}[name][:, :, place, 3] = torch.nan
    of_queries = slice(place, place + 1) if name == "q" else slice(place, None)
    # A query whose weights are NaN reaches every key that it sees.
    of_keys = slice(0, place + 1) if name == "q" else slice(0, None)
    reached = dict.fromkeys(("out", "lse", "dq"), of_queries) | dict.fromkeys(("dk", "dv"), of_keys)
    for result, dirty in run(cuda, q, k, v, dout, options).items():
        expected = clean[result]
        assert dirty is not None and expected is not None
        assert dirty[:, :, reached[result]].isnan().all(), result
        dirty[:, :, reached[result]] = expected[:, :, reached[result]]
        assert torch.equal(dirty, expected), result


def test_a_nan_that_no_query_sees_reaches_nothing(device: str) -> None:
    q, k, v, dout = attention_inputs(shape(1, 2, 70, 64, 100, 1), BRAIN, device=device)
    options = Options(0.1, right=0, top_left=True)
    clean = run(cuda, q, k, v, dout, options)
    k[:, :, 70:] = torch.nan
    assert_same(run(cuda, q, k, v, dout, options), clean)


def test_a_nan_of_a_query_that_sees_no_key_reaches_nothing(device: str) -> None:
    q, k, v, dout = attention_inputs(shape(1, 2, 100, 64, 70, 1), BRAIN, device=device)
    options = Options(0.1, right=0)
    clean = run(cuda, q, k, v, dout, options)
    q[:, :, 3:30] = torch.nan
    assert_same(run(cuda, q, k, v, dout, options), clean)


def test_the_gradient_of_lse_joins_that_of_out(device: str) -> None:
    inputs = attention_inputs(shape(1, 2, 130, 64, 200), BRAIN, device=device)
    assert_close(*inputs, Options(0.1), dlse=torch.linspace(-1, 1, 260, device=device).view(1, 2, 130))


def test_peaky_scores_are_rescaled(device: str) -> None:
    inputs = attention_inputs(shape(1, 1, 128, 64, 512), BRAIN, q_factor=64.0, device=device)
    assert_close(*inputs, Options(0.125))


NEEDS = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]


@pytest.mark.parametrize(("needs", "D"), [*((needs, 64) for needs in NEEDS), ((0, 1, 1), 256)], ids=str)
def test_only_the_gradients_asked_for_come_back(needs: tuple[int, int, int], D: int, device: str) -> None:
    inputs = attention_inputs(shape(1, 1, 130, D, 200), BRAIN, device=device)
    options = Options(0.1, right=0)
    every, some = run(cuda, *inputs, options), run(cuda, *inputs, options, (*map(bool, needs), *ALL[3:]))
    for need, name in zip(needs, ("dq", "dk", "dv"), strict=True):
        one, whole = some[name], every[name]
        assert torch.equal(one, whole) if need and one is not None and whole is not None else one is None


@pytest.mark.parametrize("layout", ["transposed", "fused", "expanded_tokens"])
def test_strides_are_free_where_the_copy_engine_takes_them(layout: str, device: str) -> None:
    q, k, v, _ = attention_inputs(
        shape(2, 2, 130, 64), BRAIN, layout="fused" if layout != "transposed" else layout, device=device
    )
    dout = attention_inputs(shape(2, 2, 130, 64), BRAIN, layout=layout, device=device)[3]
    assert_close(q, k, v, dout, Options(0.1, right=0))


@pytest.mark.parametrize(("n_q", "n_k"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sequences(n_q: int, n_k: int, device: str) -> None:
    inputs = attention_inputs(shape(1, 2, n_q, 64, n_k), BRAIN, device=device)
    found = run(cuda, *inputs, Options(0.1))
    for name, result in found.items():
        assert result is not None
        assert torch.equal(result, torch.full_like(result, -torch.inf if name == "lse" else 0.0)), name


def misaligned(x: Tensor) -> Tensor:
    """The same values from an address that the copy engine does not take."""
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view_as(x).copy_(x)


def test_dout_may_begin_anywhere(device: str) -> None:
    q, k, v, dout = attention_inputs(shape(1, 2, 70, 64), BRAIN, device=device)
    assert_close(q, k, v, misaligned(dout), Options(0.1))


@pytest.mark.parametrize("D", [64, 256])
def test_a_hidden_pair_whose_product_overflows_gives_no_gradient(D: int, device: str) -> None:
    q, k, v, dout = attention_inputs(shape(1, 1, 70, D), BRAIN, device=device)
    # Query 20 does not see key 30. The product of their rows is infinite, their weight is 0.
    dout[:, :, 20], v[:, :, 30] = 1e25, 1e25
    found = run(cuda, q, k, v, dout, Options(0.1, right=0))
    for name, result in found.items():
        assert result is not None and result.isfinite().all(), name


def test_what_the_copy_engine_does_not_take_is_named(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = attention_inputs(shape(1, 2, 40, 64), BRAIN, device=device)
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(cuda_call, "unsupported", lambda *_, **__: None)
    given = {"q": q, "k": misaligned(k), "v": v}
    assert "k has others" in str(cuda.unsupported(Call("attention", given)))
    assert "q has others" in str(cuda.unsupported(Call("attention", {"q": q[..., :63:2], "k": k, "v": v})))
    assert cuda.unsupported(Call("attention", {"q": q, "k": k, "v": v})) is None
    many = torch.zeros(70_001, dtype=torch.int32)
    options = {"options": Options(0.1, cu_seqlens_q=many, cu_seqlens_k=many)}
    assert "up to 65535 documents; got 70000" in str(
        cuda.unsupported(Call("attention", {"q": q, "k": k, "v": v}, options))
    )
    with pytest.raises(RuntimeError, match=r"attention forward on q \(1, 2, 40, 64\).*refused a tensor map"):
        cuda.forward(q, given["k"], v, Options(0.1))


def test_index_arithmetic_of_every_small_shape(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    assert compiler is not None
    program, source = tmp_path / "tile_schedule", ROOT / "tests/csrc/tile_schedule.cpp"
    subprocess.run([compiler, "-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))
class TestOnAGpu:
    """What there is nothing of on the CPU: streams, devices, graphs."""

    SIZES, OPTIONS = shape(2, 4, 700, 64, 900, 2), Options(0.125, right=0)

    def test_kernels_run_on_the_current_stream(self) -> None:
        q, k, v, dout = attention_inputs(self.SIZES, BRAIN, device="cuda")
        expected = run(cuda, q * 2, k, v, dout, self.OPTIONS)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # A kernel on another stream would read q before it is multiplied.
            torch.cuda._sleep(20_000_000)
            found = run(cuda, q.mul_(2), k, v, dout, self.OPTIONS)
        stream.synchronize()
        assert_same(found, expected)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_kernels_run_on_the_device_of_q(self) -> None:
        inputs = attention_inputs(self.SIZES, BRAIN, device="cuda:1")
        with torch.cuda.device(0):
            found = run(cuda, *inputs, self.OPTIONS)
            assert torch.cuda.current_device() == 0
        there = run(cuda, *(x.to("cuda:0") for x in inputs), self.OPTIONS)
        assert_same(found, {name: None if x is None else x.to("cuda:1") for name, x in there.items()})

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("D", [64, 128, 256])
    def test_more_tiles_of_keys_than_processors_add_to_dq_in_turn(self, D: int, causal: bool) -> None:
        inputs = attention_inputs(shape(1, 16, 4096, D, 4096, 8), BRAIN, device="cuda")
        options = Options(D**-0.5, right=0 if causal else None)
        first = run(cuda, *inputs, options)
        for _ in range(20):
            assert_same(run(cuda, *inputs, options), first)
        q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        theirs = {"out": out, **dict(zip(("dq", "dk", "dv"), grad(out, (q, k, v), inputs[3]), strict=True))}
        for name, expected in theirs.items():
            found = first[name]
            assert found is not None
            assert (found.float() - expected.float()).norm() <= 0.02 * expected.float().norm(), name

    @pytest.mark.parametrize("D", [64, 128, 256])
    def test_a_captured_graph_replays_with_other_inputs(self, D: int) -> None:
        inputs = attention_inputs(shape(2, 4, 700, D, 900, 2), BRAIN, device="cuda")
        run(cuda, *inputs, self.OPTIONS)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = cuda.forward(*inputs[:3], self.OPTIONS)
            gradients = cuda.backward(inputs[3], *inputs[:3], out, lse, None, self.OPTIONS, needs=ALL)
        for factor in (1.0, 1.5, 0.5):
            inputs[0].mul_(factor)
            graph.replay()
            found = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=False))
            assert_same(found, run(cuda, *inputs, self.OPTIONS))


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    for name, result in found.items():
        other = expected[name]
        assert result is not None and other is not None and torch.equal(result, other), name
