"""RMS norm on NVIDIA GPUs: csrc/norm/cuda_*.cu."""

from __future__ import annotations

from functools import partial

from lmkern.kernels import norm_cuda
from lmkern.kernels.norm_cuda import NOTE, unavailable, unsupported
from lmkern.kernels.rms_norm import cpu

__all__ = ["NOTE", "backward", "forward", "unavailable", "unsupported"]

forward = partial(cpu.forward, family=norm_cuda)
backward = partial(cpu.backward, family=norm_cuda)
