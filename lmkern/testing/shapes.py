"""The shapes that tests and benchmarks run on, each with the reason it is there."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from lmkern.kernels.attention import Options


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """q (B, H, N_q, D); k and v (B, H_kv, N_k, D); causal as in `lmkern.attention`."""

    B: int
    H: int
    N_q: int
    D: int
    N_k: int
    H_kv: int
    causal: bool = False
    reason: str = ""

    def __str__(self) -> str:
        heads = f"H{self.H}" if self.H_kv == self.H else f"H{self.H}of{self.H_kv}"
        tokens = f"N{self.N_q}" if self.N_q == self.N_k else f"N{self.N_q}x{self.N_k}"
        return f"B{self.B}-{heads}-{tokens}-D{self.D}" + ("-causal" if self.causal else "")

    @property
    def diagonal(self) -> int | None:
        """Query i sees the keys j <= i + diagonal; None: every key."""
        return self.N_k - self.N_q if self.causal else None

    @property
    def scores(self) -> int:
        """Elements of the score matrix, which a kernel's time goes with."""
        return self.B * self.H * self.N_q * self.N_k


@dataclass(frozen=True, slots=True)
class AttentionFeatures:
    """What else a call of `lmkern.attention` says; `attention_options` makes its tensors.

    bias, mask: which of the dimensions "BHqk" they have, the others being 1; None: no such tensor.
    relative_bias: "H" or "1", its rows. documents: (N_q, N_k) of each packed document.
    """

    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    bias: str | None = None
    mask: str | None = None
    relative_bias: str | None = None
    alibi: bool = False
    sinks: bool = False
    dropout_p: float = 0.0
    documents: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        if self.documents:
            given["documents"] = len(self.documents)
        return "-".join(f"{name}{'' if value is True else value}" for name, value in given.items()) or "plain"

    def kernel_options(self, dtype: torch.dtype = torch.float32) -> Options:
        """Options that have the same features, of tensors without meaning: for `unsupported`."""
        x = torch.zeros(1, 1, 1, 1, dtype=dtype)
        statistics = torch.zeros(1, 1, dtype=torch.promote_types(dtype, torch.float32))
        ends = torch.zeros(2, dtype=torch.int32) if self.documents else None
        left, right = self.window or (None, None)
        return Options(
            softmax_scale=1.0,
            left=left,
            right=right,
            softcap=self.softcap or 0.0,
            dropout_p=self.dropout_p,
            seed=torch.tensor(0) if self.dropout_p else None,
            bias=None if self.bias is None else x,
            mask=None if self.mask is None else x.bool(),
            relative_bias=statistics if self.relative_bias or self.alibi else None,
            sinks=statistics[0] if self.sinks else None,
            cu_seqlens_q=ends,
            cu_seqlens_k=ends,
        )


@dataclass(frozen=True, slots=True)
class LayerNormShape:
    """x (R, E)."""

    R: int
    E: int
    reason: str = ""

    def __str__(self) -> str:
        return f"R{self.R}-E{self.E}"


@dataclass(frozen=True, slots=True)
class CrossEntropyShape:
    """logits (R, V)."""

    R: int
    V: int
    reason: str = ""

    def __str__(self) -> str:
        return f"R{self.R}-V{self.V}"


@dataclass(frozen=True, slots=True)
class LinearCrossEntropyShape:
    """x (R, E), weight (V, E)."""

    R: int
    V: int
    E: int
    reason: str = ""

    def __str__(self) -> str:
        return f"R{self.R}-V{self.V}-E{self.E}"


def _square(B: int, H: int, N: int, D: int, reason: str, *, causal: bool = False) -> AttentionShape:
    return AttentionShape(B, H, N, D, N, H, causal, reason)


