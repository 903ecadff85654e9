"""Input factories, shape lists and error budgets, shared by tests and benchmarks only."""

from lmkern.testing.error_budget import Errors, geometric_mean, mean_over_budget, measure, over_budget
from lmkern.testing.inputs import (
    LAYOUTS,
    attention_inputs,
    attention_options,
    layer_norm_inputs,
    leaves,
    seeded_randn,
)
from lmkern.testing.poison import poisoned_memory
from lmkern.testing.results import (
    attention_errors,
    attention_results,
    exact_attention,
    layer_norm_results,
    our_attention,
    torchs_attention,
    torchs_formula,
)
from lmkern.testing.shapes import (
    ATTENTION_BENCHMARK_SHAPES,
    ATTENTION_FEATURES,
    ATTENTION_SHAPES,
    LAYER_NORM_BENCHMARK_SHAPES,
    LAYER_NORM_SHAPES,
    AttentionFeatures,
    AttentionShape,
    LayerNormShape,
)
from lmkern.testing.targets import Target, targets

__all__ = [
    "ATTENTION_BENCHMARK_SHAPES",
    "ATTENTION_FEATURES",
    "ATTENTION_SHAPES",
    "LAYER_NORM_BENCHMARK_SHAPES",
    "LAYER_NORM_SHAPES",
    "LAYOUTS",
    "AttentionFeatures",
    "AttentionShape",
    "Errors",
    "LayerNormShape",
    "Target",
    "attention_errors",
    "attention_inputs",
    "attention_options",
    "attention_results",
    "exact_attention",
    "geometric_mean",
    "layer_norm_inputs",
    "layer_norm_results",
    "leaves",
    "mean_over_budget",
    "measure",
    "our_attention",
    "over_budget",
    "poisoned_memory",
    "seeded_randn",
    "targets",
    "torchs_attention",
    "torchs_formula",
]
