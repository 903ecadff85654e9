"""The allocator's policy for a training run on a CPU."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

# malloc.h: mallopt's parameters.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
# Above this size a block is still given back to the system at once.
_KEPT_BYTES = 2**31 - 1
# The top of the heap is never given back: a step's activations may be all of it, and more than 2 GiB.
_NEVER = -1
_TOP_PAD_BYTES = 64 * 2**20


@cache
def keep_freed_memory() -> bool:
    """Tells glibc to keep large freed blocks for the next step; once a process, and for all of it.

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
        (_M_MMAP_THRESHOLD, _KEPT_BYTES),
        (_M_TRIM_THRESHOLD, _NEVER),
        (_M_TOP_PAD, _TOP_PAD_BYTES),
    )
    return all(mallopt(parameter, size) == 1 for parameter, size in options)
