"""Text from a model: sampling, generation with a key-value cache, beam search, streaming."""

from lmkern.generation.beam import Hypothesis, beam_search
from lmkern.generation.generate import generate, stream_text
from lmkern.generation.inference import inference
from lmkern.generation.sampling import sample

__all__ = ["Hypothesis", "beam_search", "generate", "inference", "sample", "stream_text"]
