"""What a backend says that torch's own operations make up, which run wherever tensors do."""

from __future__ import annotations

from lmkern.kernels.backends import Call


def unavailable() -> str | None:
    return None


def unsupported(call: Call) -> str | None:
    return None
