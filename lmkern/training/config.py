"""What one training run is asked to do, as frozen dataclasses, and their TOML form.

A file holds the tables [data], [model] and [training]; `[[training.stages]]` lists the stages. Reading is
strict: a field that does not exist, or that has the wrong type, is an error that names the place and the
nearest field.
"""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from lmkern.data import DataConfig
from lmkern.models import GPT, T5, GPTConfig, T5Config

T = TypeVar("T")

# The key of [model] that says whose configuration it is, and what it may say.
ARCHITECTURE = "architecture"
ARCHITECTURES = MappingProxyType({"gpt": (GPT, GPTConfig), "t5": (T5, T5Config)})


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


@dataclass(frozen=True)
class Stage:
    """A part of the run that reads one kind of unit at one row length."""

    unit: Literal["sentences", "paragraphs", "documents", "pairs"] = "documents"
    """What is shuffled and packed into rows; pairs are not packed but put beside others of their length."""
    context: int = 256
    """Tokens in a row. Of pairs: in the longer side, its end included; longer ones are left out."""
    share: float = 1.0
    """Share of the run's tokens; the shares of all stages add up to 1."""

    def __post_init__(self) -> None:
        units = ("sentences", "paragraphs", "documents", "pairs")
        _require(self.unit in units, f"Stage: unit must be one of {', '.join(units)}; got {self.unit!r}")
        _require(self.context >= 1, f"Stage: context must be at least 1; got {self.context}")
        _require(0 < self.share <= 1, f"Stage: share must be in (0, 1]; got {self.share}")


@dataclass(frozen=True)
class TrainingConfig:
    """Budget, schedule, optimizer and bookkeeping of a run. Every schedule counts tokens, never seconds."""

    tokens: int = 4_000_000
    """Tokens to train on; the run takes tokens // batch_tokens steps, at least one."""
    batch_tokens: int = 8192
    """Tokens of one optimizer step, a multiple of the context of each stage. Pairs: both sides of all pairs
    of the step together, padding included, at most; the step counts as so many."""
    micro_batch_tokens: int = 0
    """Tokens held in memory at once; the gradient is accumulated over the step. 0: the whole step at once."""
    stages: tuple[Stage, ...] = (Stage(),)
    """Stages in order."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    embedding_rate: float = 1.0
    """The learning rate of the token embedding and of all other tables, as a multiple. Adam's steps do not
    know how large a weight is: tables that are of size 1, as a T5's, need some 10."""
    final_learning_rate: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    warmup: float = 0.05
    """Share of the tokens over which the learning rate rises from 0 to its peak."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on parameters of two or more dimensions."""
    beta1: float = 0.9
    beta2: float = 0.95
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread over the vocabulary, in training only."""
    average: float = 0.0
    """Decay a step of the running mean of the weights, which is validated and kept instead. 0: none."""
    clip: float = 1.0
    """Largest global gradient norm. 0: no clipping."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the matrix products; parameters stay float32. auto: bfloat16 where it is measured to pay."""
    device: str = "auto"
    """A torch device. auto: cuda where there is one, else cpu."""
    threads: int = 0
    """CPU threads. 0: as many as torch has."""
    validate_every: int = 200_000
    """Tokens between validations. 0: only at the end."""
    validation_tokens: int = 65_536
    """Tokens of the validation split, at most, that are scored each time; the same ones always."""
    patience: int = 0
    """Validations without a gain after which the run stops. 0: never stops early."""
    checkpoint_every: int = 1_000_000
    """Tokens between checkpoints. 0: only at the end and on interruption."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    seed: int = 0
    """Fixes initial weights, order of the data and dropout."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_tokens", "validation_tokens", "keep_checkpoints"):
            value = getattr(self, name)
            _require(value >= 1, f"TrainingConfig: {name} must be at least 1; got {value}")
        counts = ("micro_batch_tokens", "threads", "validate_every", "patience", "checkpoint_every")
        for name in (*counts, "embedding_rate", "weight_decay", "clip", "seed"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"TrainingConfig: {name} must be 0 or more; got {value}")
        for name in ("final_learning_rate", "warmup"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"TrainingConfig: {name} must be in [0, 1]; got {value}")
        for name in ("beta1", "beta2", "label_smoothing", "average"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"TrainingConfig: {name} must be in [0, 1); got {value}")
        _require(
            0 < self.learning_rate < math.inf,
            f"TrainingConfig: learning_rate must be above 0; got {self.learning_rate}",
        )
        dtypes = ("auto", "bfloat16", "float32")
        _require(
            self.dtype in dtypes,
            f"TrainingConfig: dtype must be one of {', '.join(dtypes)}; got {self.dtype!r}",
        )
        _require(len(self.stages) > 0, "TrainingConfig: stages must hold at least one stage; got none")
        total = sum(stage.share for stage in self.stages)
        _require(
            abs(total - 1) < 1e-6,
            f"TrainingConfig: the shares of the stages must add up to 1; got {total:g}"
            f" from {', '.join(f'{stage.share:g}' for stage in self.stages)}",
        )
        pairs = {stage.unit == "pairs" for stage in self.stages}
        _require(len(pairs) == 1, "TrainingConfig: either all stages have the unit pairs or none; got both")
        for stage in self.stages:
            _require(
                stage.unit == "pairs" or self.batch_tokens % stage.context == 0,
                f"TrainingConfig: batch_tokens must be a multiple of each stage's context; got "
                f"{self.batch_tokens} and {stage.context}: "
                f"take {math.ceil(self.batch_tokens / stage.context) * stage.context}",
            )
            _require(
                self.micro_batch_tokens == 0 or self.micro_batch_tokens >= stage.context,
                f"TrainingConfig: micro_batch_tokens must be 0 or hold a row of each stage; got "
                f"{self.micro_batch_tokens} and a context of {stage.context}",
            )


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the weights that come out: data, model, training."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: GPTConfig | T5Config = dataclasses.field(default_factory=GPTConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if isinstance(self.model, T5Config):
            _require(
                self.training.stages[0].unit == "pairs",
                "RunConfig: an encoder-decoder learns from pairs: set unit = 'pairs' in each stage",
            )
            return
        for place, stage in enumerate(self.training.stages):
            _require(
                stage.context <= self.model.context,
                f"RunConfig: a stage has a context of {stage.context} and the model takes "
                f"{self.model.context}: raise model.context, or set training.stages.{place}.context "
                f"to at most {self.model.context}",
            )


