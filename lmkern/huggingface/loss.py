"""The loss of transformers' language models in training, without holding the logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lmkern.huggingface.reading import Reading, leads_to, read_forward, value_of
from lmkern.huggingface.swapping import Recipe, of_transformers, own_forward, subclass
from lmkern.nn import Linear
from lmkern.nn.residual import plain
from lmkern.ops import linear_cross_entropy
from lmkern.patching import Undo, swap_class

_WITH_HEADS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")


def has_loss(module: nn.Module) -> bool:
    return (
        of_transformers(module)
        and type(module).__name__.endswith(_WITH_HEADS)
        and "labels" in inspect.signature(own_forward(type(module))).parameters
    )


class _Head(Linear):
    """The last map, which can be told to keep what it is given and to give logits of width 0."""

    kept: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            return super().forward(x)
        self.kept.append(x)
        return x[..., :0]


def _loss_forward(cls: Any) -> Callable[..., Any]:
    theirs: Callable[..., Any] = cls.forward
    reading = read_forward(cls)
    if isinstance(reading, str):
        # Loaded where transformers has another forward than where the model was saved.
        return theirs
    signature = inspect.signature(theirs)
    variadic = next((x.name for x in signature.parameters.values() if x.kind is x.VAR_KEYWORD), None)

    @wraps(theirs)
    def forward(self: Any, *args: Any, **named: Any) -> Any:
        given = dict(signature.bind_partial(self, *args, **named).arguments)
        labels = given.get("labels")
        # Since the swap something else, as an adapter, may have taken the head's place or listen to it.
        served = self.training and plain(self.get_output_embeddings(), _Head)
        if labels is None or not served or (reading.asks and _shifts(self) is None):
            return theirs(self, *args, **named)
        del given["self"]
        given |= given.pop(variadic, {}) if variadic else {}
        asked = given.pop("return_dict", None)
        outputs = _training_forward(self, theirs, reading, given)
        as_it_is = self.config.return_dict if asked is None else asked
        return outputs if as_it_is else outputs.to_tuple()

    return forward


def _training_forward(self: Any, theirs: Any, reading: Reading, given: dict[str, Any]) -> Any:
    labels = given["labels"]
    if not reading.asks:
        del given["labels"]
        if reading.shifts and all(given.get(f"decoder_{x}") is None for x in ("input_ids", "inputs_embeds")):
            given["decoder_input_ids"] = self._shift_right(labels)
    head = self.get_output_embeddings()
    inputs: list[Tensor] = []
    head.kept = inputs
    try:
        outputs = theirs(self, **given, return_dict=True)
    finally:
        head.kept = None
    loss = outputs.loss if reading.asks else _loss(self, reading, inputs, labels)
    return type(outputs)(**{**outputs, "loss": loss, "logits": None})


def _loss(
    self: Any, reading: Reading, inputs: list[Tensor], labels: Tensor, ignore_index: int = -100,
    count: Tensor | int | None = None,
) -> Tensor:  # fmt: skip
    (hidden,) = inputs
    head = self.get_output_embeddings()
    loss = linear_cross_entropy(
        hidden,
        head.weight,
        labels.reshape(hidden.shape[:-1]).to(hidden.device),
        bias=head.bias,
        ignore_index=ignore_index,
        softcap=None if reading.softcap is None else value_of(self, reading.softcap),
        reduction="mean" if count is None else "sum",
    )
    if count is None:
        return loss
    return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)


def _shifts(model: Any) -> bool | None:
    """Whether the model's loss function compares token i with label i + 1; None if it is none that is served.

    As transformers' property finds it, which warns where a model names none: that is not for a compiler.
    """
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss, ForMaskedLMLoss

    named: Any = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "ForCausalLM", ForCausalLMLoss)
    function = getattr(model, "_loss_function", named)
    if function is ForCausalLMLoss:
        return True
    return False if function is ForMaskedLMLoss else None


def _loss_function(cls: Any) -> property:
    """What the forward asks for: transformers' function, in training ours, which has the head's input."""
    ask: Any = cls.loss_function.fget
    reading: Any = read_forward(cls)

    def loss_function(self: Any) -> Any:
        kept = getattr(self.get_output_embeddings(), "kept", None)
        return partial(_asked_loss, self, reading, kept) if kept else ask(self)

    return property(loss_function, cls.loss_function.fset)


def _asked_loss(
    self: Any, reading: Reading, inputs: list[Tensor], logits: Tensor, labels: Any,
    vocab_size: int, num_items_in_batch: Tensor | int | None = None, ignore_index: int = -100,
    shift_labels: Tensor | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """As transformers' functions; logits have width 0, and vocab_size is that where it is read off them."""
    rows = self.get_output_embeddings().weight.shape[0]
    if vocab_size not in (0, rows):
        raise ValueError(f"expected as many rows of the head as words, {vocab_size}; got {rows}")
    if _shifts(self) and shift_labels is not None:
        labels = shift_labels
    elif _shifts(self):
        labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return _loss(self, reading, inputs, labels, ignore_index, num_items_in_batch)


def swap_loss(module: nn.Module) -> Undo | str:
    model: Any = module
    head = model.get_output_embeddings()
    if type(head) not in (nn.Linear, Linear):
        return f"its loss stays: the head is a {type(head).__name__}"
    cls: Any = type(module)
    if isinstance(reading := read_forward(cls), str):
        return f"its loss stays: {reading}"
    if not leads_to(model, reading.head, head):
        return f"its loss stays: self.{reading.head} may give something else than the head"
    if reading.asks and (_own_loss_function(cls) or _shifts(model) is None):
        return "its loss stays: it has a loss function of its own"
    if reading.part is not None and not _is_plain_loss(getattr(model, reading.part, None)):
        return f"its loss stays: self.{reading.part} is not torch's CrossEntropyLoss()"
    methods: dict[str, Recipe] = {"forward": (_loss_forward, cls)}
    if reading.asks:
        methods["loss_function"] = (_loss_function, cls)
    undo_class = swap_class(module, subclass(cls, **methods))
    undo_head = swap_class(head, _Head)

    def undo() -> None:
        undo_head()
        vars(head).pop("kept", None)
        undo_class()

    return undo


def _own_loss_function(cls: Any) -> bool:
    from transformers import PreTrainedModel

    return cls.loss_function is not PreTrainedModel.loss_function


def _is_plain_loss(part: Any) -> bool:
    options = ("weight", "ignore_index", "reduction", "label_smoothing")
    plain_loss = nn.CrossEntropyLoss()
    return type(part) is nn.CrossEntropyLoss and all(
        getattr(part, name) == getattr(plain_loss, name) for name in options
    )
