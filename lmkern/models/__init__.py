"""Whole networks, and how they are saved and loaded."""

from lmkern.models.gpt import GPT, GPTCache, GPTConfig
from lmkern.models.io import load, save
from lmkern.models.t5 import T5, T5Cache, T5Config
from lmkern.models.transformer import PositionalEncoder, Transformer, TransformerConfig

__all__ = [
    "GPT",
    "T5",
    "GPTCache",
    "GPTConfig",
    "PositionalEncoder",
    "T5Cache",
    "T5Config",
    "Transformer",
    "TransformerConfig",
    "load",
    "save",
]