def load_config(path: str | Path, *, vocab_size: int | None = None) -> RunConfig:
    """The RunConfig in a TOML file; fields that the file does not name keep their defaults.

    vocab_size: the model's, where the file does not name it.

    Raises FileNotFoundError if there is no such file; ValueError, with the place in words, for text that is
    not TOML, a field that does not exist (the nearest name is suggested) and a value of the wrong type or
    out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_config: expected a TOML file; there is none at {path}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        model = table.setdefault("model", {})
        if vocab_size is not None and isinstance(model, dict):
            model.setdefault("vocab_size", vocab_size)
        return _build(RunConfig, table, "")
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"load_config: {path}: {error}") from error


def dump_config(config: RunConfig) -> str:
    """The TOML text that load_config reads back as an equal RunConfig, with every field written out."""
    lines: list[str] = []
    for table in dataclasses.fields(config):
        lines.extend(_table_lines(getattr(config, table.name), table.name))
    return "\n".join(lines).lstrip("\n") + "\n"


def config_differences(before: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (value before, value now) for each field in which the two differ.

    None where one of the two has no such field.
    """
    old, new = _flatten(before, ""), _flatten(now, "")
    pairs = {name: (old.get(name), new.get(name)) for name in old | new}
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b}


def _flatten(config: Any, prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    if name := _architecture(config):
        flat[f"{prefix}{ARCHITECTURE}"] = name
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= _flatten(value, f"{prefix}{field.name}.")
        else:
            flat[f"{prefix}{field.name}"] = value
    return flat


def _architecture(config: Any) -> str | None:
    """The name of the model that this is the configuration of."""
    return next((name for name, (_, kind) in ARCHITECTURES.items() if type(config) is kind), None)


def _build(kind: type[T], table: dict[str, Any], prefix: str) -> T:
    """A dataclass from a TOML table; prefix is the table's dotted name with its dot."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(typing.cast(Any, kind))]
    values = {}
    for name, value in table.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            place = _elsewhere(name) or (f"{prefix}{near[0]}" if near else None)
            remedy = f"did you mean {place}?" if place else f"there are {', '.join(names)}"
            raise ValueError(f"unknown field {prefix}{name}: {remedy}")
        values[name] = _convert(hints[name], value, f"{prefix}{name}")
    return kind(**values)


def _elsewhere(name: str) -> str | None:
    """The dotted name of a field of this name, in whatever table it stands."""
    tables = [("data", DataConfig), ("training", TrainingConfig)]
    tables += [("model", kind) for _, kind in ARCHITECTURES.values()]
    for table, kind in tables:
        if name in (field.name for field in dataclasses.fields(kind)) or (table, name) == (
            "model",
            ARCHITECTURE,
        ):
            return f"{table}.{name}"
    return None


def _build_model(table: dict[str, Any], place: str) -> Any:
    """The configuration of the architecture that a table names; a GPT's if it names none."""
    name = table.get(ARCHITECTURE, "gpt")
    if name not in ARCHITECTURES:
        raise ValueError(f"{place}.{ARCHITECTURE} must be one of {', '.join(ARCHITECTURES)}; got {name!r}")
    fields = {key: value for key, value in table.items() if key != ARCHITECTURE}
    return _build(ARCHITECTURES[name][1], fields, f"{place}.")


def _convert(hint: Any, value: Any, place: str) -> Any:
    """A TOML value as the annotated type; ValueError names the place."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if any(dataclasses.is_dataclass(argument) for argument in arguments) and isinstance(value, dict):
        return _build_model(value, place)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _build(typing.cast(type, hint), value, f"{place}.")
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(value))
    if origin is Literal and value in arguments:
        return value
    if origin in (typing.Union, types.UnionType):
        plain = [argument for argument in arguments if argument is not type(None)]
        return _convert(plain[0], value, place)
    if hint is float and type(value) is int:
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise ValueError(f"{place} must be {_in_words(hint)}; got {value!r}")


def _in_words(hint: Any) -> str:
    """What a field takes, as TOML calls it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return f"a list of {'tables' if dataclasses.is_dataclass(arguments[0]) else _in_words(arguments[0])}"
    if dataclasses.is_dataclass(hint) or arguments:
        return "a table"
    return str(hint.__name__)


def _table_lines(config: Any, name: str) -> list[str]:
    plain, tables = [], []
    if architecture := _architecture(config):
        plain.append(f"{ARCHITECTURE} = {_toml(architecture)}")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for item in value:
                tables += ["", f"[[{name}.{field.name}]]", *_table_lines(item, "")[2:]]
        elif value is not None:
            plain.append(f"{field.name} = {_toml(value)}")
    return ["", f"[{name}]", *plain, *tables]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for the delete character, which JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple | list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return repr(value)
