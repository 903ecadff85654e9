"""The report of a run as Markdown, section by section, each from what the run folder holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmkern.data.clean import MIN_DUPLICATE_CHARACTERS
from lmkern.data.shards import REMOVED
from lmkern.report import pairs
from lmkern.report.markdown import bar, block, code, count, duration, size, table, text, visible
from lmkern.report.reproduce import commands
from lmkern.report.results import result_rows, result_table, versus
from lmkern.report.run import Run, encodings
from lmkern.training.run_folder import CURVES, PHASES

ENDINGS = {
    "tokens": "the whole budget",
    "early stopping": "stopped early because validation no longer gained",
    "interrupted": "not finished: the figures are those so far",
}


def report(run: Run) -> str:
    """The whole page. Of a piece that the run does not have yet it says so, with the verb that makes it."""
    sections = (heading, corpus, model, training, evaluation, samples, time, machine, again)
    return "\n\n".join(section(run) for section in sections) + "\n"


def title(run: Run) -> str:
    """What the page is called."""
    name = (run.manifest or {}).get("corpus", {}).get("name")
    kind = "A model" if pairs.is_pairs(run) else "A language model"
    return f"{kind} of {name}" if name else f"Run {run.folder.resolve().name}"


def heading(run: Run) -> str:
    """Title, and the result in one honest sentence."""
    return f"# {text(title(run))}\n\n> {summary(run)}"


def summary(run: Run) -> str:
    """How well the model predicts unseen text, beside the strongest simple models."""
    trained = run.events("end")
    steps = run.events("step")
    seen = f" trained on {count(steps[-1]['tokens'])} tokens" if steps else ""
    if trained and "train" in run.timings:
        seen += f" in {duration(run.timings['train'])}"
    size_of_model = f" of {count(run.parameters)} parameters" if run.parameters else ""
    if pairs.is_pairs(run):
        return pairs.summary(run, f"A model{size_of_model}{seen}")
    subject = f"A GPT{size_of_model}{seen}"
    rows = result_rows(run.evaluation or {})
    if "gpt" not in rows:
        return f"{subject} has not been evaluated yet: nothing can be said of its quality."
    ours = rows["gpt"]["bits_per_byte"]
    sentence = f"{subject} predicts unseen text of this corpus at **{ours:.3f} bits per byte**"
    if "kneser-ney" in rows:
        theirs = rows["kneser-ney"]["bits_per_byte"]
        sentence += f"; a modified Kneser-Ney 5-gram model of the same tokens reaches {theirs:.3f}, "
        sentence += f"so the GPT is {versus(ours, theirs)}"
    if "interpolation" in rows:
        sentence += f"; the two interpolated reach {rows['interpolation']['bits_per_byte']:.3f}"
    if "given" in rows:
        sentence += f"; `xz` that has read the training text, {rows['given']['bits_per_byte']:.3f}"
    return sentence + ". Lower is better."


def corpus(run: Run) -> str:
    """Name, source, hash, sizes, splits, and what was removed and why."""
    if run.manifest is None:
        return f"## Corpus\n\nThe data folder {code(run.data)} is not there: its manifest cannot be shown."
    about, manifest = run.manifest["corpus"], run.manifest
    facts = [
        ("name", text(about["name"])),
        ("sources", ", ".join(code(source) for source in about.get("sources", ())) or "-"),
        ("size", f"{size(about['bytes'])} of text; files or documents read: {count(about['files'])}"),
        ("Python that prepared it", text(manifest.get("python", "not recorded"))),
        ("SHA-256 of the cleaned text", code(about["sha256"])),
        (
            "vocabulary",
            f"{count(manifest['vocab_size'])} tokens, byte-level BPE trained on the training split",
        ),
    ]
    parts = [
        "## Corpus",
        table(("", ""), facts),
        "### Splits",
        pairs.splits(run) if pairs.is_pairs(run) else splits(manifest),
        "### Preparation",
        table(("counted", "number"), counted(manifest.get("counts", {})), numbers=(1,)),
        removed(run),
    ]
    if others := encodings(manifest, code):
        parts.append(f"Files read as something else than UTF-8: {others}.")
    return "\n\n".join(parts)


def splits(manifest: Mapping[str, Any]) -> str:
    """The table of the splits, and how they were made."""
    rows = [
        (text(name), *(count(split[field]) for field in ("documents", "bytes", "tokens")), density(split))
        for name, split in manifest["splits"].items()
    ]
    return (
        table(("split", "documents", "bytes", "tokens", "bytes a token"), rows, numbers=(1, 2, 3, 4))
        + "\n\nLonger texts are cut into documents; a hash of its content gives each its split. No document "
        f"and no paragraph of {MIN_DUPLICATE_CHARACTERS} characters or more stands in two splits. Shorter "
        "paragraphs (a heading, a speaker's name) may."
    )


def density(split: Mapping[str, Any]) -> str:
    """Bytes a token of one split."""
    return f"{split['bytes'] / split['tokens']:.2f}" if split["tokens"] else "-"


def counted(counts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The counts of the preparation, names with spaces; a nested count carries the outer name."""
    rows: list[tuple[str, str]] = []
    for name, value in counts.items():
        label = text(name.replace("_", " "))
        if value is None:
            rows.append((label, "-"))
        elif isinstance(value, Mapping):
            rows += [(f"{label}: {inner}", number) for inner, number in counted(value)]
        else:
            rows.append((label, count(value) if isinstance(value, int | float) else text(value)))
    return rows


