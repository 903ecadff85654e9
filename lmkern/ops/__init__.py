"""Ops: differentiable functions. They check arguments in words, choose a backend and hold the autograd."""

from lmkern.ops.attention import attention, scaled_dot_product_attention
from lmkern.ops.cross_entropy import cross_entropy
from lmkern.ops.layer_norm import layer_norm
from lmkern.ops.linear_cross_entropy import linear_cross_entropy

__all__ = ["attention", "cross_entropy", "layer_norm", "linear_cross_entropy", "scaled_dot_product_attention"]
