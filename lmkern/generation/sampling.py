"""The choice of a token from logits."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor


def check_sampling(name: str, *, temperature: float, top_k: int, top_p: float) -> None:
    """Raises ValueError, in the name of the calling function, for options that select nothing."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(
            f"{name}: temperature must be finite and at least 0; got {temperature}. "
            "0 takes the likeliest token, 1 samples from the model's own distribution"
        )
    if not isinstance(top_k, Integral) or top_k < 0:
        raise ValueError(f"{name}: top_k must be an integer, at least 0; got {top_k}. 0 keeps every token")
    if not 0 < top_p <= 1:
        raise ValueError(f"{name}: top_p must lie in (0, 1]; got {top_p}. 1 keeps every token")


def check_largest(name: str, largest: Tensor) -> None:
    """Raises ValueError, in the name of the calling function, where the largest of a row is not finite."""
    if not largest.isfinite().all():
        raise ValueError(
            f"{name}: the largest logit of each row must be finite; "
            f"got {largest.flatten().tolist()[:4]} in the first rows. "
            "A model that gives NaN has diverged: take an earlier checkpoint"
        )


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token id for each row of logits.

    logits: (..., V). The filters apply in this order, each to what the one before left:
    temperature: logits are divided by it; 0 takes the likeliest token, whatever the filters.
    top_k: keep the k likeliest tokens; 0 keeps all.
    top_p: keep the fewest likeliest tokens whose probabilities sum to at least top_p (Holtzman et al. 2020,
        arXiv:1904.09751).
    generator: on the device of logits; default torch's global one.

    Among equals the lowest id is the likelier. Returns (...) int64.
    Raises ValueError for options out of range, and for rows that are no distribution (NaN, +inf, all -inf).
    """
    check_sampling("sample", temperature=temperature, top_k=top_k, top_p=top_p)
    # float64, where no temperature is rounded to 0 and the sums of top_p are exact enough.
    ranked, ids = logits.double().sort(dim=-1, descending=True, stable=True)
    # NaN sorts as the largest, so the first of each row tells of the whole row.
    check_largest("sample", ranked[..., 0])
    if temperature == 0:
        return ids[..., 0]
    # With the largest at 0 no temperature, however small, can overflow.
    ranked = (ranked - ranked[..., :1]) / temperature
    if top_k:
        ranked[..., top_k:] = -torch.inf
    probability = ranked.softmax(dim=-1)
    if top_p < 1:
        # The likeliest token has nothing before it and always stays.
        before = probability.cumsum(dim=-1) - probability
        probability = probability.masked_fill(before >= top_p, 0)
    drawn = torch.multinomial(probability.reshape(-1, ids.shape[-1]), 1, generator=generator)
    return ids.gather(-1, drawn.view(*ids.shape[:-1], 1)).squeeze(-1)
