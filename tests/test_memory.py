import ctypes
import platform
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from lmkern.memory import keep_freed_memory


@pytest.fixture(autouse=True)
def first_call() -> Iterator[None]:
    """Each test asks as if for the first time in the process."""
    keep_freed_memory.cache_clear()
    yield
    keep_freed_memory.cache_clear()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the policy is glibc's")
def test_glibc_takes_it_and_a_second_call_changes_nothing() -> None:
    assert keep_freed_memory() is True
    assert keep_freed_memory() is True


def test_allocator_is_told_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []

    def mallopt(parameter: int, size: int) -> int:
        told.append((parameter, size))
        return 1

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    assert keep_freed_memory()
    assert keep_freed_memory()
    # malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD.
    assert [parameter for parameter, _ in told] == [-3, -1, -2]


def test_other_systems_and_other_allocators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        assert keep_freed_memory() is False
    keep_freed_memory.cache_clear()
    monkeypatch.setattr(sys, "platform", "linux")
    # musl has no mallopt.
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert keep_freed_memory() is False


def test_refusal_of_the_allocator_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda parameter, size: 0))
    assert keep_freed_memory() is False
