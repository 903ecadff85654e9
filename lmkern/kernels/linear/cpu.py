"""Linear on the CPU: few rows by csrc/linear/cpu_forward.cpp, called through csrc/linear/params.hpp; 16 bits
in float32 where torch has no fast product of them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from lmkern.kernels import cpu_call, native, widened
from lmkern.kernels.backends import Call
from lmkern.kernels.cpu_call import DTYPE_CODES, pointer, torch_multiplies, unavailable
from lmkern.kernels.linear import MOST_ROWS

__all__ = ["backward", "forward", "unavailable", "unsupported"]

# LinearParams: 4 pointers; x_stride, weight_stride, rows, outputs, inputs, dtype, threads.
_PARAMS = struct.Struct("=4q 7q")

# Up to so many elements of x, too, torch's product is slower.
_MOST_ELEMENTS = {torch.float32: 2**15, torch.bfloat16: 6144, torch.float16: 2**16}
# The same beside products in float32.
_MOST_ROWS_WIDENED, _MOST_ELEMENTS_WIDENED = 128, 2**17


def unsupported(call: Call) -> str | None:
    if reason := cpu_call.unsupported(call):
        return reason
    x = call.tensors["x"]
    if x is None or x.dtype not in MOST_ROWS:
        return "takes float32, bfloat16 and float16"
    if not torch_multiplies(x.dtype):
        return None
    if call.options.get("gradient"):
        return "has no gradient where torch has a fast product, as here"
    K = x.shape[-1]
    count = x.numel() // max(K, 1)
    most = min(MOST_ROWS[x.dtype], max(1, _MOST_ELEMENTS[x.dtype] // max(K, 1)))
    if count > most:
        return f"takes up to {most} rows of {K} here, and torch's product is faster for more; got {count}"
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    *leading, K = x.shape
    R, N = math.prod(leading), weight.shape[0]
    y = x.new_empty(*leading, N)
    if R > _MOST_ROWS_WIDENED or (R > 1 and x.numel() > _MOST_ELEMENTS_WIDENED):
        widened.multiply(x.view(R, K), weight, bias, y.view(R, N))
        return y
    native.function("linear_forward", x.dtype)(
        _PARAMS.pack(
            x.data_ptr(),
            weight.data_ptr(),
            pointer(bias),
            y.data_ptr(),
            x.stride(0) if len(leading) == 1 else K,
            weight.stride(0),
            R,
            N,
            K,
            DTYPE_CODES[x.dtype],
            native.threads(),
        )
    )
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, *, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx = dweight = dbias = None
    if needs[0]:
        dx = torch.empty_like(x)
        widened.input_gradient(dy, weight, dx)
    if needs[1]:
        sums = weight.new_zeros(weight.shape, dtype=torch.float32)
        widened.add_weight_gradient(dy, x, sums)
        dweight = sums.to(weight.dtype)
    if needs[2]:
        dbias = dy.sum(0, dtype=torch.float32).to(dy.dtype)
    return dx, dweight, dbias
