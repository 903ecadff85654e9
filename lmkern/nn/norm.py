"""Layer norm and RMS norm as modules."""

from __future__ import annotations

import torch
from torch import Tensor

from lmkern.ops import layer_norm, rms_norm


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm, argument for argument and key for key, on lmkern.layer_norm.

    forward: (*, *normalized_shape) -> the same shape and dtype, contiguous. Statistics are float32 (float64
    for float64), and float32 parameters may stand beside a 16-bit input.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.is_nested:
            return super().forward(input)
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm, argument for argument and key for key, on lmkern.rms_norm.

    forward: (*, *normalized_shape) -> the same shape and dtype, contiguous. The mean square is float32
    (float64 for float64), and a float32 weight may stand beside a 16-bit input.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_nested:
            return super().forward(x)
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)
