"""The table of a model beside what counting and compressing give on the same text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lmkern.data.clean import DOCUMENT_SEPARATOR
from lmkern.evaluation.compression import xz_bits, xz_bits_given
from lmkern.evaluation.interpolation import fit_weight, interpolate
from lmkern.evaluation.kneser_ney import KneserNey
from lmkern.evaluation.perplexity import bits_per_byte, perplexity, token_log_probs

if TYPE_CHECKING:
    from lmkern.data import Dataset, Split

Progress = Callable[[str, int, int], None]


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    *,
    split: str = "test",
    context: int | None = None,
    stride: int | None = None,
    batch: int = 16,
    order: int = 5,
    name: str = "lmkern GPT",
    device: torch.device | str | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Bits per byte of the model, of modified Kneser-Ney, of both together and of xz, on one split.

    model, context, stride, batch, device: as in token_log_probs; context defaults to model.config.context.
    dataset: as lmkern.data.load gives it.
    split: "test" or "validation".
    order: of the Kneser-Ney model, which counts the training tokens and is fitted to no other split. The
        interpolation's weight is fitted on validation: when that is what is judged, the row flatters.
    name: of the model's row.
    progress: called with (stage, done, total).

    Returns {"split", "bytes", "tokens", "rows": [{"name", "bits_per_byte", ...}]}, ready for JSON. Rows of
    models over tokens also have "perplexity", the interpolation has "weight", the neural model's share. Bytes
    are those of the text; every row also pays for where each document ends.
    """
    if split not in ("test", "validation"):
        raise ValueError(
            f'evaluate: split must be "test" or "validation"; got {split!r}. '
            "On the training text the comparison means nothing"
        )
    context = cast(Any, model).config.context if context is None else context

    def neural(part: Split, stage: str) -> NDArray[np.float64]:
        return token_log_probs(
            model,
            part.tokens,
            part.documents,
            context=context,
            stride=stride,
            batch=batch,
            end_of_text=dataset.end_of_text,
            device=device,
            progress=lambda done, total: progress(stage, done, total),
        )

    train, validation, judged = dataset.train, dataset.validation, getattr(dataset, split)
    n_bytes = judged.bytes

    def row(label: str, log_probs: NDArray[np.float64], **more: float) -> dict[str, Any]:
        measures = {"bits_per_byte": bits_per_byte(log_probs, n_bytes), "perplexity": perplexity(log_probs)}
        return {"name": label, **more, **measures}

    ours = neural(judged, f"{name}, {split}")
    ours_validation = ours if judged is validation else neural(validation, f"{name}, validation")

    counting = f"modified Kneser-Ney {order}-gram"
    progress(counting, 0, 1)
    counts = KneserNey.fit(train.tokens, dataset.tokenizer.get_vocab_size(), order, documents=train.documents)
    theirs = counts.log_probs(judged.tokens, documents=judged.documents)
    theirs_validation = counts.log_probs(validation.tokens, documents=validation.documents)
    progress(counting, 1, 1)
    weight = fit_weight(ours_validation, theirs_validation)

    progress("xz -9e", 0, 2)
    text, training = _text(judged), _text(train)
    alone = xz_bits(text)
    progress("xz -9e", 1, 2)
    given = xz_bits_given(text, training)
    progress("xz -9e", 2, 2)

    rows = [
        row(name, ours),
        row(counting, theirs),
        row("interpolation", interpolate(ours, theirs, weight), weight=weight),
        {"name": "xz -9e", "bits_per_byte": alone / n_bytes},
        {"name": "xz -9e given the training text", "bits_per_byte": given / n_bytes},
    ]
    return {"split": split, "bytes": int(n_bytes), "tokens": len(ours), "rows": rows}


def _text(part: Split) -> bytes:
    """The documents of a split, each closed by a separator: xz too has to say where a document ends."""
    return "".join(document + DOCUMENT_SEPARATOR for document in part.text()).encode()
