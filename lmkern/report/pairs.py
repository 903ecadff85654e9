"""What the report of a run on pairs says otherwise than that of a run on text."""

from __future__ import annotations

from lmkern.report.markdown import block, code, count, duration, table, text, visible
from lmkern.report.results import result_table
from lmkern.report.run import Run


def is_pairs(run: Run) -> bool:
    """Whether the run learned from pairs."""
    stages = run.config.get("training", {}).get("stages", ())
    return bool(stages) and stages[0].get("unit") == "pairs"


def summary(run: Run, subject: str) -> str:
    """How well the model turns unseen sources into their targets. subject: the model and what it has seen."""
    if run.evaluation is None:
        return f"{subject} has not been evaluated yet: nothing can be said of its quality."
    scores = " and ".join(f"**{text(row['name'])} {row['score']:.1f}**" for row in run.evaluation["rows"])
    return (
        f"{subject} turns the {count(run.evaluation['pairs'])} sources of the "
        f"{text(run.evaluation['split'])} split into their targets with {scores}. Higher is better."
    )


def splits(run: Run) -> str:
    """The table of the splits, and how they were made."""
    fields = ("pairs", "bytes", "source_tokens", "target_tokens")
    rows = [
        (text(name), *(count(split[field]) for field in fields))
        for name, split in (run.manifest or {})["splits"].items()
    ]
    header = ("split", *(field.replace("_", " ") for field in fields))
    return (
        f"{table(header, rows, numbers=(1, 2, 3, 4))}\n\nOf the training pairs those are removed that have "
        "an empty side, stand twice, or stand in validation or test; given validation and test pairs stay."
    )


def batches(run: Run) -> str:
    """How the batches were made, and how much of them was padding."""
    shares = [f"{stage['padding']:.1%}" for stage in run.events("stage") if "padding" in stage]
    words = "Each epoch takes every pair once, in batches of pairs of like lengths"
    return f"{words}; of their tokens {', '.join(shares)} were padding." if shares else f"{words}."


def evaluation(run: Run) -> str:
    """The scores and what they were computed from."""
    if run.evaluation is None:
        return (
            f"## Evaluation\n\nThis run has not been evaluated yet: {code(f'lmkern evaluate {run.folder}')}."
        )
    found = run.evaluation
    header, *rows = result_table(found)
    shown = table(
        header, [(text(name), f"**{score}**", code(sign)) for name, score, sign in rows], numbers=(1,)
    )
    return (
        f"## Evaluation\n\n{shown}\n\nThe {text(found['split'])} split: {count(found['pairs'])} pairs, "
        f"searched with {count(found['beams'])} beams and a length penalty of {found['length_penalty']:g} in "
        f"{duration(found['seconds'])}."
    )


def examples(run: Run) -> str:
    """The first pairs of the split beside what the model makes of their sources, literally."""
    found = (run.evaluation or {}).get("examples", ())
    if not found:
        return (
            "## Samples\n\nThis run holds no samples; to see some: "
            f"{code(f'lmkern translate {run.folder} --source ...')}."
        )
    parts = ["## Samples", "The first pairs of the split; none was chosen."]
    for example in found:
        lines = (f"{name}: {visible(example[name])}" for name in ("source", "output", "target"))
        parts.append(block("\n".join(lines)))
    return "\n\n".join(parts)
