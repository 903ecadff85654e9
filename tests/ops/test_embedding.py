"""`lmkern.embedding` on every backend: rows, gradients against float64, edges, errors, compilation."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lmkern
from lmkern.testing import (
    Errors,
    Target,
    leaves,
    mean_verdicts,
    measure,
    poisoned_memory,
    seeded_randn,
    seeded_targets,
    targets,
    verdicts,
)
from lmkern.testing import exact as long_double

TARGETS = targets("embedding")
IN_FLOAT32 = [target for target in TARGETS if target.takes(torch.float32)]
KERNELS = [target for target in TARGETS if target.backend != "reference"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (N, V, E): tokens rare and frequent, widths beside every vector and beside eight of them.
SHAPES = ((1, 1, 1), (5, 7, 3), (40, 3, 17), (300, 1, 33), (129, 500, 64), (1000, 13, 127), (2000, 5, 129))


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def inputs(
    N: int, V: int, E: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    randn = seeded_randn(seed, dtype)
    return seeded_targets(V, N, seed + 1), randn(V, E), randn(N, E)


def gradient(
    tokens: Tensor, weight: Tensor, dy: Tensor, backend: str | None, padding_idx: int | None = None
) -> tuple[Tensor, Tensor]:
    (weight,) = leaves(weight)
    y = lmkern.embedding(tokens, weight, padding_idx=padding_idx, backend=backend)
    return y.detach(), torch.autograd.grad(y, weight, dy)[0]


def torchs(tokens: Tensor, weight: Tensor, dy: Tensor, padding_idx: int | None = None) -> Tensor:
    (weight,) = leaves(weight)
    return torch.autograd.grad(F.embedding(tokens, weight, padding_idx), weight, dy)[0]


@pytest.mark.parametrize(
    ("target", "dtype"), [(t, dtype) for t in KERNELS for dtype in DTYPES if t.takes(dtype)], ids=ids
)
def test_rows_are_exact_and_errors_of_their_sums_within_torchs(target: Target, dtype: torch.dtype) -> None:
    @functools.cache
    def draw(shape: tuple[int, int, int], seed: int) -> dict[str, Errors]:
        tokens, weight, dy = inputs(*shape, dtype, seed)
        with target.active(), poisoned_memory():
            y, dweight = gradient(tokens, weight, dy, target.backend)
        assert torch.equal(y, weight[tokens])
        exact = np.zeros(weight.shape, np.longdouble)
        np.add.at(exact, tokens.cpu().numpy(), long_double.long_double(dy))
        return {"dweight": measure(dweight, torchs(tokens, weight, dy), exact)}

    draws = {shape: functools.partial(draw, shape) for shape in target.some(SHAPES, 2)}
    found = {shape: verdicts(of_seed, target.units_beside) for shape, of_seed in draws.items()}
    assert not any(found.values()), found
    assert not (means := mean_verdicts(list(draws.values()), target.units_beside)), means


@pytest.mark.parametrize("padding_idx", [0, 2, -1])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_padding_gets_no_gradient(target: Target, padding_idx: int) -> None:
    tokens, weight, dy = inputs(50, 4, 9)
    with target.active(), poisoned_memory():
        _, dweight = gradient(tokens, weight, dy, target.backend, padding_idx)
    torch.testing.assert_close(dweight, torchs(tokens, weight, dy, padding_idx))
    assert (dweight[padding_idx] == 0).all()


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_sum_of_a_frequent_bfloat16_token_is_float32(target: Target) -> None:
    tokens, weight, dy = torch.zeros(5000, dtype=torch.int64), torch.zeros(2, 3), torch.full((5000, 3), 0.01)
    with target.active():
        _, dweight = gradient(tokens, weight.bfloat16(), dy.bfloat16(), target.backend)
    expected = 5000 * dy.bfloat16().double()[0]
    torch.testing.assert_close(dweight[0].double(), expected, rtol=2.0**-8, atol=0)
    assert (dweight[1] == 0).all()


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_shapes_and_strides_are_free(target: Target) -> None:
    tokens, weight, dy = inputs(24, 7, 33)
    tokens = tokens.view(4, 6).mT
    wide = weight.repeat_interleave(2, 1)[:, ::2]
    with target.active(), poisoned_memory():
        y, dweight = gradient(tokens, wide, dy.view(6, 4, 33), target.backend)
        apart = gradient(tokens, weight, torch.cat([dy, dy], 1)[:, :33].view(6, 4, 33), target.backend)[1]
        ones = gradient(tokens, weight, torch.ones(()).expand(6, 4, 33), target.backend)[1]
        short = lmkern.embedding(tokens.int(), weight, backend=target.backend)
        scalar = lmkern.embedding(tokens[0, 0], weight, backend=target.backend)
    assert torch.equal(y, weight[tokens])
    assert torch.equal(short, y)
    assert torch.equal(scalar, weight[tokens[0, 0]])
    assert torch.equal(dweight, apart)
    assert torch.equal(ones, torch.bincount(tokens.flatten(), minlength=7)[:, None].expand(7, 33).float())


@pytest.mark.parametrize(("N", "V", "E"), [(0, 3, 4), (0, 0, 4), (3, 2, 0)])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_no_elements(target: Target, N: int, V: int, E: int) -> None:
    tokens, weight, dy = torch.zeros(N, dtype=torch.int64), torch.zeros(V, E), torch.zeros(N, E)
    with target.active(), poisoned_memory():
        y, dweight = gradient(tokens, weight, dy, target.backend)
    assert (y.shape, dweight.shape) == ((N, E), (V, E))
    assert (dweight == 0).all()


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_nan_stays_in_its_tokens_column(target: Target) -> None:
    tokens, weight, dy = inputs(50, 4, 33)
    dy[17, 5] = torch.nan
    with target.active():
        _, dweight = gradient(tokens, weight, dy, target.backend)
    assert dweight.isnan().nonzero().tolist() == [[int(tokens[17]), 5]]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("target", [t for t in KERNELS if t.backend == "cpu"], ids=str)
def test_results_are_bit_equal_for_any_number_of_threads(target: Target, threads: int) -> None:
    arguments = inputs(3000, 41, 129)
    with target.active():
        expected = gradient(*arguments, "cpu")
        torch.set_num_threads(threads)
        mine = gradient(*arguments, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_gradcheck_opcheck_and_compilation(target: Target) -> None:
    torch.compiler.reset()
    torch.set_num_threads(1)
    tokens, weight, dy = inputs(9, 4, 3, torch.float64)

    def call(weight: Tensor) -> Tensor:
        return lmkern.embedding(tokens, weight, padding_idx=1, backend=target.backend)

    with target.active():
        (leaf,) = leaves(weight)
        assert torch.autograd.gradcheck(lambda w: lmkern.embedding(tokens, w, backend=target.backend), leaf)
        torch.library.opcheck(torch.ops.lmkern.embedding.default, (tokens, leaf, 1, target.backend))
        torch.library.opcheck(torch.ops.lmkern.embedding_backward.default, (dy, tokens, 4, 1, target.backend))
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for function in (call, compiled):
            y = function(leaf)
            (dweight,) = torch.autograd.grad(y, leaf, dy)
            assert torch.equal(dweight, gradient(tokens, weight, dy, target.backend, 1)[1])
            (second,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
            with pytest.raises(
                RuntimeError, match=r"(?i)once_differentiable|double backward|no autograd formula"
            ):
                (second.square().sum() + function(leaf).sum()).backward()


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
@pytest.mark.parametrize("token", [-1, 4])
def test_a_token_without_a_row_is_named(target: Target, token: int) -> None:
    with target.active(), pytest.raises(IndexError, match=rf"tokens must lie in \[0, 4\); got .*{token}"):
        lmkern.embedding(torch.tensor([2, token]), torch.zeros(4, 3), backend=target.backend)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.zeros(4)}, r"embedding: weight must be \(V, E\); got \(4,\)"),
        ({"weight": torch.zeros(4, 3).long()}, r"weight must be one of float32, .*; got torch.int64"),
        ({"tokens": torch.zeros(2)}, r"tokens must be int64 or int32; got torch.float32"),
        ({"weight": torch.zeros(4, 3, device="meta")}, r"tokens must be on weight's device meta; got cpu"),
        ({"padding_idx": 4}, r"padding_idx must be in \[-4, 4\); got 4"),
        ({"backend": "cdua"}, r"embedding: no backend 'cdua'; expected one of .*reference"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(changed: dict[str, object], message: str) -> None:
    arguments = {"tokens": torch.tensor([1]), "weight": torch.zeros(4, 3), **changed}
    with pytest.raises(ValueError, match=message):
        lmkern.embedding(**arguments)
