"""lmkern: from raw text to an evaluated, writing language model, on its own kernels."""

from lmkern.kernels.backends import UnsupportedBackend
from lmkern.ops import (add_norm, attention, cached_attention, cross_entropy, layer_norm, linear_cross_entropy, rms_norm, scaled_dot_product_attention)

__version__ = "0.1.0"

__all__ = [
    "UnsupportedBackend",
    "__version__",
    "attention",
    "cached_attention",
    "layer_norm",
    "add_norm",
    "rms_norm",
    "cross_entropy",
    "linear_cross_entropy",
    "scaled_dot_product_attention",
]
