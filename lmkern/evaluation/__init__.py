"""How well a model predicts text: perplexity, bits per byte, and what it is compared with."""

from lmkern.evaluation.compression import xz_bits, xz_bits_given
from lmkern.evaluation.evaluate import evaluate
from lmkern.evaluation.interpolation import fit_weight, interpolate
from lmkern.evaluation.kneser_ney import KneserNey
from lmkern.evaluation.perplexity import bits_per_byte, perplexity, token_log_probs

__all__ = [
    "KneserNey",
    "bits_per_byte",
    "evaluate",
    "fit_weight",
    "interpolate",
    "perplexity",
    "token_log_probs",
    "xz_bits",
    "xz_bits_given",
]
