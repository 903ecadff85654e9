"""Text from a model, one token at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from operator import index
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from lmkern.generation.inference import inference
from lmkern.generation.sampling import check_sampling, sample

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Cache(Protocol):
    """The keys and values of the tokens read so far."""

    @property
    def length(self) -> int: ...


class CachedModel(Protocol):
    """What generation asks of a model: any nn.Module with these."""

    @property
    def config(self) -> Any:
        """With a field `context`: the most tokens a cache holds."""

    def new_cache(self, batch: int) -> Cache: ...

    def __call__(self, tokens: Tensor, *, cache: Cache) -> Tensor:
        """tokens (B, N) int64, which follow those in the cache and join it -> logits (B, N, V)."""


def generate(
    model: CachedModel,
    prompt_tokens: Sequence[int] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | Collection[int] | Tensor | np.integer[Any] | None = None,
) -> Iterator[int]:
    """Token ids that continue the prompt, each as soon as it is drawn.

    prompt_tokens: at least one token. To start from nothing give <|endoftext|>. Of a prompt longer than the
        model's context only the end is read.
    temperature, top_k, top_p: as in sample.
    seed: the same seed, model, device and options give the same tokens; torch's own generator is not touched.
    stop: an id, or several, that ends the text and is not itself part of it.

    Each step reads one token against the key-value cache. Positions in a cache are absolute, so a full one is
    built anew from the last half of the context, and what stood before is forgotten. Between two tokens the
    model is in the mode its owner left it in.

    Raises ValueError for bad options: from the call, not from the first token.
    """
    prompt = _ids("prompt_tokens", prompt_tokens)
    if not prompt:
        raise ValueError(
            "generate: expected at least one prompt token; got none. "
            "To start from nothing, pass the id of <|endoftext|>"
        )
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be at least 0; got {max_new_tokens}")
    check_sampling("generate", temperature=temperature, top_k=top_k, top_p=top_p)
    given = stop.tolist() if isinstance(stop, Tensor | np.ndarray | np.generic) else stop
    stops = set(_ids("stop", () if given is None else [given] if isinstance(given, int) else given))
    # On the CPU, whatever the model's device: one stream of random numbers everywhere.
    generator = torch.Generator().manual_seed(seed)
    ids = _next_tokens(model, prompt, temperature, top_k, top_p, generator)
    return _until(ids, max_new_tokens, stops)


def _ids(what: str, tokens: Iterable[Any]) -> list[int]:
    try:
        return [index(token) for token in tokens]
    except TypeError:
        got = f"shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else repr(tokens)
        raise ValueError(f"generate: {what} must be ids of tokens, in one dimension; got {got}") from None


def _until(ids: Iterator[int], most: int, stops: set[int]) -> Iterator[int]:
    for _ in range(most):
        token = next(ids)
        if token in stops:
            return
        yield token


def _next_tokens(
    model: CachedModel,
    prompt: list[int],
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator,
) -> Iterator[int]:
    """Without end. Inference mode belongs to the thread, so it is left before each token is handed out."""
    module = cast(nn.Module, model)
    device = next(module.parameters()).device
    context: int = model.config.context
    recent = prompt[-context:]
    unread = recent
    cache = model.new_cache(1)
    while True:
        if cache.length == context:
            unread = recent = recent[-max(1, context // 2) :]
            cache = model.new_cache(1)
        with inference(module):
            logits = model(torch.tensor([unread], device=device), cache=cache)[0, -1].cpu()  # (V,)
            token = int(
                sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            )
        recent.append(token)
        unread = [token]
        yield token


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of the ids, in pieces that never end inside a character and join to tokenizer.decode(ids).

    tokenizer: byte-level, so that its text is the bytes of its tokens put together. Special tokens have none.
    """
    held: list[int] = []
    for token in ids:
        held.append(token)
        text = tokenizer.decode(held)
        # Bytes that are no character yet, or never will be, decode to U+FFFD: the next token decides.
        if text and not text.endswith("\ufffd"):
            yield text
            held.clear()
    if rest := tokenizer.decode(held):
        yield rest
