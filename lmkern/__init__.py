"""lmkern: from raw text to an evaluated, writing language model, on its own kernels."""

from lmkern.kernels.backends import UnsupportedBackend
from lmkern.ops import (
    attention,
    cross_entropy,
    layer_norm,
    linear_cross_entropy,
    scaled_dot_product_attention,
)

__version__ = "0.1.0"

__all__ = [
    "UnsupportedBackend",
    "__version__",
    "attention",
    "cross_entropy",
    "layer_norm",
    "linear_cross_entropy",
    "scaled_dot_product_attention",
]
