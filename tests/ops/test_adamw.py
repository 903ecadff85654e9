"""`lmkern.adamw_` on every backend: against float64 and torch.optim.AdamW, edges, errors."""

import functools

import pytest
import torch
from torch import Tensor

import lmkern
from lmkern.testing import (
    Errors,
    Target,
    mean_verdicts,
    measure,
    seeded_randn,
    targets,
    verdicts,
)
from lmkern.testing import exact as long_double

TARGETS = targets("adamw")
IN_FLOAT32 = [target for target in TARGETS if target.takes(torch.float32)]
KERNELS = [target for target in TARGETS if target.backend != "reference"]
# Of param and of grad.
DTYPES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float64),
)
SIZES = (1, 3, 15, 17, 64, 127, 1000, 16_384, 40_001)
OPTIONS = {"lr": 0.02, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
STEPS = 4

State = dict[str, Tensor]


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def moments(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def problem(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """A parameter and its gradients over STEPS steps."""
    randn = seeded_randn(seed, torch.float32)
    param = randn(*shape).to(dtype)
    return param, [(randn(*shape) * 3).to(grad_dtype or dtype) for _ in range(STEPS)]


def train(
    param: Tensor, grads: list[Tensor], *, backend: str | None = None, copy: bool = False, scale: float = 1.0
) -> State:
    state = {"param": param.clone()}
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros_like(param, dtype=moments(param))
    state["copy"] = torch.full_like(param, torch.nan, dtype=torch.bfloat16)
    for step, grad in enumerate(grads, start=1):
        lmkern.adamw_(
            state["param"],
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            copy=state["copy"] if copy else None,
            step=step,
            grad_scale=scale,
            backend=backend,
            **OPTIONS,
        )
    return state


def torchs(param: Tensor, grads: list[Tensor]) -> State:
    leaf = param.clone().requires_grad_()
    optimizer = torch.optim.AdamW(
        [leaf],
        lr=OPTIONS["lr"],
        betas=(OPTIONS["beta1"], OPTIONS["beta2"]),
        eps=OPTIONS["eps"],
        weight_decay=OPTIONS["weight_decay"],
        foreach=False,
    )
    for grad in grads:
        leaf.grad = grad.to(param.dtype).clone()
        optimizer.step()
    return {"param": leaf.detach(), **optimizer.state[leaf]}


@functools.cache
def errors(
    target: Target, dtype: torch.dtype, grad_dtype: torch.dtype, size: int, seed: int = 0
) -> dict[str, Errors]:
    param, grads = problem((size,), dtype, grad_dtype, seed)
    with target.active():
        mine = train(param, grads, backend=target.backend)
    theirs = torchs(param, grads)
    return {"param": measure(mine["param"], theirs["param"], long_double.adamw(param, grads, **OPTIONS))}


@pytest.mark.parametrize(
    ("target", "dtype", "grad_dtype"),
    [(target, *dtypes) for target in KERNELS for dtypes in target.some(DTYPES, 3) if target.takes(dtypes[0])],
    ids=ids,
)
def test_errors_are_within_torchs(target: Target, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    draws = {
        size: functools.partial(errors, target, dtype, grad_dtype, size) for size in target.some(SIZES, 2)
    }
    found = {size: verdicts(draw, target.units_beside) for size, draw in draws.items()}
    assert not any(found.values()), found
    assert not (means := mean_verdicts(list(draws.values()), target.units_beside)), means


def test_reference_is_torchs_adamw() -> None:
    param, grads = problem((7, 5), torch.float64)
    mine, theirs = train(param, grads, backend="reference"), torchs(param, grads)
    for name in ("param", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_copy_is_the_new_parameter_rounded_once(target: Target, dtype: torch.dtype) -> None:
    param, grads = problem((33, 5), dtype)
    with target.active():
        state = train(param, grads, backend=target.backend, copy=True)
        alone = train(param, grads, backend=target.backend)
    assert torch.equal(state["copy"], state["param"].bfloat16())
    assert torch.equal(state["param"], alone["param"])


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_grad_scale_is_a_factor_on_the_gradient(target: Target) -> None:
    param, grads = problem((33, 5))
    with target.active():
        scaled = train(param, grads, backend=target.backend, scale=0.25)
        multiplied = train(param, [grad * 0.25 for grad in grads], backend=target.backend)
    for name in ("param", "exp_avg", "exp_avg_sq"):
        assert torch.equal(scaled[name], multiplied[name]), name


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_any_dense_layout_and_any_gradient(target: Target) -> None:
    param, grads = problem((6, 10))
    with target.active():
        expected = train(param, grads, backend=target.backend)
        transposed = train(param.mT.contiguous().mT, grads, backend=target.backend)
        gaps = train(param, [grad.repeat(1, 2)[:, :10] for grad in grads], backend=target.backend)
        ones = train(param, [torch.ones(()).expand(6, 10)], backend=target.backend)
        filled = train(param, [torch.ones(6, 10)], backend=target.backend)
    for name in ("param", "exp_avg", "exp_avg_sq"):
        assert torch.equal(transposed[name], expected[name]), name
        assert torch.equal(gaps[name], expected[name]), name
        assert torch.equal(ones[name], filled[name]), name
    assert transposed["param"].stride() == (1, 6)


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_parts_of_a_buffer_and_nothing_beside_them(target: Target) -> None:
    buffer = torch.full((70,), 5.0)
    param, (grad, *_) = problem((33,))
    with target.active():
        expected = train(param, [grad], backend=target.backend)
        part = buffer[1:34].copy_(param)
        average, square = torch.zeros(40)[3:36], torch.zeros(40)[5:38]
        lmkern.adamw_(part, grad, average, square, step=1, backend=target.backend, **OPTIONS)
    assert torch.equal(part, expected["param"])
    assert (buffer[34:] == 5).all()
    assert buffer[0] == 5


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_no_elements_and_scalars(target: Target) -> None:
    for shape in ((0,), (3, 0), ()):
        param, grads = problem(shape)
        with target.active():
            state = train(param, grads, backend=target.backend)
        torch.testing.assert_close(state["param"], torchs(param, grads)["param"])


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_nan_stays_in_its_element(target: Target) -> None:
    param, (grad, *_) = problem((40,))
    with target.active():
        expected = train(param, [grad], backend=target.backend)["param"]
        grad[17], grad[23] = torch.nan, torch.inf
        ill = train(param, [grad], backend=target.backend)["param"]
    assert ill.isnan().nonzero().flatten().tolist() == [17, 23]
    expected[[17, 23]] = torch.nan
    torch.testing.assert_close(ill, expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_a_gradient_whose_square_overflows_is_no_end(target: Target) -> None:
    param, (grad, *_) = problem((40,))
    grad[17] = 1e20
    with target.active():
        mine = train(param, [grad], backend=target.backend)
    assert mine["param"].isfinite().all()
    torch.testing.assert_close(mine["param"], torchs(param, [grad])["param"])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("target", [t for t in TARGETS if t.backend == "cpu"], ids=str)
def test_results_are_bit_equal_for_any_number_of_threads(target: Target, threads: int) -> None:
    param, grads = problem((40_001,))
    with target.active():
        expected = train(param, grads)
        torch.set_num_threads(threads)
        mine = train(param, grads)
    assert torch.equal(mine["param"], expected["param"])


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_what_is_written_counts_as_changed(target: Target) -> None:
    written = {name: torch.zeros(40) for name in ("param", "exp_avg", "exp_avg_sq")}
    written["copy"] = torch.zeros(40, dtype=torch.bfloat16)
    before = {name: x._version for name, x in written.items()}
    with target.active():
        lmkern.adamw_(grad=torch.ones(40), step=1, backend=target.backend, **written, **OPTIONS)
    for name, tensor in written.items():
        assert tensor._version > before[name], name


def test_meta_tensors_share_no_memory() -> None:
    x = torch.ones(3, 4, device="meta")
    moments = {name: torch.zeros_like(x) for name in ("exp_avg", "exp_avg_sq")}
    lmkern.adamw_(x, torch.ones_like(x), step=1, **moments, **OPTIONS)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_opcheck_and_compilation(target: Target) -> None:
    param, (grad, *_) = problem((5, 7))
    state = [torch.zeros(5, 7) for _ in range(2)]
    copy = torch.zeros(5, 7, dtype=torch.bfloat16)
    scalars = (0.02, 0.9, 0.95, 1e-8, 0.1, 1, 1.0, target.backend)
    with target.active():
        expected = train(param, [grad], backend=target.backend, copy=True)
        for optional in (copy, None):
            torch.library.opcheck(
                torch.ops.lmkern.adamw_.default,
                (param.clone(), grad, *(x.clone() for x in state), optional, *scalars),
            )

        def call(param: Tensor, average: Tensor, square: Tensor, copy: Tensor) -> None:
            lmkern.adamw_(param, grad, average, square, copy=copy, step=1, backend=target.backend, **OPTIONS)

        torch.compile(call, fullgraph=True, backend="aot_eager")(param, *state, copy)
    for tensor, name in zip((param, *state, copy), ("param", "exp_avg", "exp_avg_sq", "copy"), strict=True):
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("first", ["param", "exp_avg", "exp_avg_sq", "copy"])
@pytest.mark.parametrize("second", ["exp_avg", "exp_avg_sq", "copy"])
def test_tensors_that_are_written_may_not_share_memory(first: str, second: str) -> None:
    memory = torch.ones(12)
    written = {"param": torch.zeros(4), "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}
    written["copy"] = torch.zeros(4, dtype=torch.bfloat16)
    for name, offset in ((first, 0), (second, 1)):
        written[name] = memory[offset : offset + 4]
        if name == "copy":
            written[name] = memory.view(torch.bfloat16)[2 * offset : 2 * offset + 4]
    if first == second:
        lmkern.adamw_(grad=torch.ones(4), step=1, **written, **OPTIONS)
        return
    message = rf"adamw_: {first} and {second} must not share memory"
    with pytest.raises(ValueError, match=message):
        lmkern.adamw_(grad=torch.ones(4), step=1, **written, **OPTIONS)
    assert (memory == 1).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grad": torch.ones(3)}, r"adamw_: grad must be \(4,\), as param; got \(3,\)"),
        ({"grad": torch.ones(4).double()}, r"float64 grad and param go together; got grad torch.float64"),
        ({"grad": torch.ones(4, dtype=torch.int64)}, r"grad must be one of float32, .*; got torch.int64"),
        ({"exp_avg": torch.zeros(4).bfloat16()}, r"exp_avg must be \(4,\) torch.float32 .*; got .*bfloat16"),
        ({"exp_avg_sq": torch.zeros(8)[::2]}, r"exp_avg_sq must be .* with param's strides \(1,\); got .*2"),
        ({"copy": torch.zeros(4)}, r"copy must be \(4,\) torch.bfloat16"),
        ({"param": torch.zeros(8)[::2]}, r"param must be dense in memory; got \(4,\) with strides \(2,\)"),
        ({"param": torch.zeros(()).expand(4)}, r"param must be dense in memory"),
        ({"grad": torch.ones(4, device="meta")}, r"grad must be on param's device cpu; got meta"),
        ({"grad": torch.ones(4).to_sparse()}, r"grad must be strided; got torch.sparse_coo.*SparseAdam"),
        ({"param": torch.zeros(4).to_sparse()}, r"param must be strided; got torch.sparse_coo"),
        ({"step": 0}, r"step at least 1; got 0.9, 0.95, step 0"),
        ({"beta1": 1.0}, r"betas must be in \[0, 1\)"),
        ({"lr": float("nan")}, r"adamw_: lr must be a finite number from 0 up; got nan"),
        ({"eps": -1.0}, r"adamw_: eps must be a finite number from 0 up; got -1.0"),
        ({"weight_decay": float("inf")}, r"adamw_: weight_decay must be a finite number from 0 up; got inf"),
        ({"backend": "cdua"}, r"adamw: no backend 'cdua'; expected one of .*reference"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(changed: dict[str, object], message: str) -> None:
    arguments = {
        "param": torch.zeros(4),
        "grad": torch.ones(4),
        "exp_avg": torch.zeros(4),
        "exp_avg_sq": torch.zeros(4),
        "step": 1,
        **OPTIONS,
        **changed,
    }
    with pytest.raises(ValueError, match=message):
        lmkern.adamw_(**arguments)
