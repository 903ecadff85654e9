import pytest
import torch

from lmkern.generation.sampling import sample

PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.3])


def frequencies(n: int = 20_000, **options: float) -> torch.Tensor:
    logits = PROBABILITIES.log().expand(n, 4)
    ids = sample(logits, generator=torch.Generator().manual_seed(0), **options)
    return ids.bincount(minlength=4) / n


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        # Sharpened, 16/30 and 9/30 reach 0.8; as they were, 0.4 and 0.3 would not.
        ({"temperature": 0.5, "top_p": 0.8}, [0, 16 / 25, 0, 9 / 25]),
        # Of the two that top-k leaves, 4/7 reaches 0.5; of all four 0.4 does not.
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_the_filters_say(options, expected):
    got = frequencies(**options)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32), atol=0.015, rtol=0)
    assert (got[torch.tensor(expected) == 0] == 0).all()


def test_temperature_zero_takes_the_likeliest_and_the_lowest_id_of_equals():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert sample(logits, temperature=0).tolist() == [1, 0]


def test_top_k_keeps_exactly_k_among_equals():
    ids = sample(torch.zeros(2000, 6), top_k=3, generator=torch.Generator().manual_seed(0))
    assert set(ids.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 5e-324])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tiny_temperature_is_the_likeliest_token(dtype, temperature):
    logits = torch.tensor([1.0, 90.0, 3.0, 80.0], dtype=dtype)
    assert sample(logits, temperature=temperature).item() == 1


def test_shape_loses_the_vocabulary_and_the_logits_are_untouched():
    logits = torch.randn(2, 3, 5)
    before = logits.clone()
    ids = sample(logits, top_k=2, top_p=0.5)
    assert ids.shape == (2, 3) and ids.dtype == torch.int64 and torch.equal(logits, before)
    assert sample(torch.randn(5)).shape == ()


def test_forbidden_tokens_are_never_drawn():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0]).expand(500, 4)
    assert set(sample(logits).tolist()) == {1, 3}


def test_generator_decides():
    logits = torch.zeros(50, 9)
    first, again, other = (sample(logits, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be finite and at least 0; got -1.0"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"temperature": float("inf")}, "temperature must be finite"),
        ({"top_k": -1}, "top_k must be an integer, at least 0; got -1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]; got 0.0"),
        ({"top_p": 1.1}, r"top_p must lie in \(0, 1\]; got 1.1"),
    ],
)
def test_options_out_of_range_are_refused_in_words(options, message):
    with pytest.raises(ValueError, match="sample: " + message):
        sample(torch.zeros(4), **options)


@pytest.mark.parametrize("bad", [[0.0, torch.nan], [torch.inf, 0.0], [-torch.inf, -torch.inf]])
@pytest.mark.parametrize("temperature", [0, 1])
def test_rows_that_are_no_distribution_are_refused(bad, temperature):
    with pytest.raises(ValueError, match="the largest logit of each row must be finite"):
        sample(torch.tensor([[0.0, 1.0], bad]), temperature=temperature)
