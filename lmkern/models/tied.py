"""One matrix as embedding and head."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from lmkern.nn.state_dict import LoadsWhole


class MayBeTied(LoadsWhole):
    """A model that `tie` may have tied, and that stays so wherever it is moved."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # .to_empty() and torch.__future__'s conversions put two parameters where one was.
        tied = _tied(self)
        super()._apply(fn, recurse)
        if tied:
            _share(self)
        return self


def tie(model: nn.Module) -> None:
    """Makes model.head.weight the parameter model.embedding.weight, (V, E).

    The state_dict holds it once, as "embedding.weight"; one that holds both loads if they are equal. A model
    whose head or embedding was changed later (LoRA, pruning, a weight of its own) is tied no more, and its
    state_dict holds what there is.
    """
    _share(model)
    model.register_state_dict_post_hook(_drop_head)
    model.register_load_state_dict_pre_hook(_restore_head)
    model.register_load_state_dict_post_hook(_share_again)


def _tied(model: Any) -> bool:
    """Whether both have the one parameter; one that is computed (torch.nn.utils.parametrize) is none."""
    head, embedding = (
        getattr(getattr(model, name, None), "_parameters", {}).get("weight") for name in ("head", "embedding")
    )
    return head is not None and head is embedding


def _share(model: Any) -> None:
    model.head.weight = model.embedding.weight


def _drop_head(
    module: Any, state: MutableMapping[str, Tensor], prefix: str, metadata: dict[str, Any]
) -> None:
    """Leaves the shared matrix in the state_dict once: safetensors refuses two names for one memory.

    With keep_vars the dict holds the parameters themselves, and who asks for these, by every name that they
    have in the model, as torch.distributed.pipelining does, gets both.
    """
    if _tied(module) and state[prefix + "head.weight"] is not module.head.weight:
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
        _share(module)
