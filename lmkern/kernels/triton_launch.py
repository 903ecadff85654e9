"""Launches of Triton kernels that cost the host little.

Before each launch Triton binds the arguments, looks at each, writes the options out and looks the text up:
half of what a small call costs the host. Here a kernel keeps what Triton compiled, under all that Triton
compiles for, and hands later arguments to it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import repeat
from typing import Any

import triton

# Versions whose ways `Kernel` knows. Any other makes all launches itself.
KNOWN = triton.__version__.startswith(("3.6.", "3.7."))
if KNOWN:
    from triton import knobs
    from triton.compiler import CompiledKernel
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction, native_specialize_impl


def kernel(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """triton.jit, with its options, for a kernel that is launched from Python."""
    if function is None:
        return lambda function: Kernel(triton.jit(**options)(function))
    return Kernel(triton.jit(function))


class Kernel:
    """A kernel, launched as Triton's are: kernel[grid](*arguments, **constants).

    arguments: all but the compile-time ones, in their order. constants: compile-time arguments and launch
    options. The device is the current one.

    Triton compiles for the device, the constants, its own switches, and what it makes of each argument: its
    type, and unless that is switched off, whether it is 1 or a multiple of 16. `native_specialize_impl` says
    the latter, and Triton asks it too, so that both tell the same launches apart. A kernel's global constants
    are taken not to change.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
        # None: every launch is Triton's own, as in its interpreter.
        self.flags: list[list[bool]] | None = None
        if KNOWN and isinstance(function, JITFunction):
            arguments = [x for x in function.params if not x.is_constexpr]
            self.flags = [
                [x.is_const for x in arguments],
                [not x.do_not_specialize for x in arguments],
                [not x.do_not_specialize_on_alignment for x in arguments],
            ]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> Any:
        """The compiled kernel; None under Triton's interpreter."""
        if self.flags is None or self._watched():
            return self.function[grid](*arguments, **constants)
        device = driver.active.get_current_device()
        backend = self.function.device_caches[device][3]
        key = (
            device, knobs.runtime.debug, knobs.compilation.instrumentation_mode, *constants.items(),
            *map(native_specialize_impl, repeat(backend), arguments, *self.flags),
        )  # fmt: skip
        found = self.compiled.get(key)
        if found is None:
            if len(arguments) != len(self.flags[0]):
                raise TypeError(f"{self.function}: give compile-time arguments, and them alone, by name")
            compiled = self.function[grid](*arguments, **constants)
            # Neither what a test or a hook returns in its place, nor what is still being compiled.
            if isinstance(compiled, CompiledKernel):
                self.compiled[key] = compiled, self._rest(len(arguments), constants)
            return compiled
        compiled, rest = found
        x, y, z, *_ = (*grid, 1, 1)
        stream = driver.active.get_current_stream(device)
        # None: what hooks are told, and the hooks.
        compiled.run(
            x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *rest
        )
        return compiled

    def _rest(self, given: int, constants: dict[str, Any]) -> tuple[Any, ...]:
        """The compile-time arguments in their order, which the launcher counts and does not read."""
        return tuple(constants.get(x.name, x.default) for x in self.function.params[given:])

    def _watched(self) -> bool:
        """Whether a hook is to be called at a launch, or changes what is compiled."""
        runtime = knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        # None, one function, or a chain of them.
        return bool(
            getattr(enter, "calls", enter)
            or getattr(leave, "calls", leave)
            or runtime.add_stages_inspection_hook
            or self.function.pre_run_hooks
        )
