"""Whole networks, and how they are saved and loaded."""

from lmkern.models.gpt import GPT, GPTCache, GPTConfig
from lmkern.models.io import load, save
from lmkern.models.transformer import PositionalEncoder, Transformer, TransformerConfig

__all__ = [
    "GPT",
    "GPTCache",
    "GPTConfig",
    "PositionalEncoder",
    "Transformer",
    "TransformerConfig",
    "load",
    "save",
]
