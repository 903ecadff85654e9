"""From source texts to target texts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from lmkern.generation.beam import EncoderDecoder, beam_search, room

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def rewrite(
    model: EncoderDecoder,
    tokenizer: Tokenizer,
    sources: Sequence[str],
    *,
    beams: int = 5,
    length_penalty: float = 1.0,
    max_new_tokens: int = 256,
    batch: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
    note: Callable[[str], object] = warnings.warn,
) -> list[str]:
    """The target text of each source, by beam search.

    beams, length_penalty, max_new_tokens: as in beam_search. batch: sources at once, gathered by length.
    An empty source gives an empty target, and so does one too long for the model's context, which is said by
    note. progress: called with (sources done, sources in all).
    """
    ids = [encoding.ids for encoding in tokenizer.encode_batch([source.strip() for source in sources])]
    # Longest first: what does not fit into memory shows at once.
    order = sorted((index for index, tokens in enumerate(ids) if tokens), key=lambda index: -len(ids[index]))
    context: int | None = getattr(model, "context", None)
    # A source is read with its end.
    long = [index for index in order if room(context, len(ids[index]) + 1) < 1]
    for index in sorted(long):
        note(
            f"rewrite: source {index + 1} has {len(ids[index])} tokens and its end; the model's context of "
            f"{context} leaves no room for a target, which is left empty: {sources[index].strip()[:40]!r}"
        )
    order = order[len(long) :]
    targets = [""] * len(sources)
    end: int = model.config.end
    done = 0
    while done < len(order):
        group = order[done : done + batch]
        if getattr(model, "equal_lengths", False):
            group = [index for index in group if len(ids[index]) == len(ids[group[0]])]
        rows = [torch.tensor([*ids[index], end]) for index in group]
        source = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=end)
        lengths = torch.tensor([len(row) for row in rows])
        found = beam_search(
            model,
            source,
            torch.arange(source.shape[1]) < lengths[:, None],
            beams=beams,
            length_penalty=length_penalty,
            max_new_tokens=max_new_tokens,
        )
        for index, hypothesis in zip(group, found, strict=True):
            targets[index] = tokenizer.decode(list(hypothesis.tokens)).strip()
        done += len(group)
        progress(done, len(order))
    return targets
