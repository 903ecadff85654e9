"""The error budget: what passes, what does not, and what it says."""

import math

import pytest
import torch

from lmkern.testing.error_budget import (
    DRAWS,
    MOST_DRAWS,
    Draw,
    Errors,
    geometric_mean,
    mean_over_budget,
    mean_verdicts,
    measure,
    over_budget,
    unit_in_last_place,
    verdicts,
)


def test_unit_is_the_distance_to_the_next_number() -> None:
    for dtype in (torch.float32, torch.float64):
        for size in (1.0, 1.5, 3.7, 1000.0, 1e-5):
            x = torch.tensor(size, dtype=dtype)
            assert unit_in_last_place(float(x), dtype) == float(torch.nextafter(x, x * 2) - x)
    assert unit_in_last_place(1.0, torch.bfloat16) == 2**-7
    assert unit_in_last_place(0.0, torch.float32) > 0


def test_errors_are_counted_in_units_of_the_largest_element() -> None:
    exact = torch.tensor([4.0, 0.0], dtype=torch.float64)
    ours = torch.tensor([4.0, 3 * 2**-21])
    torchs = torch.tensor([4.0 + 2**-21, 0.0])
    errors = measure(ours, torchs, exact)
    assert errors.unit == 2**-21
    assert (errors.ours_worst, errors.torchs_worst) == (3.0, 1.0)
    assert errors.ours_typical == pytest.approx(3 / math.sqrt(2))
    assert errors.ratio == pytest.approx(3.0)


def test_twice_torchs_error_is_the_limit() -> None:
    assert over_budget("dq", Errors(4.0, 2.0, 2.0, 1.0, 1e-7)) is None
    assert over_budget("dq", Errors(4.1, 2.0, 2.0, 1.0, 1e-7)) == (
        "dq: the largest error is 4.1 units in the last place (1.00e-07); torch's is 2, which allows 4"
    )
    assert over_budget("dq", Errors(4.0, 2.0, 2.1, 1.0, 1e-7)) == (
        "dq: the typical error is 2.1 units in the last place (1.00e-07); torch's is 1, which allows 2"
    )
    assert over_budget("dq", Errors(5.0, 2.0, 3.0, 1.0, 1e-7), 1.0) is None
    assert over_budget("dq", Errors(5.1, 2.0, 3.0, 1.0, 1e-7), 1.0) is not None


def test_half_a_unit_is_allowed_to_everyone() -> None:
    assert over_budget("out", Errors(1.0, 0.0, 1.0, 0.0, 1e-7)) is None
    assert over_budget("out", Errors(1.1, 0.0, 0.0, 0.0, 1e-7)) is not None
    assert over_budget("out", Errors(0.0, 0.0, 1.1, 0.0, 1e-7)) is not None
    assert Errors(0.0, 0.0, 0.4, 0.1, 1.0).ratio == 1.0


def of_seeds(*errors: Errors, seeds: list[int] | None = None) -> Draw:
    """The errors of a result by the seed, the last ones for all further seeds."""

    def draw(seed: int) -> dict[str, Errors]:
        if seeds is not None:
            seeds.append(seed)
        return {"dq": errors[min(seed, len(errors) - 1)]}

    return draw


def test_what_is_over_the_budget_is_judged_on_more_draws_together() -> None:
    fine = Errors(2.0, 2.0, 1.0, 1.0, 1e-7, elements=5000)
    unlucky = Errors(4.1, 2.0, 1.0, 1.0, 1e-7, elements=5000)
    torchs_luck = Errors(2.0, 2.1, 1.0, 1.0, 1e-7, elements=5000)
    seeds: list[int] = []
    assert verdicts(of_seeds(fine, seeds=seeds)) == []
    assert set(seeds) == {0}
    assert verdicts(of_seeds(unlucky, torchs_luck, seeds=seeds)) == []
    assert set(seeds) == set(range(DRAWS))
    # The draw that was over is among those judged.
    assert len(verdicts(of_seeds(unlucky, fine))) == 1
    assert verdicts(of_seeds(unlucky, fine), 1.0) == []


def test_few_elements_are_judged_on_the_more_draws() -> None:
    for elements, count in ((1, MOST_DRAWS), (100, 40), (100_000, DRAWS)):
        seeds: list[int] = []
        verdicts(of_seeds(Errors(9.0, 1.0, 1.0, 1.0, 1e-7, elements=elements), seeds=seeds))
        assert set(seeds) == set(range(count))


def test_geometric_mean_over_many_elements_may_be_one() -> None:
    twice, half = Errors(0, 0, 2.0, 1.0, 1.0), Errors(0, 0, 1.0, 2.0, 1.0)
    assert geometric_mean([twice, half]) == pytest.approx(1.0)
    assert mean_over_budget("out", [half, half, twice]) is None
    verdict = mean_over_budget("out", [twice, twice, half])
    assert verdict is not None
    assert "over 3 shapes the errors are 1.2599 times torch's" in verdict
    little = Errors(0, 0, 1.04, 1.0, 1.0)
    verdict = mean_over_budget("out", [little])
    assert verdict is not None
    assert "of at least 256 elements the errors are 1.0400 times torch's" in verdict
    assert mean_over_budget("out", [little], 1.05) is None


def test_geometric_mean_over_few_elements_may_be_a_twentieth_more() -> None:
    few = Errors(0, 0, 1.05, 1.0, 1.0, elements=10)
    assert mean_over_budget("out", [few]) is None
    assert mean_over_budget("out", [Errors(0, 0, 1.06, 1.0, 1.0, elements=10)]) is not None
    assert geometric_mean([few, Errors(0, 0, 1.0, 2.0, 1.0)], 256) == pytest.approx(0.5)


def test_means_over_the_budget_are_judged_on_more_draws() -> None:
    bad, good = Errors(0, 0, 3.0, 1.0, 1.0, elements=512), Errors(0, 0, 1.0, 1.5, 1.0, elements=512)
    assert mean_verdicts([of_seeds(good), of_seeds(bad, good)], 0.0) == []
    assert len(mean_verdicts([of_seeds(good), of_seeds(bad)], 0.0)) == 1


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_and_should_be_is_an_infinite_error(wrong: float) -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    errors = measure(torch.tensor([wrong, 2.0]), torch.tensor([1.0, 2.0]), exact)
    assert errors.ours_worst == math.inf
    assert over_budget("out", errors) is not None
    # It is no excuse that torch's is not finite either.
    assert (
        over_budget("out", measure(torch.tensor([wrong, 2.0]), torch.tensor([wrong, 2.0]), exact)) is not None
    )


@pytest.mark.parametrize("right", [math.nan, math.inf, -math.inf])
def test_what_should_not_be_finite_must_not_be(right: float) -> None:
    exact = torch.tensor([right, 2.0], dtype=torch.float64)
    same = torch.tensor([right, 2.0])
    assert over_budget("lse", measure(same, same, exact)) is None
    assert over_budget("lse", measure(torch.tensor([0.0, 2.0]), same, exact)) is not None


def test_shapes_must_be_the_same() -> None:
    with pytest.raises(ValueError, match=r"expected shape \(2,\); got \(1,\)"):
        measure(torch.zeros(1), torch.zeros(2), torch.zeros(2, dtype=torch.float64))
