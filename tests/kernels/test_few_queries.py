"""Few queries over many keys: attention's backends hand them to cached attention's of the same name."""

import contextlib
import dataclasses
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

import lmkern
from lmkern.kernels import cuda_call
from lmkern.kernels.attention import Options, cuda
from lmkern.kernels.attention.few_queries import as_cache
from lmkern.kernels.backends import Call
from lmkern.kernels.cached_attention import cpu as cached_on_cpu
from lmkern.nn import KeyValueCache, SelfAttention
from lmkern.testing import Target, targets

TARGETS = [target for target in targets("attention") if target.backend in ("cpu", "triton")]
CAUSAL = Options(0.3, right=0)


def tensors(queries: int, keys: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, 4, n, 16, device=device) for n in (queries, keys, keys))


@pytest.mark.parametrize(
    ("queries", "keys", "few"),
    [(1, 31, False), (1, 32, True), (3, 95, False), (3, 96, True), (8, 256, True), (9, 1000, False)],
)
def test_few_and_many_are_counted_together(queries: int, keys: int, few: bool) -> None:
    q, k, _ = tensors(queries, keys)
    assert (as_cache(q, k, CAUSAL) is not None) == few


@pytest.mark.parametrize(
    "change",
    [
        {"bias": torch.zeros(1, 1, 1, 1)},
        {"mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)},
        {"relative_bias": torch.zeros(1, 999)},
        {"dropout_p": 0.5},
        {"cu_seqlens_q": torch.tensor([0, 1])},
        {"top_left": True},
        {"right": None},
        {"right": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_cached_attention_does_not_do_is_left(change: dict[str, object]) -> None:
    q, k, _ = tensors(2, 100)
    assert as_cache(q, k, CAUSAL) is not None
    assert as_cache(q, k, dataclasses.replace(CAUSAL, **change)) is None


def test_one_query_sees_all_keys_or_a_window_of_them() -> None:
    q, k, _ = tensors(1, 100)
    assert as_cache(q, k, Options(0.3)) is not None
    windowed = as_cache(q, k, Options(0.3, left=9))
    assert windowed is not None
    assert windowed.left == 9


@pytest.mark.parametrize(("queries", "window"), [(1, None), (1, (30, None)), (4, None), (4, (100, 0))])
@pytest.mark.parametrize(
    ("target", "dtype"),
    [(t, d) for t in TARGETS for d in t.some((torch.bfloat16, torch.float32), 2) if t.takes(d)],
    ids=str,
)
def test_the_bits_are_those_of_cached_attention(
    target: Target, dtype: torch.dtype, queries: int, window: tuple[int, int | None] | None
) -> None:
    q, k, v = (x.to(dtype) for x in tensors(queries, 130, target.device))
    sinks = torch.randn(4, device=target.device)
    options = {"window": window, "softcap": 2.0, "sinks": sinks, "return_lse": True}
    with target.active():
        whole = lmkern.attention(q, k, v, causal=True, **options, backend=target.backend)
        cached = lmkern.cached_attention(q, k, v, **options, backend=target.backend)
    for ours, theirs in zip(whole, cached, strict=True):
        assert torch.equal(ours, theirs)


@contextlib.contextmanager
def counted() -> Iterator[mock.Mock]:
    with mock.patch.object(cached_on_cpu, "forward", wraps=cached_on_cpu.forward) as calls:
        yield calls


@torch.no_grad()
def test_a_step_of_generation_is_one_of_them() -> None:
    attention, cache = SelfAttention(32, 2), KeyValueCache(1, 64)
    with counted() as calls:
        attention(torch.randn(1, 40, 32), cache=cache)
        assert not calls.called
        attention(torch.randn(1, 1, 32), cache=cache)
        assert calls.call_count == 1


@torch.no_grad()
def test_so_it_is_in_transformers_models() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from lmkern.huggingface.attention import lmkern_attention

    with counted() as calls:
        lmkern_attention(torch.nn.Module(), *tensors(1, 40), None)
        assert calls.call_count == 1


def test_an_automatic_choice_leaves_them_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(cuda_call, "unsupported", lambda *_, **__: None)
    q, k, v = (x.half() for x in tensors(1, 100))

    def reason(backend: str | None, options: Options) -> str | None:
        return cuda.unsupported(Call("attention", {"q": q, "k": k, "v": v}, {"options": options}, backend))

    assert "few queries" in str(reason(None, CAUSAL))
    assert reason("cuda", CAUSAL) is None
    assert reason(None, Options(0.3, left=3, right=3)) is None
