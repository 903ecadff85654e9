"""The classes of transformers that have a model here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lmkern.models.bert import Bert
from lmkern.models.gpt import GPT
from lmkern.models.llama import Llama
from lmkern.models.pretrained import configs, names
from lmkern.models.t5 import T5

PretrainedModel = Bert | GPT | Llama | T5


@dataclass(frozen=True)
class Architecture:
    """One of transformers' classes and what it is here."""

    model: Callable[[Any], PretrainedModel]
    model_type: str
    prefix: str
    """Of the tensors of the model without its head; a file of that alone lacks it."""
    read: Callable[[configs.Fields], Any]
    write: Callable[[Any], dict[str, Any]]
    table: Callable[[Any], names.Table]
    """The names of the tensors of a configuration of ours."""
    copies: Mapping[str, str]
    """Names under which a file may hold a tensor a second time, and the first. The head's is one if tied."""
    unread: str
    """Pattern of the names of tensors that carry nothing."""


def _bert(head: str) -> Architecture:
    return Architecture(
        model=Bert,
        model_type="bert",
        prefix="bert.",
        read=configs.read_bert(head),
        write=configs.write_bert,
        table=lambda config: (*names.BERT, *names.BERT_HEADS[head]),
        copies={
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        }
        if head == "masked"
        else {},
        # A checkpoint of the two tasks that BERT was trained on has the heads of both.
        unread=r".*\.position_ids"
        + ("" if head == "sequence" else r"|bert\.pooler\..*")
        + r"|cls\.seq_relationship\..*",
    )


ARCHITECTURES: Mapping[str, Architecture] = {
    "BertForMaskedLM": _bert("masked"),
    "BertForSequenceClassification": _bert("sequence"),
    "BertForTokenClassification": _bert("token"),
    "GPT2LMHeadModel": Architecture(
        model=GPT,
        model_type="gpt2",
        prefix="transformer.",
        read=configs.read_gpt2,
        write=configs.write_gpt2,
        table=lambda config: names.GPT2,
        copies={"lm_head.weight": "transformer.wte.weight"},
        unread=r"transformer\.h\.\d+\.attn\.(masked_)?bias",
    ),
    "LlamaForCausalLM": Architecture(
        model=Llama,
        model_type="llama",
        prefix="model.",
        read=configs.read_llama,
        write=configs.write_llama,
        table=lambda config: names.LLAMA,
        copies={"lm_head.weight": "model.embed_tokens.weight"},
        unread=r".*\.rotary_emb\.inv_freq",
    ),
    "T5ForConditionalGeneration": Architecture(
        model=T5,
        model_type="t5",
        prefix="",
        read=configs.read_t5,
        write=configs.write_t5,
        table=lambda config: (
            *names.T5,
            *(names.T5_GATED if config.activation in ("geglu_tanh", "swiglu") else names.T5_PLAIN),
        ),
        copies={
            "encoder.embed_tokens.weight": "shared.weight",
            "decoder.embed_tokens.weight": "shared.weight",
            "lm_head.weight": "shared.weight",
        },
        unread=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ),
}
