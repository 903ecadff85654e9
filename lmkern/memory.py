"""Pages under large tensors on a CPU: huge ones where the system gives them, and the allocator's policy for a
training run."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

# malloc.h: mallopt's parameters.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
# Above this size a block is still given back to the system at once.
_KEPT_BYTES = 2**31 - 1
# The top of the heap is never given back: a step's activations may be all of it, and more than 2 GiB.
_NEVER = -1
_TOP_PAD_BYTES = 64 * 2**20

# sys/mman.h
_MADV_HUGEPAGE = 14
# Of x86-64, and of ARM with pages of 4 KiB.
_HUGE_PAGE = 2**21
# From here on a block holds a whole huge page wherever it starts.
HUGE_BYTES = 2 * _HUGE_PAGE

_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def prefer_huge_pages(address: int, size: int) -> None:
    """Asks for huge pages under memory that is about to be written for the first time.

    Most distributions give them on request alone (`madvise`). 64 MiB are then written for the first time in
    8 ms instead of 24, and given back in 0.2 instead of 1.8. The huge pages that the block does not fill are
    left out, so no memory is held that is not written. Does nothing on systems other than Linux, or under
    LMKERN_HUGE_PAGES=0.
    """
    madvise = _madvise()
    first = -(-address // _HUGE_PAGE) * _HUGE_PAGE
    end = (address + size) // _HUGE_PAGE * _HUGE_PAGE
    if madvise is not None and first < end:
        # A refusal costs time alone: the pages are small.
        madvise(first, end - first, _MADV_HUGEPAGE)


def huge_pages() -> str:
    """Whether there are huge pages for large tensors, in words."""
    if _madvise() is None:
        return "off (LMKERN_HUGE_PAGES=0)" if sys.platform.startswith("linux") else "not on this system"
    try:
        enabled = _ENABLED.read_text(encoding="ascii")
    except OSError:
        return "not in this kernel"
    chosen = enabled.partition("[")[2].partition("]")[0]
    return {"always": "everywhere", "madvise": "on request, and lmkern asks", "never": "off (never)"}.get(
        chosen, enabled.strip()
    )


@cache
def keep_freed_memory() -> bool:
    """Tells glibc to keep large freed blocks, on huge pages; once a process, and for all of it.

    By default a large tensor gets fresh pages from the system each time, and the page faults of writing them
    cost more than most memory-bound ops. Every step of a training run asks for the
    same blocks again. Returns whether the allocator took it: False on systems other than Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    options = (
        (_M_MMAP_THRESHOLD, _NEVER),
        (_M_TRIM_THRESHOLD, _NEVER),
        (_M_TOP_PAD, _TOP_PAD_BYTES),
    )
    if not all(mallopt(parameter, size) == 1 for parameter, size in options):
        return False
    _grow_heap()
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES) == 1)


def _grow_heap() -> None:
    """Heap for three quarters of the machine's memory, on huge pages; it takes none before it is written.

    A heap that grows bit by bit would have to be advised after each step, by whoever made it grow.
    """
    if _madvise() is None:
        return
    from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap  # Windows has no such names

    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4
    try:
        # Where the system would refuse so much, malloc is not asked: it would leave the heap for good.
        mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS).close()
    except OSError:
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    block = libc.malloc(size)
    if block is not None:
        prefer_huge_pages(block, size)
        libc.free(block)


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux") or os.environ.get("LMKERN_HUGE_PAGES") == "0":
        return None
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise
