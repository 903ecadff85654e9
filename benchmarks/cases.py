"""What is timed: the shapes of lmkern.testing and a few more, and the work that each is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lmkern.testing.shapes import (
    ATTENTION_BENCHMARK_SHAPES,
    LAYER_NORM_BENCHMARK_SHAPES,
    AttentionShape,
    LayerNormShape,
)

# Of a file of results; a change that benchmarks/report.py cannot read gets the next number.
FORMAT = 1
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Work:
    """One row of the results: what is computed, and how much of it.

    flops: multiplications and additions of the algorithm; what a kernel computes twice counts once.
    bytes: each input read once and each output written once.
    bound: the ceiling to hold it against, "matmul" or "copy".
    main: the row stands in README.md.
    """

    op: str
    direction: str
    shape: str
    dtype: str
    flops: int
    bytes: int
    bound: str
    main: bool


@dataclass(frozen=True)
class AttentionCase:
    """peaky: q is 64 times as large, so that one key has most of a softmax row to itself."""

    shape: AttentionShape
    peaky: bool = False
    main: bool = False

    def __str__(self) -> str:
        return f"{self.shape}{'-peaky' if self.peaky else ''}"

    def work(self, direction: str, dtype: torch.dtype) -> Work:
        """Forward: 2 matrix products over the scores that are seen; backward: 5."""
        B, H, N_q, D = self.shape.B, self.shape.H, self.shape.N_q, self.shape.D
        products, passes = {"forward": (2, 1), "backward": (5, 2)}[direction]
        flops = products * 2 * B * H * seen_scores(self.shape) * D
        queries, keys = B * H * N_q * D, B * self.shape.H_kv * self.shape.N_k * D
        # Forward: q, out, k, v, and lse written. Backward: q, out, dout, dq, k, v, dk, dv, and lse read.
        size = 2 * passes * (queries + keys) * dtype.itemsize + 4 * B * H * N_q
        return Work("attention", direction, str(self), dtype_name(dtype), flops, size, "matmul", self.main)


@dataclass(frozen=True)
class LayerNormCase:
    shape: LayerNormShape
    main: bool = False

    def __str__(self) -> str:
        return str(self.shape)

    def work(self, direction: str, dtype: torch.dtype) -> Work:
        """Per element: forward 7 operations, x read and y written; backward 13, x, dy read and dx written."""
        R, E = self.shape.R, self.shape.E
        operations, tensors, parameters = {"forward": (7, 2, 2), "backward": (13, 3, 3)}[direction]
        size = (tensors * R * E + parameters * E) * dtype.itemsize + 8 * R
        flops = operations * R * E
        return Work("layer_norm", direction, str(self), dtype_name(dtype), flops, size, "copy", self.main)


def seen_scores(shape: AttentionShape) -> int:
    """Elements of one head's score matrix that its mask leaves."""
    if shape.diagonal is None:
        return shape.N_q * shape.N_k
    return sum(min(max(i + shape.diagonal + 1, 0), shape.N_k) for i in range(shape.N_q))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


MAIN = (AttentionShape(4, 12, 1024, 64, 1024, 12, True), LayerNormShape(4096, 768))

ATTENTION = (
    *(AttentionCase(shape, main=str(shape) == str(MAIN[0])) for shape in ATTENTION_BENCHMARK_SHAPES),
    AttentionCase(AttentionShape(8, 12, 256, 64, 256, 12, True, "a small model's context")),
    AttentionCase(AttentionShape(1, 16, 2048, 128, 2048, 16, True, "head_dim 128")),
    AttentionCase(AttentionShape(1, 16, 2048, 128, 2048, 16, False, "head_dim 128 without a mask")),
    AttentionCase(AttentionShape(1, 8, 8192, 128, 8192, 8, True, "the longest sequence, a second a pass")),
    AttentionCase(MAIN[0], peaky=True),
    AttentionCase(AttentionShape(3, 5, 333, 80, 333, 5, True, "nothing is a power of two")),
)
LAYER_NORM = (
    *(LayerNormCase(shape, main=str(shape) == str(MAIN[1])) for shape in LAYER_NORM_BENCHMARK_SHAPES),
    LayerNormCase(LayerNormShape(16384, 1024, "far larger than every cache")),
    LayerNormCase(LayerNormShape(1000, 333, "nothing is a power of two")),
)

# For --quick: every path once, and no number worth reading.
QUICK_ATTENTION = (
    AttentionCase(AttentionShape(1, 4, 40, 16, 40, 2, True), main=True),
    AttentionCase(AttentionShape(1, 2, 1, 16, 40, 2, True)),
    AttentionCase(AttentionShape(1, 2, 33, 20, 33, 2, True), peaky=True),
)
QUICK_LAYER_NORM = (LayerNormCase(LayerNormShape(32, 48), main=True),)
