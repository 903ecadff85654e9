"""Whole networks, and how they are saved and loaded."""

from lmkern.models.bert import Bert, BertConfig
from lmkern.models.decoder import DecoderCache
from lmkern.models.gpt import GPT, GPTConfig
from lmkern.models.io import load, save
from lmkern.models.llama import Llama, LlamaConfig
from lmkern.models.pretrained import from_pretrained, save_pretrained
from lmkern.models.t5 import T5, T5Cache, T5Config
from lmkern.models.transformer import PositionalEncoder, Transformer, TransformerConfig

__all__ = [
    "GPT",
    "T5",
    "Bert",
    "BertConfig",
    "DecoderCache",
    "GPTConfig",
    "Llama",
    "LlamaConfig",
    "PositionalEncoder",
    "T5Cache",
    "T5Config",
    "Transformer",
    "TransformerConfig",
    "from_pretrained",
    "load",
    "save",
    "save_pretrained",
]