# Several heads where rows are few, so that the largest error of a shape is no accident.
ATTENTION_SHAPES = (
    _square(1, 1, 1, 1, "the smallest call"),
    _square(3, 5, 17, 16, "shorter than a block, an odd number of heads"),
    _square(2, 8, 100, 64, "one block and a part", causal=True),
    _square(2, 4, 64, 64, "exactly one block", causal=True),
    _square(1, 4, 128, 32, "exactly two blocks"),
    AttentionShape(2, 4, 63, 32, 65, 4, False, "a query fewer and a key more than a block"),
    AttentionShape(
        2, 4, 65, 40, 63, 4, True, "a query more and a key fewer: the first two queries see no key"
    ),
    AttentionShape(1, 4, 127, 72, 129, 4, True, "a diagonal off the block's corner, above"),
    AttentionShape(1, 4, 129, 80, 127, 4, True, "a diagonal off the block's corner, below"),
    AttentionShape(1, 6, 33, 48, 97, 2, False, "grouped heads"),
    AttentionShape(2, 4, 50, 24, 70, 1, True, "one key/value head for all"),
    AttentionShape(6, 12, 1, 64, 130, 4, True, "one new token against a cache"),
    AttentionShape(4, 4, 7, 128, 300, 4, False, "few queries, many keys"),
    AttentionShape(6, 6, 8, 72, 300, 3, True, "few queries, the last of many keys"),
    AttentionShape(2, 4, 150, 128, 7, 4, True, "whole blocks of queries that see no key"),
    AttentionShape(4, 4, 40, 16, 1, 4, False, "one key: every weight is 1"),
    _square(1, 1, 600, 8, "one head, longer than two parts of the backward pass", causal=True),
    _square(1, 3, 520, 20, "fewer heads than make whole rounds of two threads"),
    # Few products to a score make peaky rows, whose errors are few and large: more rows, that these are no
    # accident either.
    *(_square(4, 4, 60, D, f"head_dim {D}", causal=D % 2 == 0) for D in (2, 3)),
    *(_square(4, 4, 20, D, f"head_dim {D}", causal=D % 2 == 0) for D in (7, 15, 31, 33, 65, 96, 100)),
    *(_square(4, 4, 20, D, f"head_dim {D}", causal=D % 2 == 0) for D in (127, 129, 160, 192, 255, 256)),
)

# Alone, and then in company.
ATTENTION_FEATURES = (
    AttentionFeatures(window=(20, 9)),
    AttentionFeatures(window=(13, None)),
    AttentionFeatures(window=(None, 7)),
    AttentionFeatures(softcap=1.5),
    AttentionFeatures(bias="BHqk"),
    AttentionFeatures(bias="Hk"),
    AttentionFeatures(bias="q"),
    AttentionFeatures(mask="BHqk"),
    AttentionFeatures(mask="Bk"),
    AttentionFeatures(relative_bias="H"),
    AttentionFeatures(relative_bias="1"),
    AttentionFeatures(alibi=True),
    AttentionFeatures(sinks=True),
    AttentionFeatures(dropout_p=0.25),
    AttentionFeatures(window=(30, 0), softcap=2.0, sinks=True),
    AttentionFeatures(bias="qk", mask="Bk", dropout_p=0.1),
    AttentionFeatures(
        window=(40, 3), softcap=3.0, bias="Hqk", mask="BHqk", relative_bias="H", alibi=True, sinks=True,
        dropout_p=0.5,
    ),
)  # fmt: skip

# Rows beside 16 and 64 chunks of 16, and widths beside every vector width, are where an off-by-one hides.
LAYER_NORM_SHAPES = (
    LayerNormShape(1, 1, "the smallest call: y is the bias"),
    LayerNormShape(5, 2, "the narrowest row with a variance"),
    LayerNormShape(5, 3, "narrower than every vector"),
    LayerNormShape(7, 15, "one short of a vector"),
    LayerNormShape(16, 17, "one past a vector; exactly one task of rows"),
    LayerNormShape(17, 31, "one row more than a task"),
    LayerNormShape(31, 64, "four whole vectors"),
    LayerNormShape(33, 65, "four vectors and a lane; two chunks and a row"),
    LayerNormShape(100, 127, "a lane short of two rounds of four vectors"),
    LayerNormShape(50, 129, "two rounds and a lane"),
    LayerNormShape(1025, 33, "more rows than all chunks hold at 16 each"),
    LayerNormShape(37, 768, "GPT-2's width"),
    LayerNormShape(9, 1000, "not a multiple of a vector"),
    LayerNormShape(3, 4096, "a wide model"),
    LayerNormShape(2, 16384, "the widest row that Triton takes"),
    LayerNormShape(2, 70_000, "wider than 2^16"),
)

