"""Triton's interpreter, made fast enough to test with."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any


@cache
def quicken() -> None:
    """Makes Triton's interpreter put its language in place once a launch, and not in every device function.

    Looking through the language for what it must replace takes milliseconds, and nearly all of its time. Where
    another version of Triton has other names nothing changes.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    original = getattr(interpreter, "_patch_lang", None)
    if original is None:
        return
    in_place: set[int] = set()

    @cache
    def languages(function: Any) -> frozenset[int]:
        return frozenset(
            id(value)
            for value in function.__globals__.values()
            if inspect.ismodule(value) and value in (tl, tl.core)
        )

    def patch_once(function: Any) -> Any:
        found = languages(function)
        if in_place and found <= in_place:
            return None
        outermost = not in_place
        in_place.update(found)
        scope = original(function)
        if outermost:
            restore = scope.restore

            def restore_and_forget() -> None:
                in_place.clear()
                restore()

            scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = patch_once
