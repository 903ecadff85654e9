"""Text from a model: sampling, generation with a key-value cache, streaming."""

from lmkern.generation.generate import generate, stream_text
from lmkern.generation.inference import inference
from lmkern.generation.sampling import sample

__all__ = ["generate", "inference", "sample", "stream_text"]
