"""Text from a model: sampling, generation with a key-value cache, beam search, streaming."""

from lmkern.generation.beam import Hypothesis, beam_search
from lmkern.generation.generate import generate, stream_text
from lmkern.generation.inference import inference
from lmkern.generation.prefix import PrefixDecoder
from lmkern.generation.rewrite import rewrite
from lmkern.generation.sampling import sample

__all__ = [
    "Hypothesis",
    "PrefixDecoder",
    "beam_search",
    "generate",
    "inference",
    "rewrite",
    "sample",
    "stream_text",
]
