"""How well a model predicts text: perplexity, bits per byte, BLEU and chrF, and what it is compared with."""

from lmkern.evaluation.compression import xz_bits, xz_bits_given
from lmkern.evaluation.evaluate import evaluate
from lmkern.evaluation.interpolation import fit_weight, interpolate
from lmkern.evaluation.kneser_ney import KneserNey
from lmkern.evaluation.pairs import corpus_scores, evaluate_pairs
from lmkern.evaluation.perplexity import bits_per_byte, perplexity, token_log_probs

__all__ = [
    "KneserNey",
    "bits_per_byte",
    "corpus_scores",
    "evaluate",
    "evaluate_pairs",
    "fit_weight",
    "interpolate",
    "perplexity",
    "token_log_probs",
    "xz_bits",
    "xz_bits_given",
]