CROSS_ENTROPY_SHAPES = (
    CrossEntropyShape(1, 1, "one class: the loss is 0"),
    CrossEntropyShape(9, 2, "two classes"),
    CrossEntropyShape(40, 7, "narrower than every vector but one"),
    CrossEntropyShape(17, 15, "one short of a vector"),
    CrossEntropyShape(16, 17, "one past a vector"),
    CrossEntropyShape(9, 65, "a round of four vectors and a class"),
    CrossEntropyShape(37, 1000, "more rows than threads"),
    CrossEntropyShape(5, 4096, "exactly one block"),
    CrossEntropyShape(5, 4097, "a block and a class"),
    CrossEntropyShape(3, 50_257, "GPT-2's vocabulary"),
)

# Tokens, classes and widths beside the 32 of a tile pair, and beside its rounds of 4 and 8.
LINEAR_CROSS_ENTROPY_SHAPES = (
    LinearCrossEntropyShape(1, 7, 5, "the smallest call"),
    LinearCrossEntropyShape(33, 31, 33, "a token and a column past a tile, a class short of one"),
    LinearCrossEntropyShape(32, 32, 32, "exactly one step"),
    LinearCrossEntropyShape(70, 129, 65, "a class past a task's panels"),
    LinearCrossEntropyShape(257, 100, 16, "a token past a part"),
    LinearCrossEntropyShape(300, 1000, 64, "two parts, several tasks"),
)

ATTENTION_BENCHMARK_SHAPES = (
    _square(4, 12, 1024, 64, "GPT-2 small's layer in training", causal=True),
    _square(4, 12, 1024, 64, "the same without a mask: an encoder"),
    _square(16, 8, 128, 64, "many short sequences", causal=True),
    _square(1, 12, 4096, 64, "a long sequence", causal=True),
    AttentionShape(2, 16, 1024, 128, 1024, 4, True, "grouped heads, head_dim 128"),
    AttentionShape(8, 12, 1, 64, 1024, 12, True, "generation: one new token a sequence"),
)

LAYER_NORM_BENCHMARK_SHAPES = (
    LayerNormShape(4096, 768, "GPT-2 small's layer in training"),
    LayerNormShape(4096, 256, "a small model: short rows"),
    LayerNormShape(2048, 4096, "a wide model: rows larger than the first cache"),
    LayerNormShape(8, 768, "generation: the cost of the call itself"),
)

NORM_GPU_SHAPES = (
    LayerNormShape(16384, 4096, "a large model's layer in training"),
    LayerNormShape(131_072, 128, "heads that are normalised alone"),
    LayerNormShape(8192, 8192, "the widest row that one backward kernel takes"),
    LayerNormShape(1024, 65_536, "rows that no program holds"),
)

CROSS_ENTROPY_BENCHMARK_SHAPES = (
    CrossEntropyShape(4096, 50_304, "GPT-2 small's logits in training"),
    CrossEntropyShape(4096, 4096, "a small vocabulary: rows in the first cache"),
)

LINEAR_CROSS_ENTROPY_BENCHMARK_SHAPES = (
    LinearCrossEntropyShape(4096, 50_304, 768, "GPT-2 small's head in training"),
    LinearCrossEntropyShape(4096, 4096, 384, "a small model with a small vocabulary"),
)
