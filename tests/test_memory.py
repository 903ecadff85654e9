import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lmkern import memory
from lmkern.memory import keep_freed_memory
from lmkern.ops import embedding


@pytest.fixture(autouse=True)
def first_call() -> Iterator[None]:
    """Each test asks as if for the first time in the process."""
    keep_freed_memory.cache_clear()
    memory._madvise.cache_clear()
    yield
    keep_freed_memory.cache_clear()
    memory._madvise.cache_clear()


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
    # malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD; the first again once the heap has grown.
    assert [parameter for parameter, _ in told] == [-3, -1, -2, -3]
    assert told[-1] == (-3, 2**31 - 1)


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


def mapping_at(address: int) -> tuple[bool, bool]:
    """Whether huge pages are asked for there, and whether it is the heap: proc.rst of the kernel."""
    inside = heap = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        name, _, values = line.partition(" ")
        if "-" in name and not name.endswith(":"):
            start, end = (int(bound, 16) for bound in name.split("-"))
            inside, heap = start <= address < end, values.endswith("[heap]")
        elif inside and name == "VmFlags:":
            return "hg" in values.split(), heap
    raise LookupError(hex(address))


def mappings() -> list[tuple[bool, bool]]:
    """Of an output of a kernel, and under the policy of a tensor of torch's."""
    weight = torch.arange(16 * 4096, dtype=torch.float32).view(16, 4096)
    y = embedding(torch.arange(4096) % 16, weight, backend="cpu")
    assert y.equal(weight.repeat(256, 1))
    assert keep_freed_memory()
    block = torch.empty(100 * 2**20, dtype=torch.uint8)
    return [mapping_at(tensor.data_ptr() + tensor.nbytes // 2) for tensor in (y, block)]


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="this system has no huge pages to ask for, or another allocator",
)
@pytest.mark.parametrize(("setting", "asked"), [("1", True), ("0", False)])
def test_outputs_and_kept_memory_lie_on_huge_pages(setting: str, asked: bool) -> None:
    """In a process of its own: the policy cannot be undone."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", "from tests.test_memory import *; print(mappings())"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "LMKERN_HUGE_PAGES": setting},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([(asked, False), (asked, True)])


def test_only_whole_huge_pages_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(memory, "_madvise", lambda: lambda *call: asked.append(call))
    page = 2**21
    memory.prefer_huge_pages(page + 64, 3 * page)
    memory.prefer_huge_pages(page + 64, 2 * page - 65)
    memory.prefer_huge_pages(0, page)
    assert asked == [(2 * page, 2 * page, 14), (0, page, 14)]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ("always [madvise] never", "on request, and lmkern asks"),
        ("[always] madvise never", "everywhere"),
        ("always madvise [never]", "off (never)"),
    ],
)
def test_doctor_tells_what_the_system_gives(
    chosen: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_madvise", lambda: print)
    monkeypatch.setattr(memory, "_ENABLED", tmp_path / "enabled")
    assert memory.huge_pages() == "not in this kernel"
    (tmp_path / "enabled").write_text(chosen)
    assert memory.huge_pages() == words
