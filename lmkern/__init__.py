"""lmkern: from raw text to an evaluated, writing language model, on its own kernels."""

from lmkern.kernels.backends import UnsupportedBackend
from lmkern.ops import (
    activation,
    adamw_,
    attention,
    cast,
    embedding,
    geglu,
    gelu,
    layer_norm,
    rotary,
    scaled_dot_product_attention,
    swiglu,
    transposed_copy,
)

__version__ = "0.1.0"

__all__ = [
    "UnsupportedBackend",
    "__version__",
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
