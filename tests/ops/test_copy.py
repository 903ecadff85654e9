"""`lmkern.cast` and `lmkern.transposed_copy` on every backend: bits, strides, gradients, compilation."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lmkern
from lmkern.testing import Target, leaves, poisoned_memory, seeded_randn, targets

TARGETS = targets("copy")
KERNELS = [target for target in TARGETS if target.backend != "reference"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PAIRS = [(a, b) for a in DTYPES for b in DTYPES]
# (R, C): beside blocks of 8, 16 and 32 rows and strips of 64 columns; one that is written past the caches.
SHAPES = ((1, 1), (3, 5), (8, 8), (17, 33), (31, 65), (32, 64), (65, 31), (130, 127), (64, 200), (2048, 300))


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def same(mine: Tensor, theirs: Tensor) -> bool:
    """Equal bit for bit, but for the payload of NaN."""
    return mine.dtype == theirs.dtype and torch.equal(mine.isnan(), theirs.isnan()) and torch.equal(
        mine.nan_to_num(0.5), theirs.nan_to_num(0.5)
    )  # fmt: skip


def special(dtype: torch.dtype) -> Tensor:
    """Numbers where rounding, overflow and signs go wrong, then ordinary ones; 70 in all."""
    values = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504.0, 65520.0, 65519.9, 3.4e38, -3.4e38]
    values += [
        1 + 2.0**-8,
        1 + 3 * 2.0**-8,
        1 + 2.0**-8 + 2.0**-20,
        1 + 2.0**-11,
        1 + 3 * 2.0**-11,
        6e-8,
        2e-5,
    ]
    return torch.cat((torch.tensor(values, dtype=torch.float64), torch.randn(53).double())).to(dtype)


@pytest.mark.parametrize(
    ("target", "source", "dtype"),
    [(target, *pair) for target in TARGETS for pair in target.some(PAIRS, 3)],
    ids=ids,
)
def test_values_are_torchs(target: Target, source: torch.dtype, dtype: torch.dtype) -> None:
    randn = seeded_randn(0, source)
    with target.active(), poisoned_memory():
        x = special(source)
        assert same(lmkern.cast(x, dtype, backend=target.backend), x.to(dtype))
        turned = lmkern.transposed_copy(x.view(7, 10), dtype, backend=target.backend)
        assert same(turned, x.view(7, 10).mT.to(dtype))
        for shape in target.some(SHAPES, 3):
            x = randn(*shape)
            assert torch.equal(lmkern.cast(x, dtype, backend=target.backend), x.to(dtype)), shape
            turned = lmkern.transposed_copy(x, dtype, backend=target.backend)
            assert torch.equal(turned, x.mT.to(dtype)), shape
            assert turned.is_contiguous()


@pytest.mark.parametrize("target", KERNELS, ids=str)
def test_a_nan_anywhere_stays_one_and_alone(target: Target) -> None:
    # Every lane of two vectors and of what is left of a row; with a payload that rounding would carry away.
    x = seeded_randn(0, torch.float32)(41).repeat(41, 1)
    x.view(torch.int32).diagonal().copy_(torch.tensor([0x7F800001, 0x7FFFFFFF, -1] * 14)[:41])
    with target.active(), poisoned_memory():
        for row in x:
            assert same(lmkern.cast(row, torch.bfloat16, backend=target.backend), row.bfloat16())


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced rows": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every second row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "columns": lambda x: x.mT.contiguous().mT,
    "every second element": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "heads inside tokens": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "expanded rows": lambda x: x[:, :1].expand(x.shape),
    "expanded batch": lambda x: x[:1].expand(x.shape),
    "four dimensions": lambda x: x[None].transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_strides_are_free(target: Target, layout: str) -> None:
    x = LAYOUTS[layout](seeded_randn(0, torch.float32)(3, 33, 70))
    with target.active(), poisoned_memory():
        for dtype in (torch.float32, torch.bfloat16):
            mine = lmkern.cast(x, dtype, backend=target.backend)
            assert torch.equal(mine, x.to(dtype))
            assert mine.stride() == torch.empty_like(x).stride()
            turned = lmkern.transposed_copy(x, dtype, backend=target.backend)
            assert torch.equal(turned, x.mT.to(dtype))
            assert turned.is_contiguous()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3), (0, 2, 3), ()], ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_no_elements_and_scalars(target: Target, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    with target.active():
        assert torch.equal(lmkern.cast(x, torch.bfloat16, backend=target.backend), x.bfloat16())
        if len(shape) > 1:
            assert lmkern.transposed_copy(x, backend=target.backend).shape == x.mT.shape


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_gradient_is_the_copy_back_at_every_order(target: Target) -> None:
    x, dy = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, 5).bfloat16()
    torch.set_num_threads(1)
    with target.active():
        (leaf,) = leaves(x.float())
        y = lmkern.transposed_copy(leaf, torch.bfloat16, backend=target.backend)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        assert torch.equal(dx, dy.mT.float())
        (dx,) = torch.autograd.grad(lmkern.cast(leaf, torch.bfloat16).sum(), leaf)
        assert torch.equal(dx, torch.ones(5, 3))

        def call(x: Tensor) -> Tensor:
            return lmkern.transposed_copy(lmkern.cast(x, x.dtype), backend=target.backend)

        assert torch.autograd.gradcheck(call, leaves(x), fast_mode=target.interpreted)
        assert torch.autograd.gradgradcheck(call, leaves(x), fast_mode=target.interpreted)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_opcheck_and_compilation(target: Target, transposed: bool) -> None:
    torch.compiler.reset()
    x = torch.randn(2, 5, 7).transpose(0, 1)

    def call(x: Tensor) -> Tensor:
        if transposed:
            return lmkern.transposed_copy(x, torch.bfloat16, backend=target.backend)
        return lmkern.cast(x, torch.bfloat16, backend=target.backend)

    with target.active():
        torch.library.opcheck(
            torch.ops.lmkern.copy.default, (*leaves(x), torch.bfloat16, transposed, target.backend)
        )
        assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("target", KERNELS, ids=str)
def test_every_number_of_threads(target: Target, threads: int) -> None:
    x = torch.randn(300, 257)
    torch.set_num_threads(threads)
    with target.active():
        assert torch.equal(lmkern.cast(x, torch.bfloat16), x.bfloat16())
        assert torch.equal(lmkern.transposed_copy(x), x.mT)


def test_arguments_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"transposed_copy: x must be \(\.\.\., R, C\); got \(3,\)"):
        lmkern.transposed_copy(torch.zeros(3))
    with pytest.raises(ValueError, match=r"cast: x must be one of float32, .*; got torch.int64"):
        lmkern.cast(torch.zeros(3).long(), torch.float32)
    with pytest.raises(ValueError, match=r"cast: dtype must be one of float32, .*; got torch.int8"):
        lmkern.cast(torch.zeros(3), torch.int8)
    with pytest.raises(ValueError, match=r"copy: no backend 'cdua'; expected one of .*reference"):
        lmkern.cast(torch.zeros(3), torch.float16, backend="cdua")
