"""Layer norm on GPUs through Triton: lmkern/kernels/norm_triton.py."""

from __future__ import annotations

from functools import partial

from lmkern.kernels import norm_triton
from lmkern.kernels.layer_norm import cpu
from lmkern.kernels.norm_triton import NOTE, unavailable, unsupported

__all__ = ["NOTE", "backward", "forward", "unavailable", "unsupported"]

forward = partial(cpu.forward, family=norm_triton)
backward = partial(cpu.backward, family=norm_triton)
