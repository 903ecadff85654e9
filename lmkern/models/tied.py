"""One matrix as embedding and head."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn


def tie(model: nn.Module) -> None:
    """Makes model.head.weight the parameter model.embedding.weight, (V, E).

    The state_dict holds it once, as "embedding.weight"; one that holds both loads if they are equal. A model
    whose head or embedding was changed later (LoRA, pruning, a weight of its own) is tied no more, and its
    state_dict holds what there is.
    """
    model.head.weight = model.embedding.weight  # type: ignore[union-attr]
    model.register_state_dict_post_hook(_drop_head)
    model.register_load_state_dict_pre_hook(_restore_head)
    model.register_load_state_dict_post_hook(_share_again)


def _tied(model: Any) -> bool:
    head = getattr(model.head, "weight", None)
    return head is not None and head is getattr(model.embedding, "weight", None)


def _drop_head(
    module: nn.Module, state: MutableMapping[str, Tensor], prefix: str, metadata: dict[str, Any]
) -> None:
    """Leaves the shared matrix in the state_dict once: safetensors refuses two names for one memory."""
    if _tied(module):
        del state[prefix + "head.weight"]


def _restore_head(module: Any, state: MutableMapping[str, Tensor], prefix: str, *_unused: object) -> None:
    module._tied_when_loaded = _tied(module)
    if not module._tied_when_loaded:
        return
    embedding = state.get(prefix + "embedding.weight")
    head = state.get(prefix + "head.weight")
    if embedding is not None and head is None:
        state[prefix + "head.weight"] = embedding
    elif embedding is not None and head is not None and not torch.equal(embedding, head):
        raise ValueError(
            f"{type(module).__name__}: {prefix}head.weight and {prefix}embedding.weight are one matrix here; "
            "the state_dict has two that differ. Its model was not tied and cannot be loaded"
        )


def _share_again(module: Any, _incompatible_keys: object) -> None:
    """load_state_dict(assign=True) puts two parameters where one was."""
    if module._tied_when_loaded:
        module.head.weight = module.embedding.weight
