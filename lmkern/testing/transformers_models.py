"""Small models of transformers, and what two of them must agree in. The names are transformers' own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALL = {"vocab_size": 67, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    **SMALL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
BERT = {
    **SMALL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
GPT2 = {
    **SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0,
}  # fmt: skip
T5 = {
    "vocab_size": 67, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "dropout_rate": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip
ENCODER_DECODER = {
    **SMALL, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "decoder_start_token_id": 2, "dropout": 0.0, "activation_dropout": 0.0,
    "attention_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
}  # fmt: skip
GEMMA2 = {**LLAMA, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**LLAMA, "sliding_window": 4}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA2),
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5-gated": ("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}),
}
DECODERS = [name for name in MODELS if name != "bert"]
TOLERANCE = 2e-6


def make(name: str, implementation: str = "eager", **more: Any) -> Any:
    """One of MODELS, in training, its configuration with `more`."""
    import transformers

    model_class, config_class, options = MODELS[name]
    torch.manual_seed(1)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**options, **more}))
    model.set_attn_implementation(implementation)
    return model.train()


def batch(padding: str, count: int = 3) -> dict[str, Tensor]:
    """Inputs and labels of sequences, the second of them padded: "none", "left" or "right"."""
    tokens, mask = torch.randint(3, 67, (count, 11)), torch.ones(count, 11, dtype=torch.long)
    if padding == "left":
        mask[1, :4] = 0
    if padding == "right":
        mask[1, -4:] = 0
    # The token after left padding would be predicted from a position that sees nothing.
    labels = tokens.masked_fill((mask == 0) | (mask.roll(1, 1) == 0), -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def results(model: Any, inputs: dict[str, Tensor], **more: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, logits where there is no padding, and the gradients."""
    model.zero_grad()
    loss = model(**inputs, **more).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.eval()
    with torch.no_grad():
        logits = model(**inputs).logits[inputs["attention_mask"].bool()]
    model.train()
    return loss.detach(), logits, gradients


def assert_same(ours: Any, theirs: Any) -> None:
    """That two `results` are the same to float32's rounding."""
    torch.testing.assert_close(ours[0], theirs[0], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(ours[1], theirs[1], atol=TOLERANCE, rtol=0)
    for name, gradient in theirs[2].items():
        torch.testing.assert_close(ours[2][name], gradient, atol=TOLERANCE, rtol=1e-4, msg=name)
