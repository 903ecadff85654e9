"""The names of tensors: ours and those of transformers, a table for each architecture.

A row is (ours, theirs...): modules, whose weight and bias follow, or parameters. {i} is the number of a
layer. Where a row has several of theirs, ours is those joined: queries above keys above values, gate above
value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Table = Sequence[tuple[str, ...]]

GPT2: Table = (
    ("embedding", "transformer.wte"),
    ("positions", "transformer.wpe"),
    ("blocks.{i}.attention_norm", "transformer.h.{i}.ln_1"),
    ("blocks.{i}.attention.qkv", "transformer.h.{i}.attn.c_attn"),
    ("blocks.{i}.attention.out", "transformer.h.{i}.attn.c_proj"),
    ("blocks.{i}.feed_forward_norm", "transformer.h.{i}.ln_2"),
    ("blocks.{i}.feed_forward.up", "transformer.h.{i}.mlp.c_fc"),
    ("blocks.{i}.feed_forward.down", "transformer.h.{i}.mlp.c_proj"),
    ("norm", "transformer.ln_f"),
)
# GPT-2's linear maps are stored the other way round, (in, out).
TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")

LLAMA: Table = (
    ("embedding", "model.embed_tokens"),
    ("blocks.{i}.attention_norm", "model.layers.{i}.input_layernorm"),
    (
        "blocks.{i}.attention.qkv",
        "model.layers.{i}.self_attn.q_proj",
        "model.layers.{i}.self_attn.k_proj",
        "model.layers.{i}.self_attn.v_proj",
    ),
    ("blocks.{i}.attention.out", "model.layers.{i}.self_attn.o_proj"),
    ("blocks.{i}.feed_forward_norm", "model.layers.{i}.post_attention_layernorm"),
    ("blocks.{i}.feed_forward.up", "model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"),
    ("blocks.{i}.feed_forward.down", "model.layers.{i}.mlp.down_proj"),
    ("norm", "model.norm"),
    ("head", "lm_head"),
)

BERT: Table = (
    ("embedding", "bert.embeddings.word_embeddings"),
    ("positions", "bert.embeddings.position_embeddings"),
    ("types", "bert.embeddings.token_type_embeddings"),
    ("embedding_norm", "bert.embeddings.LayerNorm"),
    (
        "blocks.{i}.attention.qkv",
        "bert.encoder.layer.{i}.attention.self.query",
        "bert.encoder.layer.{i}.attention.self.key",
        "bert.encoder.layer.{i}.attention.self.value",
    ),
    ("blocks.{i}.attention.out", "bert.encoder.layer.{i}.attention.output.dense"),
    ("blocks.{i}.attention_norm", "bert.encoder.layer.{i}.attention.output.LayerNorm"),
    ("blocks.{i}.feed_forward.up", "bert.encoder.layer.{i}.intermediate.dense"),
    ("blocks.{i}.feed_forward.down", "bert.encoder.layer.{i}.output.dense"),
    ("blocks.{i}.feed_forward_norm", "bert.encoder.layer.{i}.output.LayerNorm"),
)
BERT_HEADS: Mapping[str, Table] = {
    "masked": (
        ("transform", "cls.predictions.transform.dense"),
        ("transform_norm", "cls.predictions.transform.LayerNorm"),
        ("head.bias", "cls.predictions.bias"),
    ),
    "sequence": (("transform", "bert.pooler.dense"), ("head", "classifier")),
    "token": (("head", "classifier"),),
}

T5: Table = (
    ("embedding", "shared"),
    ("encoder_bias", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    ("encoder.{i}.attention_norm", "encoder.block.{i}.layer.0.layer_norm"),
    (
        "encoder.{i}.attention.qkv",
        "encoder.block.{i}.layer.0.SelfAttention.q",
        "encoder.block.{i}.layer.0.SelfAttention.k",
        "encoder.block.{i}.layer.0.SelfAttention.v",
    ),
    ("encoder.{i}.attention.out", "encoder.block.{i}.layer.0.SelfAttention.o"),
    ("encoder.{i}.feed_forward_norm", "encoder.block.{i}.layer.1.layer_norm"),
    ("encoder.{i}.feed_forward.down", "encoder.block.{i}.layer.1.DenseReluDense.wo"),
    ("encoder_norm", "encoder.final_layer_norm"),
    ("decoder_bias", "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    ("decoder.{i}.attention_norm", "decoder.block.{i}.layer.0.layer_norm"),
    (
        "decoder.{i}.attention.qkv",
        "decoder.block.{i}.layer.0.SelfAttention.q",
        "decoder.block.{i}.layer.0.SelfAttention.k",
        "decoder.block.{i}.layer.0.SelfAttention.v",
    ),
    ("decoder.{i}.attention.out", "decoder.block.{i}.layer.0.SelfAttention.o"),
    ("decoder.{i}.cross_norm", "decoder.block.{i}.layer.1.layer_norm"),
    ("decoder.{i}.cross_attention.query", "decoder.block.{i}.layer.1.EncDecAttention.q"),
    (
        "decoder.{i}.cross_attention.key_value",
        "decoder.block.{i}.layer.1.EncDecAttention.k",
        "decoder.block.{i}.layer.1.EncDecAttention.v",
    ),
    ("decoder.{i}.cross_attention.out", "decoder.block.{i}.layer.1.EncDecAttention.o"),
    ("decoder.{i}.feed_forward_norm", "decoder.block.{i}.layer.2.layer_norm"),
    ("decoder.{i}.feed_forward.down", "decoder.block.{i}.layer.2.DenseReluDense.wo"),
    ("decoder_norm", "decoder.final_layer_norm"),
    ("head", "lm_head"),
)
T5_PLAIN: Table = (
    ("encoder.{i}.feed_forward.up", "encoder.block.{i}.layer.1.DenseReluDense.wi"),
    ("decoder.{i}.feed_forward.up", "decoder.block.{i}.layer.2.DenseReluDense.wi"),
)
T5_GATED: Table = (
    (
        "encoder.{i}.feed_forward.up",
        "encoder.block.{i}.layer.1.DenseReluDense.wi_0",
        "encoder.block.{i}.layer.1.DenseReluDense.wi_1",
    ),
    (
        "decoder.{i}.feed_forward.up",
        "decoder.block.{i}.layer.2.DenseReluDense.wi_0",
        "decoder.block.{i}.layer.2.DenseReluDense.wi_1",
    ),
)


def to_theirs(table: Table, config: Any, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state_dict of ours under their names: views where they can be."""
    tensors = {}
    for name, theirs in _pairs(table, ours):
        for part, their_name in zip(_parts(ours[name], len(theirs), config), theirs, strict=True):
            tensors[their_name] = part.T if their_name.endswith(TRANSPOSED) else part
    return tensors


def to_ours(table: Table, ours: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: the tensors that fill ours, from those found under their names."""
    tensors = {}
    for name, theirs in _pairs(table, ours):
        parts = [found[each].T if each.endswith(TRANSPOSED) else found[each] for each in theirs]
        tensors[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return tensors


def _pairs(table: Table, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name of ours, names of theirs) for each tensor of ours, in the order of the table."""
    for our_row, *their_row in table:
        layers = range(len(ours) if "{i}" in our_row else 1)
        for i in layers:
            names = [our_row.format(i=i) + suffix for suffix in ("", ".weight", ".bias")]
            present = [name for name in names if name in ours]
            if not present:
                break
            for name in present:
                suffix = name.removeprefix(our_row.format(i=i))
                yield name, tuple(row.format(i=i) + suffix for row in their_row)


def _parts(x: Tensor, count: int, config: Any) -> Sequence[Tensor]:
    """x cut along its first dimension: in three as heads, key and value heads are, else evenly."""
    if count < 3:
        return x.chunk(count)
    kv_heads = getattr(config, "kv_heads", 0) or config.heads
    head_dim = x.shape[0] // (config.heads + 2 * kv_heads)
    return torch.split(x, [config.heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])
