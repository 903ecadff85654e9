"""The random bits of dropout: Philox4x32-10, a function of a seed and of where an element stands.

Nothing is stored between forward and backward, and every backend draws the same mask. Here in torch's
integers, as the specification; kernels compute the same in registers.

Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Dropout compares 16 bits an element with an integer: a probability is a multiple of 1 / LEVELS.
LEVELS = 1 << 16

_ROUNDS = 10
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
# The golden ratio and sqrt(3) - 1, as fractions of 2^32.
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
# Elements that one block of 128 bits serves.
_ELEMENTS = 8


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> Tensor:
    """Four words of 32 random bits for each counter: int64, with one more dimension of size 4 at the end.

    counter: four, key: two int64 tensors of numbers below 2^32, which broadcast against each other.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A product wraps around in 64 bits, and the mask takes the sign off its upper half.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            (product0 >> 32 & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = k0 + _KEY_STEPS[0] & _WORD, k1 + _KEY_STEPS[1] & _WORD
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)


def threshold(dropout_p: float) -> int:
    """An element is kept if its 16 bits are at least this: dropout_p in units of 1 / LEVELS."""
    return round(dropout_p * LEVELS)


def keep_scale(dropout_p: float) -> float:
    """What a kept element is multiplied by: 1 / (1 - p) of p as rounded; 0 where nothing is kept."""
    kept = LEVELS - threshold(dropout_p)
    return LEVELS / kept if kept else 0.0


def keep_mask(seed: Tensor, dropout_p: float, shape: Sequence[int], *, outermost: int = 0) -> Tensor:
    """Which elements of a tensor dropout keeps: booleans of this shape, on the seed's device.

    shape: one to four sizes, the last being columns; leading ones that are missing count as 1. Attention's
        weights are (sequence, head, query, key), the rows of a norm (row, column).
    outermost: what the first of four dimensions counts from.

    With the key (low, high 32 bits of seed) and the counter (column // 8, row, head, sequence), column j
    takes 16 of the 128 bits: word (j % 8) // 2, its low half if j is even.
    """
    sizes = (1,) * (4 - len(shape)) + tuple(shape)
    sequence, head, row, block = (
        torch.arange(size, device=seed.device).view(-1, *(1,) * (3 - dimension))
        for dimension, size in enumerate((*sizes[:3], -(-sizes[3] // _ELEMENTS)))
    )
    words = philox(
        (block, row, head, sequence + outermost), (seed & _WORD, seed >> 32 & _WORD)
    )  # (sequence, head, row, block, 4)
    bits = torch.stack((words & LEVELS - 1, words >> 16), -1)
    kept = bits.flatten(3) >= threshold(dropout_p)  # (sequence, head, row, columns, rounded up to 8)
    return kept[..., : sizes[3]].reshape(tuple(shape))
