"""What a model gives to each token of a split, and the two numbers made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from lmkern.evaluation.documents import Ints, document_spans
from lmkern.generation.inference import inference
from lmkern.ops import cross_entropy


@dataclass(frozen=True)
class Window:
    """Targets tokens[start:end] of one document, of which the first `seen` are context only.

    first: the window begins its document, so its first target follows <|endoftext|>.
    """

    start: int
    end: int
    seen: int
    first: bool


def windows(start: int, end: int, context: int, stride: int) -> list[Window]:
    """Covers tokens[start:end], one document, so that each token is scored by exactly one window.

    The first window scores all it holds; each later one begins stride tokens on and scores its last stride.
    """
    cover = [Window(start, min(start + context, end), 0, True)]
    while cover[-1].end < end:
        begin = cover[-1].start + stride
        cover.append(Window(begin, min(begin + context, end), cover[-1].end - begin, False))
    return cover


def token_log_probs(
    model: nn.Module,
    split_tokens: ArrayLike,
    documents: ArrayLike,
    *,
    context: int,
    stride: int | None = None,
    batch: int = 16,
    end_of_text: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float64]:
    """(N,) float64: the natural logarithm of the probability of each token of the split.

    Every token is predicted from the earlier ones of its own document and an <|endoftext|> before them. The
    <|endoftext|> that closes each document is scored too: a model has to say where a text ends, and every
    model in the table is charged for it alike.

    model: tokens (B, N) int64 -> logits (B, N, V), causal. It runs in evaluation mode and is left as it was.
    split_tokens: (N,) integers. documents: start offset of each document in them.
    context: the most tokens the model takes at once. In a longer document windows slide by stride (default
        context // 2), and a token is scored with at least context - stride tokens before it.
    batch: windows at once, gathered by length and padded at the right, which a causal model cannot see.
    device: where to run; default the model's own.
    progress: called with (tokens scored, tokens in all) after each batch.

    Raises ValueError unless 1 <= stride <= context and batch >= 1, and for offsets that are not documents.
    """
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(
            f"token_log_probs: stride must lie in [1, context]; got stride {stride}, context {context}. "
            "Half the context is the usual choice"
        )
    if batch < 1:
        raise ValueError(f"token_log_probs: batch must be at least 1; got {batch}")
    tokens, starts, ends = document_spans("token_log_probs", split_tokens, documents)
    device = next(model.parameters()).device if device is None else torch.device(device)

    cover = [w for start, end in zip(starts, ends, strict=True) for w in windows(start, end, context, stride)]
    # Longest first: what does not fit into memory shows at once.
    cover.sort(key=lambda w: w.start - w.end)
    log_probs = np.full(len(tokens), np.nan)
    scored = 0
    with inference(model):
        for i in range(0, len(cover), batch):
            group = cover[i : i + batch]
            inputs, targets, score = _pad(tokens, group, end_of_text)
            logits = model(inputs.to(device))  # (B, N, V)
            loss = cross_entropy(logits[score], targets[score].to(device), reduction="none")
            where = np.concatenate([np.arange(w.start + w.seen, w.end) for w in group])
            log_probs[where] = -loss.double().cpu().numpy()
            scored += len(where)
            if progress is not None:
                progress(scored, len(tokens))
    return log_probs


def _pad(tokens: Ints, group: Sequence[Window], end_of_text: int) -> tuple[Tensor, Tensor, Tensor]:
    """inputs and targets, (B, N) int64, and which targets to score, (B, N) bool, row by row."""
    shape = (len(group), max(w.end - w.start for w in group))
    inputs = np.full(shape, end_of_text, dtype=np.int64)
    targets = np.full(shape, end_of_text, dtype=np.int64)
    score = np.zeros(shape, dtype=bool)
    for row, w in enumerate(group):
        length = w.end - w.start
        inputs[row, 0] = end_of_text if w.first else tokens[w.start - 1]
        inputs[row, 1:length] = tokens[w.start : w.end - 1]
        targets[row, :length] = tokens[w.start : w.end]
        score[row, w.seen : length] = True
    return torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(score)


def bits_per_byte(log_probs: NDArray[np.float64], n_bytes: int) -> float:
    """The bits that an arithmetic coder with these probabilities needs, for each byte of the text.

    log_probs: natural logarithms, one a token. n_bytes: UTF-8 bytes of the text those tokens stand for.
    Unlike perplexity it compares models over different vocabularies, and models with compressors.
    """
    if n_bytes < 1:
        raise ValueError(f"bits_per_byte: n_bytes must be at least 1; got {n_bytes}. Is the split empty?")
    return float(-np.sum(log_probs) / math.log(2) / n_bytes)


def perplexity(log_probs: NDArray[np.float64]) -> float:
    """exp(-mean(log_probs)): the number of equally likely tokens that would be as hard to guess."""
    if not len(log_probs):
        raise ValueError("perplexity: expected at least one token; got none. Is the split empty?")
    return float(np.exp(-np.mean(log_probs)))
