"""Triton kernels compiled as real calls ask for them, on a machine without a GPU.

Within `recording` the ops' launches go through Triton's own specialisation and compiler for the architecture
that is named, and stop before the launch: tensors may be small and on the CPU, and their contents mean
nothing. Needs a process in which TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

from lmkern.kernels import triton_runtime, tuning

_numbers = count()


@dataclass(frozen=True)
class Launch:
    """One launch that an op asked for.

    key: two launches of one key are served by one compilation. compiled: Triton's CompiledKernel; None where
    only keys are recorded, or with an error in words.
    """

    kernel: str
    key: str
    compiled: Any = None
    error: str = ""


class Driver:
    """What Triton asks of a driver before a launch."""

    def __init__(self, architecture: str, device: str = "") -> None:
        self.architecture = architecture
        self.device = device or architecture

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        if self.architecture.startswith("sm_"):
            return GPUTarget("cuda", int(self.architecture.removeprefix("sm_")), 32)
        return GPUTarget("hip", self.architecture, 64 if self.architecture.startswith("gfx9") else 32)


@contextmanager
def recording(architecture: str, *, compiled: bool) -> Iterator[list[Launch]]:
    """Collects the launches of explicit Triton calls within it, compiled or their keys alone.

    An error of the compiler is recorded, not raised.
    """
    import triton
    from triton import knobs
    from triton.runtime.driver import driver

    launches: list[Launch] = []
    keys: list[str] = []

    def note_key(*, key: str, **_: Any) -> bool:
        keys.append(str(key))
        return not compiled  # True: not to be compiled

    original = triton.JITFunction.run

    def run(kernel: Any, *arguments: Any, **options: Any) -> None:
        keys.clear()
        name = f"{kernel.fn.__module__.removeprefix('lmkern.kernels.')}.{kernel.fn.__name__}"
        options["warmup"] = True
        try:
            result = original(kernel, *arguments, **options)
        # Whatever the compiler raises is a finding about this kernel.
        except Exception as error:
            launches.append(Launch(name, "".join(keys), error=f"{type(error).__name__}: {error}"))
            return
        # Without a new key it is one that was compiled before.
        key = keys[0] if keys else str(result.hash)
        launches.append(Launch(name, key, result))

    with (
        tuning.assume(architecture),
        mock.patch.object(triton_runtime, "unavailable", return_value=None),
        mock.patch.object(triton_runtime, "unsupported", return_value=None),
        mock.patch.object(triton.JITFunction, "run", run),
        mock.patch.object(knobs.runtime, "jit_cache_hook", note_key),
        mock.patch.object(driver, "_active", Driver(architecture)),
        mock.patch("torch.version.hip", None if architecture.startswith("sm_") else "offline"),
    ):
        yield launches


@contextmanager
def launching(architecture: str, launcher: Callable[..., None]) -> Iterator[None]:
    """Launches of explicit Triton calls within it do all that the host does, and end in `launcher`.

    It is called as Triton's launchers are, after the compiled kernel: with the grid, the stream, what names
    the function, hooks, and the arguments. Nothing is compiled.
    """
    import triton
    from triton.runtime.driver import driver

    def compile(src: Any, **_: Any) -> Any:
        # Triton's own, with its handles in place.
        compiled = object.__new__(triton.compiler.CompiledKernel)
        compiled.src, compiled.name, compiled.metadata, compiled.packed_metadata = (
            src,
            src.fn.__name__,
            None,
            None,
        )
        compiled.module = compiled.function = compiled
        compiled._run = partial(launcher, compiled)
        return compiled

    # As quick as what it stands for: time may be taken within.
    def no_reason(*_: Any) -> None:
        return None

    # A device of its own: what is kept for one is not what a compiler made.
    device = Driver(architecture, f"{architecture}, launched {next(_numbers)}")
    with (
        tuning.assume(architecture),
        mock.patch.object(triton_runtime, "unavailable", no_reason),
        mock.patch.object(triton_runtime, "_unfit", no_reason),
        mock.patch.object(triton.compiler, "compile", compile),
        mock.patch.object(driver, "_active", device),
        mock.patch("torch.version.hip", None if architecture.startswith("sm_") else "offline"),
    ):
        yield


def report(launch: Launch) -> dict[str, Any]:
    """What the compiler says of a launch, as JSON can hold it.

    kernel, error; and without an error: constants, shared (bytes a program), dots (the products of its IR, a
    line each), instructions (those of PTX that matter here), stack (bytes a thread spills, and keeps
    besides), spills_in_loops (loads and stores of them between a backward branch and its target).
    """
    found: dict[str, Any] = {"kernel": launch.kernel, "error": launch.error}
    if launch.compiled is None:
        return found
    kernel = launch.compiled
    names = kernel.src.fn.arg_names
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items()}
    constants |= {name: getattr(kernel.metadata, name) for name in ("num_warps", "num_stages")}
    found |= {
        "constants": {name: value for name, value in constants.items() if not name.startswith("stride")},
        "shared": kernel.metadata.shared,
        "dots": re.findall(r"tt\.dot(?:_scaled)? .*", kernel.asm["ttir"]),
    }
    if "ptx" in kernel.asm:
        found["instructions"] = [
            word for word in ("wgmma", "tcgen05", "mma.sync") if word in kernel.asm["ptx"]
        ]
        found |= _stack(kernel.asm["cubin"])
    return found


def _stack(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        stack = max(
            int(stack) + int(local) for stack, local in re.findall(r"STACK:(\d+).*?LOCAL:(\d+)", usage)
        )
        spills = spills_in_loops(_cuobjdump("--dump-sass", file.name)) if stack else 0
    return {"stack": stack, "spills_in_loops": spills}


def spills_in_loops(sass: str) -> int:
    """Loads and stores of local memory that stand between a backward branch and its target."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", sass)
    local = [int(place, 16) for place, name, _ in lines if name.startswith(("LDL", "STL"))]
    loops = []
    for place, name, operands in lines:
        if name.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", operands)):
            loops.append((int(target[1], 16), int(place, 16)))
    return sum(any(start <= place < end for start, end in loops) for place in local)


def _cuobjdump(*arguments: str) -> str:
    return subprocess.run([_cuobjdump_path(), *arguments], capture_output=True, text=True, check=True).stdout


@cache
def _cuobjdump_path() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
