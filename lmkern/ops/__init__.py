"""Ops: differentiable functions. They check arguments in words, choose a backend and hold the autograd."""

from lmkern.ops.activation import activation, geglu, gelu, swiglu
from lmkern.ops.adamw import adamw_
from lmkern.ops.attention import attention, scaled_dot_product_attention
from lmkern.ops.copy import cast, transposed_copy
from lmkern.ops.embedding import embedding
from lmkern.ops.layer_norm import layer_norm
from lmkern.ops.rotary import rotary

__all__ = [
    "activation",
    "adamw_",
    "attention",
    "cast",
    "embedding",
    "geglu",
    "gelu",
    "layer_norm",
    "rotary",
    "scaled_dot_product_attention",
    "swiglu",
    "transposed_copy",
]