def removed(run: Run) -> str:
    """What was removed, by reason."""
    if not run.removed:
        return "Nothing was removed."
    rows = [(text(reason), count(found.pieces), count(found.bytes)) for reason, found in run.removed.items()]
    shown = table(("removed because", "pieces", "bytes"), rows, numbers=(1, 2))
    if skipped := run.removed.get("not text"):
        shown += f"\n\nFiles skipped because they are not text: {skipped.names(code)}."
    return f"{shown}\n\nEach is listed with its reason in {code(shown_path(run) / REMOVED)}."


def shown_path(run: Run) -> Path:
    """The data folder as seen from the run folder where it lies inside it."""
    data, folder = run.data.resolve(), run.folder.resolve()
    return data.relative_to(folder) if data.is_relative_to(folder) else run.data


def model(run: Run) -> str:
    """The model's configuration and size."""
    settings = run.config.get("model", {})
    if not settings:
        return "## Model\n\nThe run folder holds no `config.toml`: the model's configuration cannot be shown."
    size_of_model = (
        f"{count(run.parameters)} (tied weights counted once)" if run.parameters else "no model is saved yet"
    )
    rows = [("parameters", size_of_model), *setting_rows(settings)]
    return f"## Model\n\n{table(('setting', 'value'), rows)}"


