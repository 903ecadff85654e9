"""Philox4x32-10 against the known answers of its authors, and the masks that dropout makes of it."""

import math

import pytest
import torch

from lmkern.kernels.philox import LEVELS, keep_mask, keep_scale, philox, threshold

# The kat_vectors of the Random123 library: counter, key, random words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def single(number: int) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    found = philox([single(word) for word in words(counter)], [single(word) for word in words(key)])
    assert found.tolist() == words(expected)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_many_counters_at_once_are_each_their_own(counter: str, key: str, expected: str) -> None:
    rows = [torch.tensor([word, 5, word]) for word in words(counter)]
    found = philox(rows, [single(word) for word in words(key)])
    assert found[0].tolist() == found[2].tolist() == words(expected)
    assert found[1].tolist() != words(expected)


def test_mask_takes_its_bits_as_the_contract_says() -> None:
    seed, p = -0x123456789ABCDEF, 0.37
    mask = keep_mask(torch.tensor(seed), p, (2, 3, 5, 21), outermost=7)
    assert mask.shape == (2, 3, 5, 21)
    key = [single(seed & 0xFFFFFFFF), single(seed >> 32 & 0xFFFFFFFF)]
    for sequence, head, i, j in [(0, 0, 0, 0), (1, 2, 4, 20), (1, 0, 3, 9), (0, 2, 1, 14), (1, 1, 4, 7)]:
        word = philox([single(x) for x in (j // 8, i, head, sequence + 7)], key)[(j % 8) // 2].item()
        bits = int(word) >> 16 if j % 2 else int(word) & 0xFFFF
        assert mask[sequence, head, i, j] == (bits >= round(p * 65536))


def test_rows_and_columns_alone_are_the_first_head_of_the_first_sequence() -> None:
    seed = torch.tensor(5)
    assert torch.equal(keep_mask(seed, 0.5, (9, 30)), keep_mask(seed, 0.5, (2, 3, 9, 30))[0, 0])
    assert torch.equal(keep_mask(seed, 0.5, (30,)), keep_mask(seed, 0.5, (9, 30))[0])


def test_a_mask_does_not_depend_on_the_size_of_the_rest() -> None:
    seed = torch.tensor(2**62 + 17)
    whole = keep_mask(seed, 0.5, (3, 4, 20, 40))
    assert torch.equal(keep_mask(seed, 0.5, (1, 2, 7, 13), outermost=2)[0], whole[2, :2, :7, :13])


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.1, 0.5, 0.9, 1.0])
def test_share_that_is_kept(p: float) -> None:
    mask = keep_mask(torch.tensor(3), p, (4, 4, 100, 100))
    probability = threshold(p) / LEVELS
    allowed = 5 * math.sqrt(probability * (1 - probability) / mask.numel())
    assert abs(1 - mask.double().mean().item() - probability) <= allowed


def test_neighbours_are_independent() -> None:
    # Correlations along every dimension, within five standard deviations of 1 / sqrt(elements).
    kept = keep_mask(torch.tensor(11), 0.5, (8, 8, 64, 64)).double() - 0.5
    for dimension in range(4):
        size = kept.shape[dimension] - 1
        product = kept.narrow(dimension, 0, size) * kept.narrow(dimension, 1, size) * 4
        assert abs(product.mean().item()) < 5 / math.sqrt(product.numel())


def test_seeds_and_their_upper_halves_matter() -> None:
    masks = [keep_mask(torch.tensor(seed), 0.5, (16, 64)) for seed in (0, 1, 1 << 32, -1)]
    for i, mask in enumerate(masks):
        assert not any(torch.equal(mask, other) for other in masks[:i])


def test_scale_is_one_over_the_probability_as_rounded() -> None:
    assert keep_scale(0.0) == keep_scale(1e-6) == 1.0
    assert keep_scale(0.5) == 2.0
    assert keep_scale(0.1) == 65536 / (65536 - 6554)
    assert keep_scale(1.0) == 0.0


def test_no_elements() -> None:
    assert keep_mask(torch.tensor(0), 0.5, (2, 0, 3, 0)).shape == (2, 0, 3, 0)
    assert keep_mask(torch.tensor(0), 0.5, (0, 8)).shape == (0, 8)
