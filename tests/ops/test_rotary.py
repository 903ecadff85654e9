"""`lmkern.rotary` on every backend: values and gradients against float64, edges, errors, compilation."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lmkern
from lmkern.testing import (
    LAYOUTS,
    Errors,
    Target,
    leaves,
    mean_verdicts,
    measure,
    poisoned_memory,
    seeded_randn,
    targets,
    verdicts,
)

TARGETS = targets("rotary")
IN_FLOAT32 = [target for target in TARGETS if target.takes(torch.float32)]
KERNELS = [target for target in TARGETS if target.backend != "reference"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (B, H, N, D, pairs): whole heads and parts of them, beside every vector width.
SHAPES = (
    (1, 1, 1, 2, 1),
    (2, 3, 5, 8, 4),
    (2, 3, 7, 33, 15),
    (1, 2, 9, 64, 32),
    (2, 2, 3, 80, 16),
    (1, 3, 4, 70, 33),
    (1, 2, 17, 128, 64),
    (2, 12, 100, 64, 32),
)

Shape = tuple[int, int, int, int, int]


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def tables(positions: int, pairs: int) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(positions), 100.0 ** -(torch.arange(pairs) / max(pairs, 1)))
    return angles.cos().float(), angles.sin().float()


def inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0
) -> tuple[Tensor, ...]:
    B, H, N, D, pairs = shape
    randn = seeded_randn(seed, dtype)
    x, dy = (LAYOUTS[layout](randn, B, H, N, D) for _ in range(2))
    return x, dy, *tables(N + 3, pairs)


def results(call: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    (x,) = leaves(x)
    y = call(x)
    return {"y": y.detach(), "dx": torch.autograd.grad(y, x, dy)[0]}


def by_complex_numbers(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, first: int = 0) -> Tensor:
    """(x1 + i x2) (cos + i sin), in x's dtype: torch's own way to the same thing."""
    at = slice(first, first + x.shape[2])
    c, s = cos[at].to(x.dtype), sin[at].to(x.dtype)
    pairs = cos.shape[1]
    turning, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        x1, x2 = turning.unflatten(-1, (pairs, 2)).unbind(-1)
        y = torch.stack((x1 * c - x2 * s, x2 * c + x1 * s), -1).flatten(-2)
    else:
        x1, x2 = turning.chunk(2, -1)
        y = torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), -1)
    return torch.cat((y, rest), -1)


@functools.cache
def errors(
    target: Target, interleaved: bool, dtype: torch.dtype, shape: Shape, seed: int = 0
) -> dict[str, Errors]:
    x, dy, cos, sin = inputs(shape, dtype, seed=seed)

    def mine(x: Tensor) -> Tensor:
        return lmkern.rotary(x, cos, sin, offset=2, interleaved=interleaved, backend=target.backend)

    with poisoned_memory(), target.active():
        ours = results(mine, x, dy)
    theirs = results(lambda x: by_complex_numbers(x, cos, sin, interleaved, 2), x, dy)
    exact = results(lambda x: by_complex_numbers(x, cos, sin, interleaved, 2), x.double(), dy.double())
    return {name: measure(ours[name], theirs[name], exact[name]) for name in ours}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("target", "dtype"),
    [(target, dtype) for target in KERNELS for dtype in target.some(DTYPES, 2) if target.takes(dtype)],
    ids=ids,
)
def test_errors_are_within_torchs(target: Target, interleaved: bool, dtype: torch.dtype) -> None:
    draws = {
        shape: functools.partial(errors, target, interleaved, dtype, shape)
        for shape in target.some(SHAPES, 3)
    }
    found = {shape: verdicts(draw, target.units_beside) for shape, draw in draws.items()}
    assert not any(found.values()), found
    assert not (means := mean_verdicts(list(draws.values()), target.units_beside)), means


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_strides_are_free(target: Target, layout: str, interleaved: bool) -> None:
    x, dy, cos, sin = inputs((2, 3, 5, 40, 17), layout=layout)
    cos_apart = torch.stack((cos, cos), 2)[:, :, 0]
    with target.active(), poisoned_memory():
        mine = results(
            lambda x: lmkern.rotary(x, cos_apart, sin, interleaved=interleaved, backend=target.backend), x, dy
        )
        expected = results(
            lambda x: lmkern.rotary(x, cos, sin, interleaved=interleaved, backend=target.backend),
            x.contiguous(),
            dy.contiguous(),
        )
    for name, value in mine.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_heads_inside_tokens_stay_inside(target: Target) -> None:
    x, _, cos, sin = inputs((2, 3, 5, 40, 17), layout="fused")
    with target.active():
        y = lmkern.rotary(x, cos, sin, backend=target.backend)
    assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_positions_pick_rows_of_the_tables(target: Target, interleaved: bool) -> None:
    x, _, cos, sin = inputs((2, 3, 5, 40, 17))
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 0, 3, 3, 1]])
    with target.active(), poisoned_memory():
        y = lmkern.rotary(x, cos, sin, positions=positions, interleaved=interleaved, backend=target.backend)
        for b in range(2):
            for n in range(5):
                alone = lmkern.rotary(
                    x[b : b + 1, :, n : n + 1],
                    cos,
                    sin,
                    offset=int(positions[b, n]),
                    interleaved=interleaved,
                    backend=target.backend,
                )
                assert torch.equal(y[b, :, n], alone[0, :, 0])


@pytest.mark.parametrize("layout", ["contiguous", "fused", "every_second"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_in_place_is_the_same_and_touches_nothing_else(
    target: Target, interleaved: bool, layout: str
) -> None:
    x, dy, cos, sin = inputs((2, 3, 5, 40, 17), layout=layout)
    options = {"interleaved": interleaved, "backend": target.backend}
    with target.active():
        expected = results(lambda x: lmkern.rotary(x, cos, sin, **options), x, dy)
        around = x._base.clone() if x._base is not None else None
        mine = results(lambda x: lmkern.rotary(x * 1, cos, sin, inplace=True, **options), x, dy)
        y = lmkern.rotary(x, cos, sin, inplace=True, **options)
    assert y is x
    assert torch.equal(x, expected["y"])
    assert torch.equal(mine["y"], expected["y"])
    assert torch.equal(mine["dx"], expected["dx"])
    if around is not None:
        part = around.as_strided(x.shape, x.stride(), x.storage_offset())
        with target.active():
            lmkern.rotary(part, cos, sin, inplace=True, **options)
        assert torch.equal(around, x._base)


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8), (2, 2, 3, 0)], ids=str)
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_no_elements_and_nothing_that_turns(target: Target, shape: tuple[int, int, int, int]) -> None:
    cos, sin = tables(3, min(4, shape[3] // 2))
    with target.active(), poisoned_memory():
        assert lmkern.rotary(torch.empty(shape), cos, sin, backend=target.backend).shape == shape
        x = torch.randn(2, 3, 3, 5)
        nothing = lmkern.rotary(x, cos[:, :0], sin[:, :0], backend=target.backend)
    assert torch.equal(nothing, x)


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_gradient_with_stride_zero_and_nan_in_one_pair(target: Target) -> None:
    x, _, cos, sin = inputs((2, 3, 5, 40, 20))
    with target.active():
        clean = lmkern.rotary(x, cos, sin, backend=target.backend)
        mine = results(
            lambda x: lmkern.rotary(x, cos, sin, backend=target.backend), x, torch.ones(()).expand(x.shape)
        )
        x[1, 2, 3, 5] = torch.nan
        ill = lmkern.rotary(x, cos, sin, backend=target.backend)
    theirs = results(lambda x: by_complex_numbers(x, cos, sin, False), x, torch.ones(x.shape))
    torch.testing.assert_close(mine["dx"], theirs["dx"])
    assert ill.isnan().nonzero().tolist() == [[1, 2, 3, 5], [1, 2, 3, 25]]
    assert torch.equal(ill.nan_to_num(7.0)[0], clean[0])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_gradients_of_every_order(target: Target, interleaved: bool) -> None:
    torch.set_num_threads(1)
    x, _, cos, sin = inputs((1, 2, 3, 7, 3), torch.float64)

    def call(x: Tensor) -> Tensor:
        return lmkern.rotary(x, cos, sin, interleaved=interleaved, backend=target.backend)

    with target.active():
        assert torch.autograd.gradcheck(call, leaves(x), fast_mode=target.interpreted)
        assert torch.autograd.gradgradcheck(call, leaves(x), fast_mode=target.interpreted)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("target", [t for t in KERNELS if t.backend == "cpu"], ids=str)
def test_results_are_bit_equal_for_any_number_of_threads(target: Target, layout: str, threads: int) -> None:
    x, dy, cos, sin = inputs((2, 5, 101, 64, 32), layout=layout)
    call = functools.partial(lmkern.rotary, cos=cos, sin=sin, backend="cpu")
    with target.active():
        expected = results(call, x, dy)
        torch.set_num_threads(threads)
        mine = results(call, x, dy)
    for name, value in mine.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("layout", ["contiguous", "fused"])
@pytest.mark.parametrize("with_positions", [False, True])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_opcheck_and_compilation(target: Target, with_positions: bool, layout: str) -> None:
    torch.compiler.reset()
    x, dy, cos, sin = inputs((2, 3, 5, 40, 17), layout=layout)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 0, 3, 3, 1]]) if with_positions else None

    def call(x: Tensor, inplace: bool = False) -> Tensor:
        return lmkern.rotary(x * 1, cos, sin, positions=positions, inplace=inplace, backend=target.backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with target.active():
        arguments = (*leaves(x), cos, sin, positions, 0, False, False, target.backend)
        torch.library.opcheck(torch.ops.lmkern.rotary.default, arguments)
        expected = results(call, x, dy)
        for inplace in (False, True):
            mine = results(functools.partial(compiled, inplace=inplace), x, dy)
            for name, value in mine.items():
                assert torch.equal(value, expected[name]), name


X, COS = torch.zeros(2, 3, 5, 8), torch.zeros(6, 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": X[0]}, r"rotary: x must be \(B, H, N, D\); got \(3, 5, 8\)"),
        ({"x": X.long()}, r"x must be one of float32, .*; got torch.int64"),
        ({"cos": COS[:, :3]}, r"cos and sin must be \(positions, pairs\) .* D = 8; got \(6, 3\), \(6, 4\)"),
        ({"x": X[..., :7]}, r"2 pairs at most D = 7; got \(6, 4\), \(6, 4\)"),
        ({"sin": COS.double()}, r"sin must be float32 on x's device cpu; got torch.float64 on cpu"),
        ({"cos": COS.clone().requires_grad_()}, r"cos gets no gradient here; give cos.detach\(\)"),
        ({"offset": 2}, r"cos and sin have 6 positions; got 5 tokens from 2 on"),
        ({"offset": -1}, r"got 5 tokens from -1 on"),
        ({"positions": torch.zeros(5, dtype=torch.int64)}, r"positions must be int64 \(B, N\) = \(2, 5\)"),
        ({"positions": torch.zeros(2, 5)}, r"positions must be int64 .*; got torch.float32 \(2, 5\)"),
        ({"positions": torch.full((2, 5), 6)}, r"positions must lie in \[0, 6\), .*; got 6 to 6"),
        ({"positions": torch.full((2, 5), -1)}, r"positions must lie in \[0, 6\), .*; got -1 to -1"),
        ({"positions": torch.full((2, 5), 1), "offset": 1}, r"positions come without an offset"),
        ({"x": X[:, :1].expand(X.shape), "inplace": True}, r"in place, x must not overlap itself"),
        (
            {"x": torch.zeros(2, 3, 12).unfold(2, 8, 1), "inplace": True},
            r"in place, x must not overlap itself",
        ),
        ({"backend": "cdua"}, r"rotary: no backend 'cdua'; expected one of .*reference"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lmkern.rotary(**{"x": X, "cos": COS, "sin": COS, **changed})


def test_in_place_gives_the_tensor_that_it_was_given() -> None:
    cos, sin = torch.ones(5, 4).cos(), torch.ones(5, 4).sin()
    x = torch.randn(1, 2, 5, 8, requires_grad=True) * 2
    with torch.no_grad():
        y = lmkern.rotary(x, cos, sin, inplace=True)
    assert y is x and y.requires_grad
    with torch.inference_mode():
        made_there = torch.randn(1, 2, 5, 8)
        assert lmkern.rotary(made_there, cos, sin, inplace=True) is made_there
    before = made_there.clone()
    with pytest.raises(RuntimeError, match=r"got one made in inference_mode, .* Give x\.clone\(\)"):
        lmkern.rotary(made_there, cos, sin, inplace=True)
    assert torch.equal(made_there, before)
