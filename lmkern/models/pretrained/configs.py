"""config.json as transformers writes it, to and from our configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lmkern.models.bert import BertConfig
from lmkern.models.gpt import GPTConfig
from lmkern.models.llama import LlamaConfig
from lmkern.models.t5 import T5Config

# Names of activations there, and here. The first name of each of ours is the one that is written.
ACTIVATIONS: Mapping[str, Any] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
T5_ACTIVATIONS: Mapping[str, Any] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
    "gated-gelu": "geglu_tanh",
    "gated-gelu_new": "geglu_tanh",
    "gated-silu": "swiglu",
}


class Fields:
    """The fields of a config.json; what cannot be served is collected, to be named together."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.refused: list[str] = []

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field; the default where it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def only(self, supported: Mapping[str, Any]) -> None:
        """Refuses each of these fields that has another value."""
        for name, value in supported.items():
            self.require(name, self.get(name, value) == value, repr(value))

    def choice(self, name: str, default: str, names: Mapping[str, Any]) -> Any:
        """Ours for a name of theirs."""
        value = self.get(name, default)
        self.require(name, value in names, " or ".join(names))
        return names.get(value, names[default])

    def require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            self.refused.append(f"{name}: expected {expected}; got {self.values.get(name)!r}")


def written(names: Mapping[str, str], ours: str, what: str) -> str:
    """Their name of an activation of ours. ValueError if they have none."""
    found = next((theirs for theirs, each in names.items() if each == ours), None)
    if found is None:
        raise ValueError(f"save_pretrained: {what} has no activation {ours!r}; it has {', '.join(names)}")
    return found


def read_gpt2(fields: Fields) -> GPTConfig:
    fields.only(
        {
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
            "embd_pdrop": fields.get("resid_pdrop", 0.1),
        }
    )
    return GPTConfig(
        vocab_size=fields.get("vocab_size", 50257),
        context=fields.get("n_positions", 1024),
        layers=fields.get("n_layer", 12),
        heads=fields.get("n_head", 12),
        width=fields.get("n_embd", 768),
        feed_forward=fields.get("n_inner", 0),
        dropout=fields.get("resid_pdrop", 0.1),
        attention_dropout=fields.get("attn_pdrop", 0.1),
        positions="learned",
        bias=True,
        activation=fields.choice("activation_function", "gelu_new", ACTIVATIONS),
        eps=fields.get("layer_norm_epsilon", 1e-5),
    )


