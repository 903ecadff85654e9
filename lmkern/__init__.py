"""lmkern: from raw text to an evaluated, writing language model, on its own kernels."""

from lmkern.kernels.backends import UnsupportedBackend
from lmkern.ops import (
    activation,
    adamw_,
    add_norm,
    alibi,
    attention,
    bucketed_bias,
    cached_attention,
    cast,
    cross_entropy,
    embedding,
    geglu,
    gelu,
    layer_norm,
    linear,
    linear_cross_entropy,
    rms_norm,
    rotary,
    scaled_dot_product_attention,
    swiglu,
    transposed_copy,
)
from lmkern.patching import patch

# Of the release that CHANGELOG.md begins with; .dev0 until it is one.
__version__ = "0.2.0.dev0"

__all__ = [
    "UnsupportedBackend",
    "__version__",
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
    "patch",
    "rms_norm",
    "rotary",
    "scaled_dot_product_attention",
    "swiglu",
    "transposed_copy",
]
