"""What the norms on NVIDIA GPUs share: calls into csrc/norm/cuda_*.cu, packed as csrc/norm/cuda.hpp."""

from __future__ import annotations

import struct
from functools import partial

from torch import Tensor

from lmkern.kernels import cuda_call, norm_call
from lmkern.kernels.backends import Call

__all__ = ["NOTE", "RUN_ON_HARDWARE", "backward", "forward", "unavailable", "unsupported"]

# The GPU on which these kernels passed tests/kernels/test_cuda_norm.py, and the commit of the benchmark
# result that shows them beside Triton's. None: nobody has run them, and an automatic choice leaves them out.
RUN_ON_HARDWARE: str | None = None

NOTE = cuda_call.note(RUN_ON_HARDWARE)

# CudaNormParams, after NormParams: device, stream.
_MORE = struct.Struct("=2q")

# Columns are counted in 32 bits, with room for a step of a block beyond the last.
_MAX_WIDTH = 2**30

# Chunks of rows: a block of up to 512 threads with up to 128 registers each fills a processor; fewer if a
# chunk would have less than so many rows. A row that is wider than a block holds is shared out among 2, 4 or
# more of them.
_MIN_CHUNK_ROWS = 4
_WIDTH_OF_BLOCK = 8192

# kGroup of csrc/norm/cuda_backward.cu; the parts of the columns that have counters of their own are the
# blocks of a cluster, or kColumnThreads columns and more.
_GROUP, _MAX_CLUSTER, _PART_WIDTH = 16, 16, 128


class _Engine(norm_call.Engine):
    def run(self, entry: str, packed: bytes, x: Tensor) -> None:
        getattr(cuda_call.module(), entry)(packed + _MORE.pack(*cuda_call.device_and_stream(x)))

    def seed(self, seed: Tensor) -> int:
        # Read by the kernel: its value is not known here without waiting for the GPU.
        return seed.data_ptr()

    def chunks(self, h: Tensor) -> int:
        rows, columns = h.shape
        blocks = -(-columns // _WIDTH_OF_BLOCK)
        most = cuda_call.processors(h.device) // (1 << (blocks - 1).bit_length())
        return max(1, min(most, rows // _MIN_CHUNK_ROWS))

    def counters(self, chunks: int, columns: int) -> int:
        return max(_MAX_CLUSTER, -(-columns // _PART_WIDTH)) * (-(-chunks // _GROUP) + 1)


forward = partial(norm_call.forward, engine=_Engine())
backward = partial(norm_call.backward, engine=_Engine())


def unavailable() -> str | None:
    if reason := cuda_call.unavailable():
        return reason if RUN_ON_HARDWARE else f"{reason}; its kernels have not been run on a GPU yet"
    return None


def unsupported(call: Call) -> str | None:
    if reason := cuda_call.unsupported(call, RUN_ON_HARDWARE):
        return reason
    x, weight, bias = (call.tensors.get(name) for name in ("x", "weight", "bias"))
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        return f"takes weight and bias of one dtype; got {weight.dtype} and {bias.dtype}"
    if x is not None and not 1 <= x.shape[1] <= _MAX_WIDTH:
        return f"takes rows of 1 to 2^30 elements; got {x.shape[1]}"
    return None