def write_gpt2(config: GPTConfig) -> dict[str, Any]:
    if config.positions != "learned" or not config.bias or config.kv_heads not in (0, config.heads):
        raise ValueError(
            "save_pretrained: a GPT is a GPT-2 with positions 'learned', bias True and as many kv_heads as "
            f"heads; got {config}"
        )
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_embd": config.width,
        "n_inner": config.feed_forward or None,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
        "activation_function": written(ACTIVATIONS, config.activation, "GPT-2"),
        "layer_norm_epsilon": config.eps,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def read_llama(fields: Fields) -> LlamaConfig:
    fields.only({"hidden_act": "silu", "attention_bias": False, "mlp_bias": False})
    base = fields.get("rope_theta", 10000.0)
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name, {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        plain = kind == "default" and rope.get("partial_rotary_factor", 1.0) == 1.0
        fields.require(name, plain, "rope_type 'default'")
        base = rope.get("rope_theta", base)
    width, heads = fields.get("hidden_size", 4096), fields.get("num_attention_heads", 32)
    return LlamaConfig(
        vocab_size=fields.get("vocab_size", 32000),
        context=fields.get("max_position_embeddings", 2048),
        layers=fields.get("num_hidden_layers", 32),
        heads=heads,
        kv_heads=fields.get("num_key_value_heads", 0),
        head_width=fields.get("head_dim", 0),
        width=width,
        feed_forward=fields.get("intermediate_size", 11008),
        rotary_base=base,
        tied=fields.get("tie_word_embeddings", False),
        attention_dropout=fields.get("attention_dropout", 0.0),
        eps=fields.get("rms_norm_eps", 1e-6),
    )


def write_llama(config: LlamaConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": config.head_dim,
        "hidden_size": config.width,
        "intermediate_size": config.inner_width,
        "hidden_act": "silu",
        "rope_theta": config.rotary_base,
        "tie_word_embeddings": config.tied,
        "attention_dropout": config.attention_dropout,
        "rms_norm_eps": config.eps,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def read_bert(head: Any) -> Callable[[Fields], BertConfig]:
    def read(fields: Fields) -> BertConfig:
        fields.only(
            {
                "position_embedding_type": "absolute",
                "is_decoder": False,
                "add_cross_attention": False,
                "tie_word_embeddings": True,
                "problem_type": "single_label_classification",
            }
        )
        dropout = fields.get("hidden_dropout_prob", 0.1)
        labels = len(fields.get("id2label", {})) or fields.get("num_labels", 2)
        # transformers makes a regression of one label, and then has no cross-entropy.
        fields.require("id2label", head == "masked" or labels > 1, "at least 2 labels")
        return BertConfig(
            vocab_size=fields.get("vocab_size", 30522),
            context=fields.get("max_position_embeddings", 512),
            layers=fields.get("num_hidden_layers", 12),
            heads=fields.get("num_attention_heads", 12),
            width=fields.get("hidden_size", 768),
            feed_forward=fields.get("intermediate_size", 3072),
            types=fields.get("type_vocab_size", 2),
            head=head,
            labels=labels,
            activation=fields.choice("hidden_act", "gelu", ACTIVATIONS),
            dropout=dropout,
            attention_dropout=fields.get("attention_probs_dropout_prob", 0.1),
            classifier_dropout=fields.get("classifier_dropout", dropout),
            eps=fields.get("layer_norm_eps", 1e-12),
        )

    return read


def write_bert(config: BertConfig) -> dict[str, Any]:
    fields = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward or 4 * config.width,
        "type_vocab_size": config.types,
        "hidden_act": written(ACTIVATIONS, config.activation, "BERT"),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "classifier_dropout": config.classifier_dropout,
        "layer_norm_eps": config.eps,
    }
    if config.head != "masked":
        labels = {str(i): f"LABEL_{i}" for i in range(config.labels)}
        fields |= {"id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}}
    return fields


def read_t5(fields: Fields) -> T5Config:
    fields.only({"is_decoder": False, "is_encoder_decoder": True})
    # Whether logits are scaled was told by the tying of embedding and head before it had a field of its own.
    scaled = fields.get("scale_decoder_outputs", fields.get("tie_word_embeddings", True))
    layers = fields.get("num_layers", 6)
    pad, end = fields.get("pad_token_id", 0), fields.get("eos_token_id", 1)
    fields.require("eos_token_id", isinstance(end, int), "one token")
    return T5Config(
        vocab_size=fields.get("vocab_size", 32128),
        layers=layers,
        decoder_layers=fields.get("num_decoder_layers", layers),
        heads=fields.get("num_heads", 8),
        head_dim=fields.get("d_kv", 64),
        width=fields.get("d_model", 512),
        feed_forward=fields.get("d_ff", 2048),
        activation=fields.choice("feed_forward_proj", "relu", T5_ACTIVATIONS),
        dropout=fields.get("dropout_rate", 0.1),
        buckets=fields.get("relative_attention_num_buckets", 32),
        max_distance=fields.get("relative_attention_max_distance", 128),
        scaled=scaled,
        eps=fields.get("layer_norm_epsilon", 1e-6),
        pad=pad,
        start=fields.get("decoder_start_token_id", pad),
        end=end if isinstance(end, int) else 1,
    )


def write_t5(config: T5Config) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "num_layers": config.layers,
        "num_decoder_layers": config.decoder_layers or config.layers,
        "num_heads": config.heads,
        "d_kv": config.head_dim or config.width // config.heads,
        "d_model": config.width,
        "d_ff": config.feed_forward or 4 * config.width,
        "feed_forward_proj": written(T5_ACTIVATIONS, config.activation, "T5"),
        "dropout_rate": config.dropout,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "tie_word_embeddings": config.scaled,
        "scale_decoder_outputs": config.scaled,
        "layer_norm_epsilon": config.eps,
        "pad_token_id": config.pad,
        "decoder_start_token_id": config.start,
        "eos_token_id": config.end,
        "is_encoder_decoder": True,
    }
