"""The loss of transformers' language models in training, without holding the logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lmkern.huggingface.swapping import of_transformers, own_forward, subclass
from lmkern.nn import Linear
from lmkern.nn.residual import plain
from lmkern.ops import linear_cross_entropy
from lmkern.patching import Undo, swap_class


def has_loss(module: nn.Module) -> bool:
    head = getattr(module, "get_output_embeddings", None)
    return of_transformers(module) and head is not None and _kind_of_loss(type(module)) is not None


def _kind_of_loss(cls: type[nn.Module]) -> str | None:
    """How a model with a head over the vocabulary makes its loss; None for one without."""
    if cls.__name__.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")):
        names = own_forward(cls).__code__.co_names
        if "loss_function" in names:
            return "masked" if cls.__name__.endswith("ForMaskedLM") else "causal"
        if "CrossEntropyLoss" in names:
            return "plain"
    return None


class _Head(Linear):
    """The last map, which can be told to keep what it is given and to give logits of width 0."""

    kept: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            return super().forward(x)
        self.kept.append(x)
        return x[..., :0]


def _loss_forward(cls: Any) -> Callable[..., Any]:
    theirs, kind = cls.forward, _kind_of_loss(cls)

    @wraps(theirs)
    def forward(self: Any, *args: Any, **named: Any) -> Any:
        given = inspect.signature(theirs).bind_partial(self, *args, **named).arguments
        labels = given.get("labels")
        # Since the swap something else, as an adapter, may have taken the head's place or listen to it.
        if labels is None or not self.training or not plain(self.get_output_embeddings(), _Head):
            return theirs(self, *args, **named)
        return _training_forward(self, theirs, kind, labels, given)

    return forward


def _training_forward(self: Any, theirs: Any, kind: str | None, labels: Tensor, given: dict[str, Any]) -> Any:
    named = {key: x for key, x in given.items() if key not in ("self", "labels", "kwargs")}
    extra = dict(given.get("kwargs", {}))
    options = {key: extra.pop(key, None) for key in ("num_items_in_batch", "shift_labels")}
    ignore_index = extra.pop("ignore_index", -100)
    as_tuple = named.pop("return_dict", extra.pop("return_dict", None)) is False
    given_decoder = ("decoder_input_ids", "decoder_inputs_embeds")
    shifts = kind == "plain" and hasattr(self, "prepare_decoder_input_ids_from_labels")
    if shifts and all(named.get(key) is None for key in given_decoder):
        named["decoder_input_ids"] = self.prepare_decoder_input_ids_from_labels(labels=labels)
    head = self.get_output_embeddings()
    inputs: list[Tensor] = []
    head.kept = inputs
    try:
        outputs = theirs(self, **named, **extra, return_dict=True)
    finally:
        head.kept = None
    (hidden,) = inputs
    count = options["num_items_in_batch"] if kind != "plain" else None
    if kind == "causal":
        labels = options["shift_labels"] if options["shift_labels"] is not None else labels
        if options["shift_labels"] is None:
            labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    config = self.config.get_text_config() if kind == "causal" else self.config
    loss = linear_cross_entropy(
        hidden,
        head.weight,
        labels.to(hidden.device),
        bias=head.bias,
        ignore_index=ignore_index,
        softcap=getattr(config, "final_logit_softcapping", None),
        reduction="mean" if count is None else "sum",
    )
    if count is not None:
        loss = loss / (count.to(loss.device) if isinstance(count, Tensor) else count)
    outputs = type(outputs)(**{**outputs, "loss": loss, "logits": None})
    return outputs.to_tuple() if as_tuple else outputs


def swap_loss(module: nn.Module) -> Undo | str:
    model: Any = module
    head = model.get_output_embeddings()
    if type(head) not in (nn.Linear, Linear):
        return f"its loss stays: the head is a {type(head).__name__}"
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier", "router_aux_loss_coef"):
        if hasattr(model.config, name):
            return f"its loss stays: config.{name} is not served"
    cls: Any = type(module)
    undo_class = swap_class(module, subclass(cls, forward=(_loss_forward, cls)))
    undo_head = swap_class(head, _Head)

    def undo() -> None:
        undo_head()
        undo_class()

    return undo
