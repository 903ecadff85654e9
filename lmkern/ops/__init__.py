"""Ops: differentiable functions. They check arguments in words, choose a backend and hold the autograd."""

from lmkern.ops.activation import activation, geglu, gelu, swiglu
from lmkern.ops.adamw import adamw_
from lmkern.ops.add_norm import add_norm
from lmkern.ops.attention import attention, scaled_dot_product_attention
from lmkern.ops.cached_attention import cached_attention
from lmkern.ops.copy import cast, transposed_copy
from lmkern.ops.cross_entropy import cross_entropy
from lmkern.ops.embedding import embedding
from lmkern.ops.layer_norm import layer_norm
from lmkern.ops.linear import linear
from lmkern.ops.linear_cross_entropy import linear_cross_entropy
from lmkern.ops.relative_bias import alibi, bucketed_bias
from lmkern.ops.rms_norm import rms_norm
from lmkern.ops.rotary import rotary

__all__ = [
    "activation",
    "adamw_",
    "add_norm",
    "alibi",
    "attention",
    "bucketed_bias",
    "cached_attention",
    "cast",
    "cross_entropy",
    "embedding",
    "geglu",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
    "scaled_dot_product_attention",
    "swiglu",
    "transposed_copy",
]
