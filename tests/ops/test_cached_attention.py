"""`lmkern.cached_attention`: values against the exact ones, layouts, lengths, pages, refusals."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import lmkern
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

TARGETS = targets("cached_attention")
IN_FLOAT32 = [target for target in TARGETS if target.takes(torch.float32)]
KERNELS = [target for target in TARGETS if target.backend != "reference"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The exact result is the reference in float64.
BUDGETED = DTYPES[:3]
IN_FLOAT64 = [target for target in TARGETS if target.takes(torch.float64)]


def each(among: list[Target], *others: Iterable[Any], step: int = 1) -> list[tuple[Any, ...]]:
    """Each target with the dtypes that it takes and the others; of Triton's interpreter every step-th."""
    return [
        (target, *case)
        for target in among
        for case in target.some(product(filter(target.takes, DTYPES), *others), step)
    ]


@dataclass(frozen=True)
class Shape:
    """q (B, H, N_q, D), caches (B, H_kv, N_max, D)."""

    B: int
    H: int
    H_kv: int
    N_q: int
    N_max: int
    D: int
    reason: str = ""

    def __str__(self) -> str:
        return f"B{self.B}-H{self.H}of{self.H_kv}-N{self.N_q}x{self.N_max}-D{self.D}"


SHAPES = (
    Shape(1, 1, 1, 1, 1, 1, "the smallest call"),
    Shape(3, 4, 4, 1, 1300, 64, "one query, three ranges of keys"),
    Shape(2, 6, 2, 1, 513, 128, "three heads share a key; a range of one key"),
    Shape(2, 8, 1, 1, 600, 80, "eight share a key"),
    Shape(1, 5, 5, 3, 130, 40, "three queries, a head that is no multiple of a vector"),
    Shape(2, 6, 2, 7, 50, 32, "21 rows: more than are taken at once"),
    Shape(4, 4, 2, 5, 3, 20, "more queries than keys: the first see none"),
    Shape(2, 2, 2, 1, 100, 256, "the widest head"),
    Shape(3, 3, 3, 2, 77, 7, "narrower than a vector"),
)


def cached_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k_cache, v_cache and lengths: the first is N_max, the last of more than two is zero."""
    randn = seeded_randn(seed, dtype)
    q = randn(shape.B, shape.H, shape.N_q, shape.D)
    k, v = (randn(shape.B, shape.H_kv, shape.N_max, shape.D) for _ in range(2))
    lengths = torch.linspace(shape.N_max, 0 if shape.B > 2 else shape.N_max // 2, shape.B).int()
    return q, k, v, lengths


def options_of(shape: Shape, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Everything that a call may say beside lengths."""
    randn = seeded_randn(1, torch.float32)
    return {
        "window": (40, None),
        "softmax_scale": 0.3,
        "softcap": 2.0,
        "alibi_slopes": randn(shape.H).abs() / 10,
        "sinks": randn(shape.H),
    }


