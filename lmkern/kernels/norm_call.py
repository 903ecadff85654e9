"""What the norms in C++ share: one call into csrc/norm, packed as csrc/norm/params.hpp."""

from __future__ import annotations

import struct

from torch import Tensor

from lmkern.kernels import native, philox
from lmkern.kernels.cpu_call import DTYPE_CODES, on_huge_pages, pointer
from lmkern.kernels.statistics import statistics_dtype

# NormParams: 15 pointers; 5 strides, rows, columns, chunks; eps, offset, keep_scale; keep_threshold, seed,
# three dtypes, centred, threads.
PARAMS = struct.Struct("=15q 8q 3d 7q")

# Rows are summed for dweight and dbias in at most so many chunks of at least so many rows: a function of the
# shape alone, so that the result does not depend on the threads.
_MAX_CHUNKS = 64
_MIN_CHUNK_ROWS = 16


class Engine:
    """Where a call runs: here on the CPU."""

    def run(self, entry: str, packed: bytes, x: Tensor) -> None:
        """Calls an entry point of the compiled module. x: of the dtype that it computes in."""
        native.function(entry, x.dtype)(packed)

    def seed(self, seed: Tensor) -> int:
        """The field `seed` of params.hpp."""
        return int(seed)

    def chunks(self, h: Tensor) -> int:
        """In how many chunks the rows of h are summed for dweight and dbias."""
        return max(1, min(_MAX_CHUNKS, h.shape[0] // _MIN_CHUNK_ROWS))

    def counters(self, chunks: int, columns: int) -> int:
        """Elements of `partials` behind the sums of the chunks."""
        return 0


CPU = Engine()


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    centred: bool,
    offset: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    engine: Engine = CPU,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """y, h (None without a residual), mean (None unless centred) and rstd."""
    rows, columns = x.shape
    y = on_huge_pages(x.new_empty(rows, columns))
    h = None if residual is None else on_huge_pages(residual.new_empty(rows, columns))
    rstd = x.new_empty(rows, dtype=statistics_dtype(x))
    mean = rstd.new_empty(rows) if centred else None
    code = DTYPE_CODES[x.dtype]
    parameter = bias if weight is None else weight
    engine.run(
        "norm_forward",
        PARAMS.pack(
            x.data_ptr(),
            pointer(residual),
            pointer(weight),
            pointer(bias),
            y.data_ptr(),
            pointer(h),
            pointer(mean),
            rstd.data_ptr(),
            *(0,) * 7,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            *(0,) * 3,
            rows,
            columns,
            0,
            eps,
            offset,
            *_dropout(engine, dropout_p, seed),
            code,
            code if residual is None else DTYPE_CODES[residual.dtype],
            code if parameter is None else DTYPE_CODES[parameter.dtype],
            centred,
            native.threads(),
        ),
        x,
    )
    return y, h, mean, rstd


def backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    needs: tuple[bool, bool, bool, bool],
    offset: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    engine: Engine = CPU,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dresidual, dweight and dbias, where needed; dx has the dtype of dy, dresidual that of h."""
    rows, columns = h.shape
    dx = on_huge_pages(dy.new_empty(rows, columns)) if needs[0] else None
    dresidual = on_huge_pages(h.new_empty(rows, columns)) if needs[1] else None
    dweight = rstd.new_empty(columns) if needs[2] else None
    dbias = rstd.new_empty(columns) if needs[3] else None
    chunks = engine.chunks(h)
    partials = rstd.new_empty(chunks * 2 * columns + engine.counters(chunks, columns))
    code = DTYPE_CODES[dy.dtype]
    engine.run(
        "norm_backward",
        PARAMS.pack(
            0,
            0,
            pointer(weight),
            0,
            0,
            h.data_ptr(),
            pointer(mean),
            rstd.data_ptr(),
            dy.data_ptr(),
            pointer(dh),
            pointer(dx),
            pointer(dresidual),
            partials.data_ptr(),
            pointer(dweight),
            pointer(dbias),
            0,
            0,
            h.stride(0),
            dy.stride(0),
            0 if dh is None else dh.stride(0),
            rows,
            columns,
            chunks,
            0.0,
            offset,
            *_dropout(engine, dropout_p, seed),
            code,
            DTYPE_CODES[h.dtype],
            code if weight is None else DTYPE_CODES[weight.dtype],
            mean is not None,
            native.threads(),
        ),
        dy,
    )
    return dx, dresidual, dweight, dbias


def _dropout(engine: Engine, dropout_p: float, seed: Tensor | None) -> tuple[float, int, int]:
    """keep_scale, keep_threshold and seed."""
    if dropout_p == 0.0 or seed is None:
        return 1.0, 0, 0
    return philox.keep_scale(dropout_p), philox.threshold(dropout_p), engine.seed(seed)
