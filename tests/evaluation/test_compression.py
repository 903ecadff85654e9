import lzma
import random

import pytest

from lmkern.evaluation.compression import xz_bits, xz_bits_given, xz_size


def words(seed: int, n: int) -> bytes:
    rng = random.Random(seed)
    return " ".join(f"{rng.randrange(10**6)}" for _ in range(n)).encode()


@pytest.mark.parametrize("data", [b"", b"a", words(0, 200), words(0, 20_000)])
def test_size_is_that_of_xz_9e(data):
    assert xz_size(data) == len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    assert xz_bits(data) == 8 * xz_size(data)


def test_text_seen_in_training_costs_almost_nothing():
    seen, filler = words(0, 2000), words(1, 20_000)
    assert xz_bits_given(seen, seen + filler) < 0.02 * xz_bits(seen)


def test_unrelated_training_text_does_not_help_much():
    assert xz_bits_given(words(0, 2000), bytes(range(256)) * 10) > 0.95 * xz_bits(words(0, 2000))


def test_dictionary_limits_how_far_back_xz_looks():
    seen = random.Random(0).randbytes(30_000)
    data = seen + random.Random(1).randbytes(60_000) + seen
    assert xz_size(data, dictionary=200_000) < 95_000 < xz_size(data, dictionary=8192)