def setting_rows(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Configuration fields as table rows, but for nested tables."""
    return [
        (text(name.replace("_", " ")), count(value) if type(value) is int else text(value))
        for name, value in settings.items()
        if not isinstance(value, Mapping | list)
    ]


def training(run: Run) -> str:
    """Stages, schedule, and the curves."""
    settings, steps = run.config.get("training", {}), run.events("step")
    parts = ["## Training"]
    if settings:
        rows = [
            (str(number), text(stage["unit"]), count(stage["context"]), f"{stage['share']:.0%}")
            for number, stage in enumerate(settings.get("stages", ()), start=1)
        ]
        parts.append(table(("stage", "unit", "context, tokens", "share of the tokens"), rows, numbers=(2, 3)))
        parts.append(
            pairs.batches(run)
            if pairs.is_pairs(run)
            else "In each stage the units are shuffled and packed into rows without padding, so inside a row "
            "attention crosses document borders: a token may see the end of the text that happens to stand "
            "before its own."
        )
    if steps:
        parts += [
            curve_facts(run, steps),
            f"![Loss, learning rate and tokens per second over the tokens seen]({CURVES})",
        ]
        parts.append("*Dotted lines: a stage begins.*" if len({step["stage"] for step in steps}) > 1 else "")
    else:
        parts.append("No step has been recorded yet: `lmkern train` writes them to `metrics.jsonl`.")
    if settings:
        parts += ["### Settings", table(("setting", "value"), setting_rows(settings))]
    return "\n\n".join(part for part in parts if part)


def curve_facts(run: Run, steps: Sequence[Mapping[str, Any]]) -> str:
    """Steps, tokens, speed and the best validation in a sentence or two."""
    last, ends = steps[-1], run.events("end")
    reason = ENDINGS.get(ends[-1]["reason"], text(ends[-1]["reason"])) if ends else ENDINGS["interrupted"]
    speeds = sorted(step["tokens_per_second"] for step in steps if step.get("tokens_per_second"))
    sentence = f"{count(last['step'])} steps, {count(last['tokens'])} tokens, {reason}."
    if speeds:
        sentence += f" Median speed {count(speeds[len(speeds) // 2])} tokens per second"
        shares = sorted(step["ceiling_share"] for step in steps if step.get("ceiling_share"))
        sentence += (
            f", {shares[len(shares) // 2]:.0%} of the machine's measured matrix ceiling." if shares else "."
        )
    losses = [event for event in run.events("validation") if event.get("loss") is not None]
    if losses:
        best = min(losses, key=lambda event: event["loss"])
        sentence += (
            f" Best validation loss {best['loss']:.4f} nats per token at {count(best['tokens'])} tokens."
        )
    return sentence


def evaluation(run: Run) -> str:
    """The table of bits per byte."""
    if pairs.is_pairs(run):
        return pairs.evaluation(run)
    if run.evaluation is None:
        return (
            f"## Evaluation\n\nThis run has not been evaluated yet: {code(f'lmkern evaluate {run.folder}')}."
        )
    found = run.evaluation
    header, *rows = result_table(found)
    best = min((bits for _, bits, _ in rows), key=float)
    marked = [(text(name), f"**{bits}**" if bits == best else bits, ppl) for name, bits, ppl in rows]
    shown = table(header, marked, numbers=(1, 2))
    return (
        f"## Evaluation\n\n{shown}\n\nThe {text(found['split'])} split: {count(found['bytes'])} bytes, "
        f"{count(found['tokens'])} tokens, each predicted from the earlier text of its own document. "
        "Lower is better; bits per byte compare across tokenizers, perplexities only within one. "
        "Split, vocabulary and the n-gram model are fixed before training; the weight of the interpolation "
        "is fitted on the validation split."
    )


def samples(run: Run) -> str:
    """What the model writes, literally."""
    if pairs.is_pairs(run):
        return pairs.examples(run)
    if not run.samples:
        return (
            f"## Samples\n\nThis run holds no samples; to see some: {code(f'lmkern generate {run.folder}')}."
        )
    parts = ["## Samples", sample_note(run.samples[0]) + " The prompt comes first, the rest is the model's."]
    for number, sample in enumerate(run.samples, start=1):
        prompt = visible(sample["prompt"])
        label = f"*Prompt:* {code(' '.join(prompt.split()))}" if prompt else "*No prompt.*"
        parts.append(f"### Sample {number}\n\n{label}")
        parts.append(block(prompt + visible(sample["text"]), f"text prompt={len(prompt)}"))
    return "\n\n".join(parts)


def sample_note(sample: Mapping[str, Any]) -> str:
    """How the samples were drawn."""
    top_k = f", the {sample['top_k']} likeliest tokens" if sample.get("top_k") else ""
    return (
        f"Drawn at temperature {sample['temperature']:g}, top-p {sample['top_p']:g}{top_k}, "
        f"seed {sample['seed']}; the first draw of each, none was chosen."
    )


def time(run: Run) -> str:
    """Seconds per phase, training broken down."""
    parts = ["## Where the time went"]
    parts.append(phase_table(run.timings) or "The run folder holds no `timings.json`: nothing was timed.")
    if inside := phase_table(training_seconds(run)):
        parts += ["### Inside training", inside]
    return "\n\n".join(parts)


def phase_table(seconds: Mapping[str, float]) -> str:
    """Phases with their time, share and a bar; empty where no time was taken."""
    whole = sum(seconds.values())
    if not whole:
        return ""
    rows = [
        (text(name), duration(value), f"{value / whole:.1%}", f"**{bar(value / whole)}**" if value else "")
        for name, value in seconds.items()
    ]
    rows.append(("together", duration(whole), "", ""))
    return table(("phase", "time", "share", ""), rows, numbers=(1, 2))


def training_seconds(run: Run) -> dict[str, float]:
    """The seconds of each phase of training, in the order of a step, and then what else was timed."""
    ends = run.events("end")
    seconds: dict[str, float] = ends[-1].get("seconds", {}) if ends else {}
    known = {name: seconds[name] for name in PHASES if name in seconds}
    return known | {name: value for name, value in seconds.items() if name not in known}


def machine(run: Run) -> str:
    """Versions, the machine, and what "auto" became on it."""
    about, resolved = run.about, dict(run.about.get("resolved", {}))
    ceiling = resolved.pop("ceiling_flops", None)
    rows = counted({**about.get("versions", {}), **about.get("machine", {}), **resolved})
    if ceiling:
        rows.append(("measured matrix ceiling", f"{ceiling / 1e9:,.0f} GFLOP/s"))
    if not rows:
        return "## Versions and machine\n\nThe run did not record them."
    return f"## Versions and machine\n\n{table(('', ''), rows)}"


def again(run: Run) -> str:
    """The command that makes the run again."""
    return (
        f"## Make it again\n\n{block(commands(run), 'sh')}\n\nThe token budget is written out, so the "
        "schedule is the same on a machine of any speed; weights are bit-identical only with the same "
        "versions, processor and number of threads."
    )
