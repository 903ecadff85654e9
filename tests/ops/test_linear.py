"""`lmkern.linear` against float64, for every dtype and instruction set, and where torch's product serves."""

import functools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmkern
from lmkern.kernels import widened
from lmkern.kernels.linear import MOST_ROWS, cpu
from lmkern.nn import Linear
from lmkern.testing import (
    Errors,
    Target,
    mean_verdicts,
    measure,
    poisoned_memory,
    seeded_randn,
    targets,
    verdicts,
)
from lmkern.testing.exact import long_double

TARGETS = targets("linear")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = [
    (target, dtype)
    for target in TARGETS
    if target.backend != "reference"
    for dtype in DTYPES
    if target.takes(dtype)
]
# (R, N, K): widths beside vectors and pairs of them, outputs beside the rows that are taken together.
SHAPES = ((1, 1, 1), (2, 3, 5), (3, 65, 33), (4, 130, 64), (1, 257, 127), (2, 70, 1029), (4, 100, 1536))


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def inputs(R: int, N: int, K: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    randn = seeded_randn(seed, dtype)
    return randn(R, K), randn(N, K), randn(N)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("target", "dtype"), KERNELS, ids=ids)
def test_errors_are_at_most_twice_torchs(target: Target, dtype: torch.dtype, with_bias: bool) -> None:
    @functools.cache
    def draw(shape: tuple[int, int, int], seed: int) -> dict[str, Errors]:
        x, weight, bias = inputs(*shape, dtype, seed)
        given = (x, weight, bias if with_bias else None)
        with target.active(), poisoned_memory():
            y = lmkern.linear(*given, backend=target.backend)
        exact = long_double(x) @ long_double(weight).T + (long_double(bias) if with_bias else 0)
        return {"y": measure(y, F.linear(*given), exact)}

    draws = {shape: functools.partial(draw, shape) for shape in SHAPES}
    found = {shape: verdicts(of_seed, target.units_beside) for shape, of_seed in draws.items()}
    assert not any(found.values()), found
    assert not (means := mean_verdicts(list(draws.values()), target.units_beside)), means


@pytest.mark.parametrize(("target", "dtype"), KERNELS, ids=ids)
def test_a_rows_bits_depend_neither_on_the_others_nor_on_the_threads(
    target: Target, dtype: torch.dtype
) -> None:
    x, weight, bias = inputs(MOST_ROWS[dtype], 700, 130, dtype)
    with target.active():
        torch.set_num_threads(1)
        whole = lmkern.linear(x, weight, bias, backend=target.backend)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for row in range(len(x)):
                alone = lmkern.linear(x[row], weight, bias, backend=target.backend)
                assert torch.equal(alone, whole[row])
            assert torch.equal(lmkern.linear(x[:3], weight, bias, backend=target.backend), whole[:3])


