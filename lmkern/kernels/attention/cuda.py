"""Attention on Hopper GPUs: csrc/attention/cuda_*.cu, called through csrc/attention/cuda.hpp."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from lmkern.kernels import cuda_call
from lmkern.kernels.attention import Options
from lmkern.kernels.attention.cpu import pack
from lmkern.kernels.attention.few_queries import as_cache
from lmkern.kernels.backends import Call
from lmkern.kernels.cpu_call import pointer

__all__ = ["NOTE", "RUN_ON_HARDWARE", "backward", "forward", "unavailable", "unsupported"]

# The GPU on which these kernels passed tests/kernels/test_cuda_attention.py. None: nobody has run them, and
# an automatic choice leaves them out.
RUN_ON_HARDWARE: str | None = None

NOTE = cuda_call.note(RUN_ON_HARDWARE)

MAX_HEAD_DIM = 256

# Tokens and keys are counted in 32 bits, with room for a tile; a grid has at most 65,535 heads and sequences.
_MAX_LENGTH, _MAX_GRID = 2**30, 65_535

# kQueries of csrc/attention/cuda_backward_parts.hpp, and the head_dims that with_tile pads to.
_QUERIES, _TILE_COLUMNS = 64, (64, 128, 256)

# CudaAttentionParams, after AttentionParams: delta, dq_sum, turns; processors, device, stream.
_MORE = struct.Struct("=3q 3q")


def unavailable() -> str | None:
    if reason := cuda_call.unavailable():
        return reason if RUN_ON_HARDWARE else f"{reason}; its kernels have not been run on a GPU yet"
    if not hasattr(cuda_call.module(), "attention_forward"):
        return "was built by an nvcc before 12.0, which cannot compile it; build with a newer one"
    return None


def unsupported(call: Call) -> str | None:
    if reason := unavailable() or cuda_call.unsupported(call, RUN_ON_HARDWARE, exactly=(9, 0)):
        return reason
    q, k = call.tensors["q"], call.tensors["k"]
    if q is None or k is None:
        return None
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16; q is {str(q.dtype).removeprefix('torch.')}"
    if q.shape[3] % 8 or q.shape[3] > MAX_HEAD_DIM:
        return f"takes multiples of 8 up to {MAX_HEAD_DIM} as head_dim; got {q.shape[3]}"
    if max(q.shape[2], k.shape[2]) > _MAX_LENGTH or max(q.shape[:2]) > _MAX_GRID:
        return f"takes up to 2^30 tokens and {_MAX_GRID} heads and sequences; got q {tuple(q.shape)}"
    for name, tensor in call.tensors.items():
        if tensor is not None and not _copyable(tensor):
            return f"takes starts and strides of 16 bytes and neighbouring columns; {name} has others"
    options: Options | None = call.options.get("options")
    if options is None:
        return None
    if call.backend is None and as_cache(q, k, options) is not None:
        return (
            "has tiles of many queries; few queries over many keys are cached attention's, which is Triton's"
        )
    return _not_taken(options)


def _not_taken(options: Options) -> str | None:
    features = {
        "softcap": options.softcap or None,
        "dropout": options.dropout_p or None,
        "bias": options.bias,
        "mask": options.mask,
        "relative_bias": options.relative_bias,
        "sinks": options.sinks,
        "a softmax_scale that is not positive": None if options.softmax_scale > 0 else True,
    }
    if options.cu_seqlens_q is not None and options.cu_seqlens_q.numel() - 1 > _MAX_GRID:
        return f"takes up to {_MAX_GRID} documents; got {options.cu_seqlens_q.numel() - 1}"
    given = [name for name, value in features.items() if value is not None]
    return f"does not take {' and '.join(given)}" if given else None


def _copyable(x: Tensor) -> bool:
    """Whether the copy engine can read it: the start and, where there is more than one, the distances."""
    distances = zip(x.shape[:3], x.stride()[:3], strict=True)
    return (
        x.data_ptr() % 16 == 0
        and (x.stride(3) == 1 or x.shape[3] == 1)
        and all(
            size <= 1 or (stride > 0 and stride * x.element_size() % 16 == 0) for size, stride in distances
        )
    )


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    cuda_call.module().attention_forward(pack(options, q, k, v, out, lse) + _more(q))
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    options: Options,
    *,
    needs: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
    dq, dk, dv = (torch.empty_like(x) if need else None for x, need in zip((q, k, v), needs[:3], strict=True))
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    dq_sum = turns = None
    if dq is not None:
        # What blocks_of_head in csrc/attention/tile_schedule.hpp counts.
        blocks = -(-q.shape[2] // _QUERIES)
        if options.cu_seqlens_q is not None:
            blocks = q.shape[2] // _QUERIES + options.cu_seqlens_q.numel() - 1
        blocks *= q.shape[0] * q.shape[1]
        dq_sum = lse.new_zeros(blocks * _QUERIES * next(D for D in _TILE_COLUMNS if q.shape[3] <= D))
        turns = torch.zeros(blocks, dtype=torch.int32, device=q.device)
    # Contiguous is not enough: it may begin anywhere.
    dout = dout if _copyable(dout) else dout.clone(memory_format=torch.contiguous_format)
    dlse = None if dlse is None else dlse.contiguous()
    packed = pack(options, q, k, v, out, lse, dout, dlse, dq, dk, dv)
    cuda_call.module().attention_backward(packed + _more(q, delta, dq_sum, turns))
    return dq, dk, dv, None, None, None


def _more(
    q: Tensor, delta: Tensor | None = None, dq_sum: Tensor | None = None, turns: Tensor | None = None
) -> bytes:
    pointers = (pointer(x) for x in (delta, dq_sum, turns))
    return _MORE.pack(*pointers, cuda_call.processors(q.device), *cuda_call.device_and_stream(q))
