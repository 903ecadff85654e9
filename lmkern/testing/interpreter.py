"""Triton's interpreter, made fast enough to test with."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any
from unittest import mock


@cache
def quicken() -> None:
    """Makes Triton's interpreter put its language in place once, and not at every launch and device function.

    Looking through the language for what it must replace takes milliseconds, and most of its time on tensors
    as small as a test's. Where another version of Triton has other names nothing changes.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    original = getattr(interpreter, "_patch_lang", None)
    if original is None:
        return
    in_place: set[int] = set()
    # What a launch calls to take the language out again.
    nothing = mock.Mock(spec=["restore"])

    @cache
    def languages(function: Any) -> frozenset[int]:
        modules = (value for value in function.__globals__.values() if inspect.ismodule(value))
        return frozenset(id(module) for module in modules if module in (tl, tl.core))

    def patch_once(function: Any) -> Any:
        found = languages(function)
        if not found <= in_place:
            original(function)
            in_place.update(found)
        return nothing

    interpreter._patch_lang = patch_once
