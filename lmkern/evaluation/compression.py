"""A general compressor as a language model: xz, alone and after reading the training text."""

from __future__ import annotations

import lzma

MIB = 1 << 20
# Of `xz -9`; LZMA2 takes no dictionary above 1.5 GiB.
PRESET_DICTIONARY = 64 * MIB
LARGEST_DICTIONARY = 1536 * MIB


def xz_size(data: bytes, *, dictionary: int = PRESET_DICTIONARY) -> int:
    """Bytes of `xz -9e` of data, which looks back over at most `dictionary` bytes.

    The dictionary is no larger than the data: the size is the same, and memory is 11 times the dictionary.
    """
    # LZMA2 takes no dictionary below 4 KiB.
    dict_size = max(4096, min(len(data), dictionary))
    lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dict_size}
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=[lzma2]))


def xz_bits(text: bytes) -> int:
    """Bits of `xz -9e` of text."""
    return 8 * xz_size(text)


def xz_bits_given(text: bytes, training: bytes) -> int:
    """Bits that `xz -9e` adds for text once it has the training text before it, all of it within reach."""
    both = xz_size(training + text, dictionary=LARGEST_DICTIONARY)
    return 8 * (both - xz_size(training, dictionary=LARGEST_DICTIONARY))
