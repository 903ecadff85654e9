"""torch.nn.Linear with the op."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import Tensor, nn

from lmkern.nn.residual import plain
from lmkern.ops import linear


class Linear(nn.Linear):
    """torch.nn.Linear through lmkern.linear: on a CPU few rows without a gradient, and 16 bits that the
    processor has no instructions for, are ours.

    torch.ao.quantization looks for torch's very class, and leaves this one as it is.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(input, self.weight, self.bias)


def plain_linear(module: Any) -> TypeGuard[nn.Linear]:
    """Whether a module is torch's Linear or the one above, as `plain` has it."""
    return plain(module, nn.Linear) or plain(module, Linear)
