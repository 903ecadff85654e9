"""Input factories, shape lists and error budgets, shared by tests and benchmarks only."""

from lmkern.testing.error_budget import Errors, geometric_mean, mean_over_budget, measure, over_budget
from lmkern.testing.inputs import (
    LAYOUTS,
    attention_inputs,
    cross_entropy_inputs,
    layer_norm_inputs,
    leaves,
    linear_cross_entropy_inputs,
    seeded_randn,
)
from lmkern.testing.poison import poisoned_memory
from lmkern.testing.results import (
    attention_results,
    exact_attention,
    layer_norm_results,
    our_attention,
    torchs_attention,
)
from lmkern.testing.shapes import (
    ATTENTION_BENCHMARK_SHAPES,
    ATTENTION_SHAPES,
    CROSS_ENTROPY_BENCHMARK_SHAPES,
    CROSS_ENTROPY_SHAPES,
    LAYER_NORM_BENCHMARK_SHAPES,
    LAYER_NORM_SHAPES,
    LINEAR_CROSS_ENTROPY_BENCHMARK_SHAPES,
    LINEAR_CROSS_ENTROPY_SHAPES,
    AttentionShape,
    CrossEntropyShape,
    LayerNormShape,
    LinearCrossEntropyShape,
)
from lmkern.testing.targets import Target, targets

__all__ = [
    "ATTENTION_BENCHMARK_SHAPES",
    "ATTENTION_SHAPES",
    "CROSS_ENTROPY_BENCHMARK_SHAPES",
    "CROSS_ENTROPY_SHAPES",
    "LAYER_NORM_BENCHMARK_SHAPES",
    "LAYER_NORM_SHAPES",
    "LAYOUTS",
    "LINEAR_CROSS_ENTROPY_BENCHMARK_SHAPES",
    "LINEAR_CROSS_ENTROPY_SHAPES",
    "AttentionShape",
    "CrossEntropyShape",
    "Errors",
    "LayerNormShape",
    "LinearCrossEntropyShape",
    "Target",
    "attention_inputs",
    "attention_results",
    "cross_entropy_inputs",
    "exact_attention",
    "geometric_mean",
    "layer_norm_inputs",
    "layer_norm_results",
    "leaves",
    "linear_cross_entropy_inputs",
    "mean_over_budget",
    "measure",
    "our_attention",
    "over_budget",
    "poisoned_memory",
    "seeded_randn",
    "targets",
    "torchs_attention",
]
