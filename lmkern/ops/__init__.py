"""Ops: differentiable functions. They check arguments in words, choose a backend and hold the autograd."""

from lmkern.ops.add_norm import add_norm
from lmkern.ops.attention import attention, scaled_dot_product_attention
from lmkern.ops.cached_attention import cached_attention
from lmkern.ops.layer_norm import layer_norm
from lmkern.ops.relative_bias import alibi, bucketed_bias
from lmkern.ops.rms_norm import rms_norm
from lmkern.ops.cross_entropy import cross_entropy
from lmkern.ops.linear_cross_entropy import linear_cross_entropy

__all__ = ["add_norm", "alibi", "attention", "bucketed_bias", "cached_attention", "cross_entropy", "layer_norm", "linear_cross_entropy", "rms_norm", "scaled_dot_product_attention"]
