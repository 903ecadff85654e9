"""Reading a folder that transformers wrote, and writing one that it reads."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmkern.files import replacing, save_tensors
from lmkern.models.pretrained import configs, files, names
from lmkern.models.pretrained.architectures import ARCHITECTURES, Architecture, PretrainedModel
from lmkern.models.t5 import T5
from lmkern.models.tensors import check_tensors, fill
from lmkern.ops.dispatch import flag


def from_pretrained(
    path_or_name: str | os.PathLike[str], *, allow_pickle: bool = False, device: torch.device | str = "cpu"
) -> PretrainedModel:
    """The model in a folder that transformers, or save_pretrained, wrote, in evaluation mode and its dtype.

    path_or_name: a folder with config.json and model.safetensors, whole or in shards; or the name of a
        repository on the Hugging Face hub, where there is a network and huggingface_hub.
    allow_pickle: reads pytorch_model.bin where there is no safetensors file.

    Raises ValueError, and returns nothing half loaded, for an architecture that is not in ARCHITECTURES, for
    fields of the configuration that ask for what we do not have, and for tensors that do not fit it;
    FileNotFoundError for missing files.
    """
    allow_pickle = flag("from_pretrained", "allow_pickle", allow_pickle)
    folder = files.find(os.fspath(path_or_name), allow_pickle=allow_pickle)
    values = files.read_json(folder / files.CONFIG)
    name, architecture = _architecture(folder, values)
    fields = configs.Fields(values)
    fields.require("quantization_config", not fields.get("quantization_config"), "none, weights as they are")
    config = architecture.read(fields)
    if fields.refused:
        table = "\n".join(f"  {line}" for line in fields.refused)
        raise ValueError(f"from_pretrained: {folder}: this {name} is not served here\n{table}")
    found = _with_prefix(files.read_tensors(folder, allow_pickle=allow_pickle), architecture)
    if architecture.model is T5:
        head, shared = found.get("lm_head.weight"), found.get("shared.weight")
        config = replace(config, tied=head is None or shared is None or torch.equal(head, shared))
    copies = _copies(architecture, config)
    for copy, first in copies.items():
        if copy in found:
            _check_copy(folder, copy, first, found)
            found.setdefault(first, found.pop(copy))
            found.pop(copy, None)
    # Building draws initial values: the caller's random numbers must not depend on that.
    with torch.random.fork_rng(devices=[]):
        model = architecture.model(config)
    ours = model.state_dict()
    found = {each: x for each, x in found.items() if not re.fullmatch(architecture.unread, each)}
    check_tensors(
        "from_pretrained",
        folder,
        names.to_theirs(architecture.table(config), config, ours),
        found,
        f"The weights are not those of the {name} in {files.CONFIG}",
    )
    fill(model, names.to_ours(architecture.table(config), ours, found))
    return model.to(device).eval()


def save_pretrained(model: PretrainedModel, folder: str | os.PathLike[str]) -> None:
    """Writes config.json and model.safetensors into folder, as transformers reads them; its other files stay.

    folder is made if need be. Both files are written in full before either takes its place. Raises TypeError
    for another kind of model, ValueError for one whose architecture transformers does not have.
    """
    if not isinstance(model, PretrainedModel):
        raise TypeError(
            f"save_pretrained: expected an lmkern Bert, GPT, Llama or T5; got {type(model).__name__}"
        )
    config: Any = model.config
    name = _NAMES[getattr(config, "head", type(model).__name__)]
    architecture = ARCHITECTURES[name]
    fields = architecture.write(config)
    tensors = {
        their_name: x.detach().cpu().contiguous().clone()
        for their_name, x in names.to_theirs(architecture.table(config), config, model.state_dict()).items()
    }
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    description = {"architectures": [name], "model_type": architecture.model_type, "dtype": dtype, **fields}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / files.WEIGHTS, folder / files.CONFIG) as (weights, configuration):
        save_tensors(tensors, weights, {"format": "pt"})
        configuration.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


# The class of transformers for each class of ours, or head of Bert.
_NAMES = {
    "masked": "BertForMaskedLM",
    "sequence": "BertForSequenceClassification",
    "token": "BertForTokenClassification",
    "GPT": "GPT2LMHeadModel",
    "Llama": "LlamaForCausalLM",
    "T5": "T5ForConditionalGeneration",
}


def _architecture(folder: Path, values: Mapping[str, Any]) -> tuple[str, Architecture]:
    given = values.get("architectures") or [f"none (model_type {values.get('model_type')!r})"]
    known = [name for name in given if name in ARCHITECTURES]
    if not known:
        raise ValueError(
            f"from_pretrained: {folder} is of architecture {', '.join(map(str, given))}; "
            f"known are {', '.join(ARCHITECTURES)}"
        )
    return known[0], ARCHITECTURES[known[0]]


def _with_prefix(found: dict[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Names as the architecture writes them today: with the prefix, and no gamma and beta."""
    prefix = architecture.prefix
    bare = prefix and not any(name.startswith(prefix) for name in found)
    heads = ("cls.", "classifier.", "lm_head.")
    renamed = {}
    for name, x in found.items():
        new = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        renamed[prefix + new if bare and not new.startswith(heads) else new] = x
    return renamed


def _copies(architecture: Architecture, config: Any) -> dict[str, str]:
    tied = getattr(config, "tied", True)
    return {copy: first for copy, first in architecture.copies.items() if tied or copy != "lm_head.weight"}


def _check_copy(folder: Path, copy: str, first: str, found: Mapping[str, Tensor]) -> None:
    if first in found and not torch.equal(found[copy], found[first]):
        raise ValueError(
            f"from_pretrained: {folder}: {copy} and {first} are one matrix in this architecture; "
            "got two that differ"
        )
