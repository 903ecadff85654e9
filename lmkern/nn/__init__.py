"""Modules: parameters and initialisation around the ops, with torch.nn's names where torch has the thing."""

from lmkern.nn.attention import KeyValueCache, MultiheadAttention, SelfAttention
from lmkern.nn.block import Block
from lmkern.nn.cross_attention import CrossAttention
from lmkern.nn.dropout import Dropout
from lmkern.nn.embedding import Embedding
from lmkern.nn.feed_forward import FeedForward
from lmkern.nn.linear import Linear
from lmkern.nn.norm import LayerNorm, RMSNorm
from lmkern.nn.positions import LearnedPositions, Rotary, SinusoidalPositions, sinusoidal_positions
from lmkern.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "Block",
    "CrossAttention",
    "Dropout",
    "Embedding",
    "FeedForward",
    "KeyValueCache",
    "LayerNorm",
    "LearnedPositions",
    "Linear",
    "MultiheadAttention",
    "RMSNorm",
    "Rotary",
    "SelfAttention",
    "SinusoidalPositions",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "sinusoidal_positions",
]