def exact(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The reference in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    out, lse = lmkern.cached_attention(q, k, v, **options, return_lse=True, backend="reference")
    return out, lse


@functools.cache
def errors(
    target: Target, dtype: torch.dtype, shape: Shape, everything: bool, seed: int = 0
) -> dict[str, Errors]:
    """The measure is the reference in the same dtype, torch's own operations."""
    q, k, v, lengths = cached_inputs(shape, dtype, seed)
    options = {"lengths": lengths} | (options_of(shape) if everything else {})
    with poisoned_memory(), target.active():
        mine = lmkern.cached_attention(q, k, v, **options, return_lse=True, backend=target.backend)
    theirs = lmkern.cached_attention(q, k, v, **options, return_lse=True, backend="reference")
    true = exact(q, k, v, **options)
    return {n: measure(*each) for n, *each in zip(("out", "lse"), mine, theirs, true, strict=True)}


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize(
    ("target", "dtype", "shape", "everything"),
    [case for case in each(KERNELS, SHAPES, (False, True), step=5) if case[1] in BUDGETED],
    ids=ids,
)
def test_errors_are_at_most_twice_torchs(
    target: Target, dtype: torch.dtype, shape: Shape, everything: bool
) -> None:
    found = verdicts(functools.partial(errors, target, dtype, shape, everything), target.units_beside)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("target", "dtype"), [(t, dtype) for t in KERNELS for dtype in BUDGETED if t.takes(dtype)], ids=ids
)
def test_errors_over_all_shapes_are_at_most_torchs(target: Target, dtype: torch.dtype) -> None:
    for everything in (False, True):
        shapes = target.some(SHAPES, 3)
        draws = [functools.partial(errors, target, dtype, shape, everything) for shape in shapes]
        assert not (found := mean_verdicts(draws, target.units_beside)), "\n".join(found)


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "options"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("target", [t for t in IN_FLOAT64 if t in KERNELS], ids=str)
def test_float64_agrees_with_the_reference(target: Target, shape: Shape, everything: bool) -> None:
    q, k, v, lengths = cached_inputs(shape, torch.float64)
    options = {"lengths": lengths} | (options_of(shape) if everything else {})
    with poisoned_memory(), target.active():
        mine = lmkern.cached_attention(q, k, v, **options, return_lse=True, backend=target.backend)
    for a, b in zip(mine, exact(q, k, v, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_lengths_it_is_causal_attention(shape: Shape) -> None:
    q, k, v, _ = cached_inputs(shape, torch.float64)
    expected = lmkern.attention(q, k, v, causal=True, return_lse=True, backend="reference")
    for backend in ("cpu", "reference"):
        mine = lmkern.cached_attention(q, k, v, return_lse=True, backend=backend)
        for a, b in zip(mine, expected, strict=True):
            torch.testing.assert_close(a, b)


def paged(cache: Tensor, page_size: int, spare: int = 3) -> tuple[Tensor, Tensor]:
    """A cache as pages in a random order, some never used and full of NaN; and its page table."""
    B, H, N, D = cache.shape
    count = -(-N // page_size)
    padded = torch.nn.functional.pad(cache, (0, 0, 0, count * page_size - N), value=float("nan"))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(B * count + spare, generator=generator, device="cpu")[: B * count].to(cache.device)
    pages = torch.full((B * count + spare, H, page_size, D), float("nan"), dtype=cache.dtype)
    pages[order] = padded.view(B, H, count, page_size, D).transpose(1, 2).flatten(0, 1)
    return pages, order.view(B, count).int()


@pytest.mark.parametrize(
    ("target", "dtype", "everything", "page_size"),
    each(TARGETS, (False, True), (1, 16, 100), step=10),
    ids=ids,
)
def test_pages_give_the_same_bits(
    target: Target, dtype: torch.dtype, everything: bool, page_size: int
) -> None:
    shape = Shape(3, 6, 3, 2, 300 if target.interpreted else 1200, 32)
    q, k, v, lengths = cached_inputs(shape, dtype)
    options = {"lengths": lengths} | (options_of(shape) if everything else {})
    (k_pages, table), (v_pages, _) = paged(k, page_size), paged(v, page_size)
    # Entries behind the keys in use may be anything.
    used = torch.arange(table.shape[1]) < (lengths[:, None] + page_size - 1) // page_size
    table = table.where(used, torch.tensor(-7, dtype=torch.int32))
    with target.active():
        whole = lmkern.cached_attention(q, k, v, **options, backend=target.backend)
        pieces = lmkern.cached_attention(
            q, k_pages, v_pages, page_table=table, **options, backend=target.backend
        )
    if target.backend == "reference":
        torch.testing.assert_close(pieces, whole)
    else:
        assert torch.equal(pieces, whole)


@pytest.mark.parametrize(
    ("target", "dtype", "D", "layout"),
    each(KERNELS, (32, 40), ("tokens_first", "columns", "every_second", "one_for_all"), step=5),
    ids=ids,
)
def test_every_layout_gives_the_same_bits(target: Target, dtype: torch.dtype, D: int, layout: str) -> None:
    q, k, v, lengths = cached_inputs(Shape(3, 4, 2, 3, 70, D), dtype)
    views = {
        "tokens_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "columns": lambda x: x.mT.contiguous().mT,
        "every_second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
        "one_for_all": lambda x: x[:, :1].expand(-1, x.shape[1], -1, -1),
    }
    laid_out = [views[layout](x) for x in (q, k, v)]
    with target.active(), poisoned_memory():
        options = {"lengths": lengths, "backend": target.backend}
        expected = lmkern.cached_attention(*(x.contiguous() for x in laid_out), **options)
        assert torch.equal(lmkern.cached_attention(*laid_out, **options), expected)


@pytest.mark.parametrize("window", [None, (100, None)], ids=["all", "window"])
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_memory_that_no_query_sees_is_not_read(target: Target, window: Any) -> None:
    q, k, v, lengths = cached_inputs(Shape(3, 4, 2, 2, 1100, 32))
    with target.active():
        options = {"lengths": lengths, "window": window, "backend": target.backend}
        expected = lmkern.cached_attention(q, k, v, **options)
        for b, length in enumerate(lengths.tolist()):
            for x in (k, v):
                x[b, :, length:] = float("nan")
                if window is not None:
                    x[b, :, : max(0, length - 2 - 100)] = float("inf")
        assert torch.equal(lmkern.cached_attention(q, k, v, **options), expected)
    assert expected.isfinite().all()
    assert not expected[2].any(), "a sequence without keys gives zeros"


@pytest.mark.parametrize("target", KERNELS, ids=str)
def test_bits_depend_neither_on_threads_nor_on_the_batch(target: Target) -> None:
    shape = Shape(3, 8, 2, 2, 600 if target.interpreted else 1800, 64)
    q, k, v, lengths = cached_inputs(shape, torch.bfloat16)
    lengths[2] = shape.N_max // 3 + 100
    with target.active():
        torch.set_num_threads(1)
        expected = lmkern.cached_attention(q, k, v, lengths=lengths, return_lse=True, backend=target.backend)
        torch.set_num_threads(2)
        again = lmkern.cached_attention(q, k, v, lengths=lengths, return_lse=True, backend=target.backend)
        assert all(map(torch.equal, again, expected))
        for b in range(3):
            one = slice(b, b + 1)
            # In a cache that ends elsewhere.
            caches = (x[one, :, : int(lengths[b]) + 5] for x in (k, v))
            alone = lmkern.cached_attention(
                q[one], *caches, lengths=lengths[one], return_lse=True, backend=target.backend
            )
            assert all(torch.equal(a, e[one]) for a, e in zip(alone, expected, strict=True))


@pytest.mark.parametrize("window", [None, (700, None)], ids=["all", "window"])
@pytest.mark.parametrize("target", [t for t in KERNELS if t.takes(torch.float32)], ids=str)
def test_many_ranges_of_heads_side_by_side_give_the_same_bits(target: Target, window: Any) -> None:
    q, k, v, lengths = cached_inputs(Shape(3, 6, 3, 2, 600 if target.interpreted else 1800, 16))
    side_by_side = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    with target.active(), poisoned_memory():
        options = {"lengths": lengths, "window": window, "return_lse": True, "backend": target.backend}
        expected = lmkern.cached_attention(q, k, v, **options)
        result = lmkern.cached_attention(q, *side_by_side, **options)
        assert all(map(torch.equal, result, expected))


@pytest.mark.parametrize("target", [t for t in KERNELS if t.takes(torch.float32)], ids=str)
def test_many_ranges_of_keys_are_one_softmax(target: Target) -> None:
    q, k, v, _ = cached_inputs(Shape(1, 1, 1, 1, 4500, 8))
    # The largest scores stand at the end, in ranges that are taken last.
    k[0, 0, 4300:] *= 3
    with target.active(), poisoned_memory():
        mine = lmkern.cached_attention(q, k, v, return_lse=True, backend=target.backend)
    for a, b in zip(mine, exact(q, k, v), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
def test_what_is_not_finite_reaches_the_queries_that_see_it(target: Target, value: float) -> None:
    q, k, v, _ = cached_inputs(Shape(2, 2, 2, 4, 40, 32))
    q = q.abs()
    k[0, 1, 38] = value
    with target.active():
        out = lmkern.cached_attention(q, k, v, backend=target.backend)
    # Queries stand at 36 to 39.
    reached = torch.zeros(2, 2, 4, dtype=torch.bool)
    reached[0, 1, 2:] = True
    assert torch.equal(out.isnan().any(-1), reached)


@pytest.mark.parametrize("target", IN_FLOAT32, ids=str)
@pytest.mark.parametrize("size", ["B", "H", "N_q", "N_max"])
def test_nothing_is_served(target: Target, size: str) -> None:
    sizes = {"B": 2, "H": 4, "H_kv": 2, "N_q": 3, "N_max": 5, "D": 8} | {size: 0}
    q, k, v, _ = cached_inputs(Shape(**sizes))
    with target.active(), poisoned_memory():
        out, lse = lmkern.cached_attention(q, k, v, return_lse=True, backend=target.backend)
    assert out.shape == q.shape and not out.any()
    assert (lse == -torch.inf).all()


def test_result_is_laid_out_as_q() -> None:
    q, k, v, _ = cached_inputs(Shape(2, 3, 3, 4, 9, 8))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert lmkern.cached_attention(q, k, v).stride() == q.stride()


REFUSED = [
    ({"k_cache": (2, 2, 9, 7)}, "one shape"),
    ({"k_cache": (2, 2, 9, 7), "v_cache": (2, 2, 9, 7)}, "share head_dim"),
    ({"k_cache": (2, 3, 9, 8), "v_cache": (2, 3, 9, 8)}, "multiple of the key/value heads"),
    ({"k_cache": (3, 2, 9, 8), "v_cache": (3, 2, 9, 8)}, "batch size unless a page_table"),
    ({"q": (4, 1, 8)}, r"must be \(B, H, N, D\)"),
    ({"lengths": torch.tensor([1])}, r"lengths must be \(B,\), B = 2"),
    ({"lengths": torch.tensor([1.0, 2.0])}, "int32 or int64"),
    ({"lengths": torch.tensor([10, 1])}, r"lengths must lie in \[0, 9\]; got 1 to 10"),
    ({"lengths": torch.tensor([-1, 1])}, r"lengths must lie in \[0, 9\]; got -1 to 1"),
    ({"lengths": torch.tensor([2**32 + 1, 1])}, r"lengths must lie in \[0, 9\]; got 1 to 4294967297"),
    ({"page_table": torch.tensor([[0], [2**32]])}, r"pages in \[0, 2\).*; got 4294967296 at \(1, 0\)"),
    ({"page_table": torch.tensor([[0], [2]])}, r"pages in \[0, 2\).*; got 2 at \(1, 0\)"),
    ({"page_table": torch.tensor([[-1], [0]])}, r"pages in \[0, 2\).*; got -1 at \(0, 0\)"),
    ({"page_table": torch.tensor([0, 1])}, r"page_table must be \(B, max_pages\)"),
    ({"softcap": -1.0}, "softcap must be above 0"),
    ({"window": (-1, None)}, "window must be"),
    ({"window": 5}, r"window must be \(left, right\).*; got 5"),
    ({"sinks": torch.zeros(3)}, r"sinks must be \(4,\)"),
    ({"alibi_slopes": torch.zeros(4, dtype=torch.int64)}, "alibi_slopes must be floating"),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_bad_calls_are_refused_by_name(changes: dict[str, Any], message: str, backend: str) -> None:
    arguments: dict[str, Any] = {
        "q": (2, 4, 1, 8),
        "k_cache": (2, 2, 9, 8),
        "v_cache": (2, 2, 9, 8),
    } | changes
    call = {
        name: torch.zeros(x) if isinstance(x, tuple) and name != "window" else x
        for name, x in arguments.items()
    }
    with pytest.raises(ValueError, match=f"cached_attention: .*{message}"):
        lmkern.cached_attention(**call, backend=backend)


def test_mixed_dtypes_and_a_wish_for_gradients_are_refused() -> None:
    q, k, v, _ = cached_inputs(SHAPES[1])
    with pytest.raises(ValueError, match="share one dtype"):
        lmkern.cached_attention(q, k.half(), v)
    with pytest.raises(ValueError, match=r"no gradient; call it under torch\.no_grad"):
        lmkern.cached_attention(q.requires_grad_(), k, v)
    for name in ("sinks", "alibi_slopes"):
        per_head = torch.zeros(q.shape[1], requires_grad=True)
        with pytest.raises(ValueError, match="there is no gradient"):
            lmkern.cached_attention(q.detach(), k, v, **{name: per_head})
    with torch.no_grad():
        assert not lmkern.cached_attention(q, k, v).requires_grad


def test_autocast_sets_the_dtype() -> None:
    q, k, v, _ = cached_inputs(SHAPES[1])
    with torch.autocast("cpu", torch.bfloat16):
        out = lmkern.cached_attention(q, k.bfloat16(), v.bfloat16())
    assert torch.equal(out, lmkern.cached_attention(*(x.bfloat16() for x in (q, k, v))))


# torch.compile uses parts of torch that torch deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_and_registered_give_the_same_bits() -> None:
    shape = Shape(2, 4, 2, 1, 100, 32)
    q, k, v, lengths = cached_inputs(shape)
    pages, table = paged(k, 16)
    arguments = (q, pages, pages, lengths, table, None, torch.zeros(4), 20, 0.1, 0.0, None)
    torch.library.opcheck(torch.ops.lmkern.cached_attention.default, arguments)

    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return lmkern.cached_attention(2 * q, k, v, lengths=lengths, window=(20, None)) * 2

    compiled = torch.compile(step, fullgraph=True)(q, k, v, lengths)
    assert torch.equal(compiled, step(q, k, v, lengths))
