"""What every CUDA kernel's Python half shares: the compiled module, and why it cannot take a call."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from lmkern.kernels import native
from lmkern.kernels.backends import Call

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The oldest that csrc/cuda.cmake compiles for.
_COMPUTE_CAPABILITY = (8, 0)


@cache
def module() -> ModuleType:
    """lmkern._cuda. RuntimeError when nothing can run there."""
    if reason := unavailable():
        raise RuntimeError(f"lmkern: the CUDA kernels: {reason}")
    return importlib.import_module("lmkern._cuda")


@cache
def unavailable() -> str | None:
    """Why no CUDA kernel can run on this machine, in words; None when one can."""
    if failure := native.build_failure("cuda"):
        return f"was not built: {failure}"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU; this torch is for ROCm"
    no_gpu = None if torch.cuda.is_available() else "needs an NVIDIA GPU and none is visible"
    try:
        compiled = importlib.import_module("lmkern._cuda")
    except ImportError as error:
        how = f"was not built ({error}): LMKERN_CUDA=1 pip install -e . does it where nvcc is on the PATH"
        return f"{no_gpu}; {how}" if no_gpu else how
    if no_gpu:
        return no_gpu
    # Any driver of the same major version runs the machine code; an older one does not.
    driver, runtime = compiled.driver_version(), compiled.runtime_version()
    if driver // 1000 < runtime // 1000:
        return (
            f"was built with CUDA {_version(runtime)} and the driver takes CUDA {_version(driver)}; "
            "update the driver, or build with an older nvcc"
        )
    return None


def unsupported(
    call: Call, run_on_hardware: str | None, *, exactly: tuple[int, int] | None = None
) -> str | None:
    """The reasons that hold for every op.

    run_on_hardware: the GPU on which the op's kernel has passed its tests. None: it is taken by name only.
    exactly: the only compute capability that it is compiled for. None: 8.0 and later.
    """
    if reason := unavailable():
        return reason
    for name, tensor in call.tensors.items():
        if tensor is None:
            continue
        if tensor.device.type != "cuda":
            return f"needs tensors on a GPU; {name} is on {tensor.device}"
        if tensor.dtype not in DTYPES:
            return (
                f"takes float32, bfloat16 and float16; {name} is {str(tensor.dtype).removeprefix('torch.')}"
            )
        if reason := _another(tensor.device, exactly):
            return reason
    if run_on_hardware is None and call.backend != "cuda":
        return note(run_on_hardware)
    return None


def note(run_on_hardware: str | None) -> str:
    """What `lmkern doctor` says of a kernel that can run here."""
    if run_on_hardware is None:
        return "has not been run on a GPU yet; ask for backend='cuda' by name to try it"
    return f"passed its tests on {run_on_hardware}"


def device_and_stream(x: Tensor) -> tuple[int, int]:
    """The `device` and `stream` fields of a params.hpp: x's GPU, and torch's current stream there."""
    stream = torch.cuda.current_stream(x.device)
    return stream.device_index, stream.cuda_stream


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _another(device: torch.device, exactly: tuple[int, int] | None) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability == exactly or (exactly is None and capability >= _COMPUTE_CAPABILITY):
        return None
    needed, here = (".".join(map(str, version)) for version in (exactly or _COMPUTE_CAPABILITY, capability))
    return f"needs compute capability {needed}; {torch.cuda.get_device_name(device)} has {here}"


def _version(code: int) -> str:
    """12040, as the CUDA runtime gives it, as 12.4."""
    return f"{code // 1000}.{code % 1000 // 10}"
