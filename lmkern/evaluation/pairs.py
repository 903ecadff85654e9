"""How well a model turns the sources of a split into its targets: BLEU and chrF."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lmkern.generation.rewrite import rewrite

if TYPE_CHECKING:
    from lmkern.data import PairDataset
    from lmkern.generation.beam import EncoderDecoder


def evaluate_pairs(
    model: EncoderDecoder,
    dataset: PairDataset,
    *,
    split: str = "test",
    beams: int = 5,
    length_penalty: float = 1.0,
    max_new_tokens: int = 256,
    batch: int = 64,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    note: Callable[[str], object] = warnings.warn,
) -> dict[str, Any]:
    """Corpus BLEU and chrF of the model's targets against those of the split, all pairs of it.

    split: "test" or "validation". The other options are those of rewrite.

    Returns {"split", "pairs", "beams", "length_penalty", "seconds", "rows": [{"name", "score", "signature"},
    ...], "examples": the first three, {"source", "target", "output"}}, ready for JSON; "outputs" holds them
    all. Raises ValueError for another split, ImportError where sacrebleu is not installed.
    """
    if split not in ("test", "validation"):
        raise ValueError(f'evaluate: split must be "test" or "validation"; got {split!r}')
    pairs = getattr(dataset, split).text()
    start = time.perf_counter()
    outputs = rewrite(
        model,
        dataset.tokenizer,
        [source for source, _ in pairs],
        beams=beams,
        length_penalty=length_penalty,
        max_new_tokens=max_new_tokens,
        batch=batch,
        progress=lambda done, total: progress(f"beam search, {split}", done, total),
        note=note,
    )
    seconds = time.perf_counter() - start
    examples = [
        {"source": source, "target": target, "output": output}
        for (source, target), output in zip(pairs, outputs, strict=True)
    ]
    return {
        "split": split,
        "pairs": len(pairs),
        "beams": beams,
        "length_penalty": length_penalty,
        "seconds": seconds,
        "rows": corpus_scores(outputs, [target for _, target in pairs]),
        "examples": examples[:3],
        "outputs": outputs,
    }


def corpus_scores(outputs: Sequence[str], references: Sequence[str]) -> list[dict[str, Any]]:
    """[{"name": "BLEU" or "chrF", "score": 0 to 100, "signature"}], sacrebleu's with its defaults.

    BLEU: Papineni et al. 2002; chrF: Popovic 2015; what the signature says: Post 2018, arXiv:1804.08771.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        raise ImportError(
            "evaluate: BLEU and chrF need sacrebleu: pip install 'lmkern[translation]'"
        ) from None
    rows = []
    for name, metric in (("BLEU", BLEU()), ("chrF", CHRF())):
        score = metric.corpus_score(list(outputs), [list(references)])
        rows.append({"name": name, "score": score.score, "signature": str(metric.get_signature())})
    return rows
