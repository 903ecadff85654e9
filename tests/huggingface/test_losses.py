"""The loss of a patched model of transformers: the same without logits, or left with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lmkern
from lmkern.testing.transformers_models import (
    BERT,
    ENCODER_DECODER,
    LLAMA,
    SMALL,
    T5,
    assert_same,
    batch,
    make,
    results,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def test_a_head_that_is_ours_already_has_its_loss_swapped() -> None:
    model, inputs = make("llama"), batch("right")
    theirs = results(model, inputs)
    lmkern.patch(model.lm_head, verbose=False)
    assert lmkern.patch(model, verbose=False).swapped[""] == "loss without logits"
    assert_same(results(model, inputs), theirs)


ELSE = "self.lm_head may give something else than the head"
CHANGED = "its forward changes the logits before the loss"
TAKEN = "its forward takes the labels for more than its loss"
BAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8,
    "attn_layer_indices": [1], "z_loss_coefficient": 0.1,
}  # fmt: skip
ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2}
VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
    "deepstack_visual_indexes": [0],
}  # fmt: skip
QWEN3_VL = {
    "text_config": {
        **LLAMA, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
        "router_aux_loss_coef": 1.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    },
    "vision_config": VISION,
}  # fmt: skip
T5GEMMA = {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "attention_dropout": 0.0, "dropout_rate": 0.0}
# Name of the class less what follows, options, the reason for which the loss stays.
LOSSES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "Qwen2": ("ForCausalLM", LLAMA, None),
    "Qwen3": ("ForCausalLM", {**LLAMA, "head_dim": 8}, None),
    "Gemma": ("ForCausalLM", {**LLAMA, "head_dim": 8}, None),
    "Phi": ("ForCausalLM", LLAMA, None),
    "OPT": (
        "ForCausalLM",
        {**SMALL, "hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "dropout": 0.0,
         "word_embed_proj_dim": 32, "num_hidden_layers": 2, "max_position_embeddings": 64},
        None,
    ),
    "GPTNeoX": ("ForCausalLM", LLAMA, None),
    "Roberta": ("ForMaskedLM", BERT, None),
    "Albert": ("ForMaskedLM", {**BERT, "embedding_size": 16}, None),
    "DistilBert": (
        "ForMaskedLM",
        {**SMALL, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "dropout": 0.0,
         "attention_dropout": 0.0},
        None,
    ),
    "MT5": ("ForConditionalGeneration", T5, None),
    "UMT5": ("ForConditionalGeneration", T5, None),
    "T5Gemma": (
        "ForConditionalGeneration",
        {"vocab_size": 67, "encoder": T5GEMMA, "decoder": T5GEMMA, "dropout_rate": 0.0,
         "attention_dropout": 0.0},
        None,
    ),
    "JetMoe": ("ForCausalLM", {**LLAMA, **ROUTED, "kv_channels": 8, "aux_loss_coef": 1.0}, None),
    "Mixtral": ("ForCausalLM", {**LLAMA, **ROUTED, "router_aux_loss_coef": 1.0}, None),
    "Qwen3VLMoe": ("ForConditionalGeneration", QWEN3_VL, None),
    "Bamba": ("ForCausalLM", {**LLAMA, **BAMBA}, CHANGED),
    "Cohere": ("ForCausalLM", {**LLAMA, "logit_scale": 2.0}, CHANGED),
    "Granite": ("ForCausalLM", {**LLAMA, "logits_scaling": 2.0}, CHANGED),
    "RecurrentGemma": (
        "ForCausalLM",
        {**LLAMA, "num_key_value_heads": 1, "logits_soft_cap": 1.0, "attention_window_size": 16},
        CHANGED,
    ),
    "Esm": ("ForMaskedLM", {**BERT, "mask_token_id": 3}, ELSE),
    "Bart": ("ForConditionalGeneration", ENCODER_DECODER, CHANGED),
    "Pegasus": ("ForConditionalGeneration", ENCODER_DECODER, CHANGED),
    "M2M100": ("ForConditionalGeneration", ENCODER_DECODER, TAKEN),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_the_same_or_stays_with_a_reason(name: str) -> None:
    ending, options, reason = LOSSES[name]
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, name + ending)(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            # Logits as far from zero as those of a trained model; T5's are.
            parameter.mul_(3 if parameter.dim() > 1 and "T5" not in name else 1)
        for buffer in (x for x in model.buffers() if x.shape == (1, 67)):
            buffer.normal_()
    tokens = torch.randint(3, 67, (2, 11))
    inputs = {"input_ids": tokens, "labels": tokens.masked_fill(torch.arange(11) < 2, -100)}
    if name in ("JetMoe", "Mixtral", "Qwen3VLMoe"):
        inputs["output_router_logits"] = torch.tensor(True)
    if name == "RecurrentGemma":
        inputs["use_cache"] = torch.tensor(False)

    def results() -> tuple[Tensor, Tensor]:
        loss = model(**inputs).loss
        parameters = [x for x in model.parameters() if x.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss, torch.cat([x.flatten() for x in gradients if x is not None])

    theirs = results()
    patch = lmkern.patch(model, verbose=False)
    assert (patch.swapped.get("") == "loss without logits") == (reason is None)
    assert patch.left.get("") == (reason and f"its loss stays: {reason}")
    ours = results()
    torch.testing.assert_close(ours[0], theirs[0], atol=0, rtol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5 * float(theirs[1].abs().max()), rtol=0)


def test_a_loss_function_of_ones_own_stays() -> None:
    model, inputs = make("llama"), batch("right")
    patch = lmkern.patch(model, verbose=False)
    model.loss_function = lambda **named: named["logits"].sum()
    outputs = model(**inputs)
    assert torch.equal(outputs.loss, outputs.logits.sum())
    patch.undo()
    assert "its loss stays: it has a loss function of its own" in lmkern.patch(model, verbose=False).left[""]


def test_a_forward_without_source_keeps_its_loss() -> None:
    names: dict[str, Any] = {"base": transformers.LlamaForCausalLM}
    exec(
        "class WrittenForCausalLM(base):\n"
        "    def forward(self, input_ids=None, labels=None):\n"
        "        return super().forward(input_ids=input_ids, labels=labels)",
        names,
    )
    cls = names["WrittenForCausalLM"]
    cls.__module__ = transformers.LlamaForCausalLM.__module__
    model = cls(transformers.LlamaConfig(**LLAMA)).train()
    reason = "its loss stays: the source of WrittenForCausalLM.forward cannot be read"
    assert lmkern.patch(model, verbose=False).left[""] == reason