@pytest.mark.parametrize(("target", "dtype"), KERNELS, ids=ids)
def test_what_is_not_finite_stays_in_its_row_and_output(target: Target, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(4, 70, 45, dtype)
    x[1, 44], weight[66, 3], bias[5] = torch.nan, torch.nan, torch.inf
    with target.active():
        y = lmkern.linear(x, weight, bias, backend=target.backend)
    expected = F.linear(x.float(), weight.float(), bias.float())
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize(("R", "N", "K"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_no_elements(target: Target, R: int, N: int, K: int) -> None:
    if not target.takes(torch.float32):
        pytest.skip("serves other dtypes")
    x, weight, bias = inputs(R, N, K, torch.float32)
    with target.active(), poisoned_memory():
        y = lmkern.linear(x, weight, bias, backend=target.backend)
    torch.testing.assert_close(y, F.linear(x, weight, bias))


@pytest.mark.parametrize("shape", [(33,), (3, 33), (2, 2, 33), (1, 1, 1, 33)])
def test_leading_dimensions_are_free(shape: tuple[int, ...]) -> None:
    x, (_, weight, bias) = torch.randn(shape), inputs(1, 9, 33, torch.float32)
    y = lmkern.linear(x, weight, bias, backend="cpu")
    assert y.shape == (*shape[:-1], 9)
    torch.testing.assert_close(y, F.linear(x, weight, bias))


LAYOUTS = {
    "every second row": lambda x: torch.stack((x, torch.full_like(x, torch.nan)), 1)[:, 0],
    "an element off": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape),
    "one row for all": lambda x: x[:1].expand(x.shape),
    "columns": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("target", "dtype"), KERNELS, ids=ids)
def test_strides_are_free(target: Target, dtype: torch.dtype, layout: str) -> None:
    x, weight, bias = inputs(3, 70, 45, dtype)
    x = LAYOUTS[layout](x)
    with target.active(), poisoned_memory():
        expected = lmkern.linear(x.contiguous(), weight, bias, backend="cpu")
        assert torch.equal(lmkern.linear(x, weight, bias, backend="cpu"), expected)
        weight = LAYOUTS[layout](weight)
        # A weight whose rows are not contiguous is torch's.
        y = lmkern.linear(x, weight, bias, backend=None if layout == "columns" else "cpu")
        plain = lmkern.linear(x, weight.contiguous(), bias, backend="cpu")
    if layout == "columns":
        torch.testing.assert_close(y, plain, rtol=2.0**-7, atol=1e-2)
    else:
        assert torch.equal(y, plain)


@pytest.mark.parametrize("with_bias", [True, False])
def test_training_compiling_and_transforms_are_torchs(with_bias: bool) -> None:
    x, weight, bias = inputs(2, 9, 33, torch.float32)
    given = (x, weight, bias if with_bias else None)
    leaves = [None if t is None else t.clone().requires_grad_() for t in given]
    y = lmkern.linear(*leaves)  # type: ignore[arg-type]
    assert torch.equal(y, F.linear(*given))
    y.sum().backward()
    assert all(t is None or t.grad is not None for t in leaves)
    with torch.no_grad():
        compiled = torch.compile(lmkern.linear, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*given), F.linear(*given))
        mapped = torch.func.vmap(lambda row: lmkern.linear(row, weight, given[2]))(x)
        torch.testing.assert_close(mapped, F.linear(*given))
        _, tangent = torch.func.jvp(lambda x: lmkern.linear(x, weight, given[2]), (x,), (x,))
        torch.testing.assert_close(tangent, x @ weight.T)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert lmkern.linear(*given).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        lmkern.linear(x, weight.T)


@pytest.fixture
def no_fast_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without instructions for products of 16 bits, and parts so small that there are several."""
    for module in (cpu, sys.modules["lmkern.ops.linear"]):
        monkeypatch.setattr(module, "torch_multiplies", lambda dtype: dtype.itemsize > 2)
    monkeypatch.setattr(widened, "_ROWS", 32)
    monkeypatch.setattr(cpu, "_MOST_ROWS_WIDENED", 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids)
@pytest.mark.parametrize("shape", [(20, 70, 33), (21, 70, 33), (3, 65, 130), (2, 3, 0), (0, 3, 4)])
def test_errors_are_at_most_twice_torchs_without_a_fast_product(
    shape: tuple[int, int, int], dtype: torch.dtype, no_fast_product: None
) -> None:
    """Forward by the kernel and in float32, backward, both with and without a gradient."""

    @functools.cache
    def draw(seed: int) -> dict[str, Errors]:
        given = [t.requires_grad_() for t in inputs(*shape, dtype, seed)]
        dy = seeded_randn(seed + 1, dtype)(shape[0], shape[1])
        exact_x, exact_weight, exact_bias, exact_dy = (t.detach().double() for t in (*given, dy))
        exact = {
            "y": exact_x @ exact_weight.T + exact_bias,
            "dx": exact_dy @ exact_weight,
            "dweight": exact_dy.T @ exact_x,
            "dbias": exact_dy.sum(0),
        }
        found = []
        for function in (lmkern.linear, F.linear):
            with poisoned_memory():
                y = function(*given)
                found.append((y, *torch.autograd.grad(y, given, dy)))
        with torch.no_grad():
            assert torch.equal(lmkern.linear(*given), found[0][0])
        assert all(ours.dtype == dtype for ours in found[0])
        return {
            name: measure(*each, exact[name])
            for name, each in zip(exact, zip(*found, strict=True), strict=True)
        }

    assert not (wrong := verdicts(draw)), wrong


def test_gradients_without_a_fast_product_are_those_asked_for(no_fast_product: None) -> None:
    given = inputs(30, 70, 33, torch.bfloat16)
    dy = torch.randn(5, 6, 70).bfloat16()
    whole: dict[str, Tensor] = {}
    for needs in ((True,) * 3, (True, False, False), (False, True, False), (False, False, True)):
        leaves = [t.clone().requires_grad_(need) for t, need in zip(given, needs, strict=True)]
        y = lmkern.linear(leaves[0].view(5, 6, 33), *leaves[1:])
        assert y.grad_fn is not None and "Linear" in repr(y.grad_fn.next_functions[0][0])
        y.backward(dy)
        for name, leaf, need in zip(("x", "weight", "bias"), leaves, needs, strict=True):
            assert (leaf.grad is not None) == need
            if leaf.grad is not None:
                assert torch.equal(leaf.grad, whole.setdefault(name, leaf.grad))


def test_double_backward_without_a_fast_product(no_fast_product: None) -> None:
    x, weight, bias = (t.requires_grad_() for t in inputs(30, 9, 5, torch.bfloat16))
    results = []
    for function in (lmkern.linear, F.linear):
        (dx,) = torch.autograd.grad(function(x, weight, bias).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), (x, weight)))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=2.0**-5, atol=2.0**-5 * float(torchs.abs().max()))


def test_autocast_without_a_fast_product(no_fast_product: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [t.requires_grad_() for t in inputs(30, 70, 33, torch.float32)]
    narrow = [t.detach().bfloat16().requires_grad_() for t in given]
    expected = lmkern.linear(*narrow)
    expected.sum().backward()
    monkeypatch.setattr(F, "linear", None)  # of 16 bits, which this must not call
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lmkern.linear(*given)
        assert torch.equal(y, expected)
        y.sum().backward()
    for leaf, other in zip(given, narrow, strict=True):
        assert leaf.grad is not None and other.grad is not None
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, other.grad.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lmkern.linear(given[0], given[1]).dtype == torch.bfloat16


def test_what_the_kernel_cannot_take_is_said_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "torch_multiplies", lambda dtype: True)
    x, weight, _ = inputs(9, 8, 33, torch.float32)
    with pytest.raises(
        lmkern.UnsupportedBackend, match=r"takes up to 8 rows of 33 here, .* got 9\. Here: ref"
    ):
        lmkern.linear(x, weight, backend="cpu")
    torch.testing.assert_close(lmkern.linear(x, weight), F.linear(x, weight))
    with pytest.raises(lmkern.UnsupportedBackend, match="takes float32, bfloat16 and float16"):
        lmkern.linear(x.double(), weight.double(), backend="cpu")
    for wrong in (x.bfloat16(), x[:, :5]):
        with pytest.raises(lmkern.UnsupportedBackend, match="takes CPU tensors of one dtype"):
            lmkern.linear(wrong, weight, backend="cpu")
    with pytest.raises(lmkern.UnsupportedBackend, match="has no gradient where torch has a fast product"):
        lmkern.linear(x.clone().requires_grad_(), weight, backend="cpu")
    with pytest.raises(ValueError, match="no backend 'triton'; expected one of cpu, reference"):
        lmkern.linear(x, weight, backend="triton")
    with pytest.raises(TypeError, match=r"linear: weight must be a torch.Tensor; got list"):
        lmkern.linear(x, [1.0])  # type: ignore[arg-type]


def test_the_module_is_torchs() -> None:
    torchs, ours = nn.Linear(33, 9), Linear(33, 9)
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(2, 5, 33)
    assert torch.equal(ours(x), torchs(x))
    with torch.no_grad():
        torch.testing.assert_close(ours(x[:1, :2]), torchs(x[:1, :2]))
    assert isinstance(ours, nn.Linear) and repr(ours) == repr(torchs)
