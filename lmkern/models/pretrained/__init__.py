"""Models of Hugging Face's transformers, to and from ours."""

from lmkern.models.pretrained.architectures import ARCHITECTURES
from lmkern.models.pretrained.convert import from_pretrained, save_pretrained

__all__ = ["ARCHITECTURES", "from_pretrained", "save_pretrained"]
