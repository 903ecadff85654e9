import numpy as np
import pytest

from lmkern.evaluation.interpolation import fit_weight, interpolate


def log_probs(seed: int, n: int = 500) -> np.ndarray:
    return np.log(np.random.default_rng(seed).uniform(1e-4, 1, size=n))


def test_mixture_is_of_probabilities():
    a, b = log_probs(0), log_probs(1)
    np.testing.assert_allclose(np.exp(interpolate(a, b, 0.3)), 0.3 * np.exp(a) + 0.7 * np.exp(b))


@pytest.mark.parametrize("weight", [0, 1])
def test_an_end_of_the_mixture_is_one_model(weight):
    a, b = log_probs(0), log_probs(1)
    np.testing.assert_allclose(interpolate(a, b, weight), a if weight else b)


def test_fitted_weight_is_the_best_of_all():
    a, b = log_probs(0), log_probs(1)
    w = fit_weight(a, b)
    best = max(np.linspace(0, 1, 1001), key=lambda v: interpolate(a, b, v).mean())
    assert 0.1 < w < 0.9 and w == pytest.approx(best, abs=1e-3)
    assert interpolate(a, b, w).mean() >= interpolate(a, b, best).mean()
    assert fit_weight(b, a) == pytest.approx(1 - w, abs=1e-6)


def test_a_model_that_always_wins_takes_all_the_weight():
    a = log_probs(0)
    assert fit_weight(a, a - 1) == pytest.approx(1, abs=1e-8)
    assert fit_weight(a - 1, a) == pytest.approx(0, abs=1e-8)


def test_probabilities_far_apart_do_not_overflow():
    a, b = np.array([-2000.0, -1.0]), np.array([-1.0, -2000.0])
    assert fit_weight(a, b) == pytest.approx(0.5)
    np.testing.assert_allclose(interpolate(a, b, 0.5), -1 - np.log(2))


def test_bad_arguments_are_refused_in_words():
    a = log_probs(0)
    with pytest.raises(ValueError, match="interpolate: both models must score the same tokens"):
        interpolate(a, a[1:], 0.5)
    with pytest.raises(ValueError, match=r"weight must lie in \[0, 1\]; got 1.5"):
        interpolate(a, a, 1.5)
    with pytest.raises(ValueError, match="fit_weight: log probabilities must be finite; got 500 and 0"):
        fit_weight(a * np.nan, a)
    with pytest.raises(ValueError, match="fit_weight: expected at least one token"):
        fit_weight(a[:0], a[:0])
