"""transformers' models on lmkern's kernels: `attn_implementation="lmkern"`, and what `patch` knows of them.

Importing this file registers "lmkern" in transformers' registries of attentions and of masks. Both are
needed: without its mask function no mask reaches the attention, and padded batches are silently wrong. The
mask says as little as it can: nothing for a batch without padding, a boolean (B, 1, 1, N_k) for padded keys,
and only for other patterns (static caches, packed sequences) a boolean (B, 1, N_q, N_k).
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmkern.ops import (
    activation,
    attention,
    bucketed_bias,
    cached_attention,
    linear_cross_entropy,
    rms_norm,
    rotary,
)
from lmkern.ops.dispatch import wants_gradient
from lmkern.patching import RULES, Rule, Undo, swap_class

NAME = "lmkern"
# Up to so many new tokens a call is a step of generation, and goes to the kernel that splits the keys.
DECODED_TOKENS = 8


def lmkern_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **options: Any,
) -> Tensor | None:
    """transformers' mask function for `lmkern_attention`; arguments as transformers' sdpa_mask.

    Returns None where the attention's own causal flag and window say all; boolean (B, 1, 1, N_k), True: seen,
    where they and the padding do; else boolean (B, 1, N_q, N_k) that says all by itself.
    """
    from transformers import masking_utils as theirs

    mask_function = theirs.causal_mask_function if mask_function is None else mask_function
    padding = theirs.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None and padding.shape[-1] > kv_length:
        padding = padding[:, kv_offset : kv_offset + kv_length]
    if allow_is_bidirectional_skip and mask_function is theirs.bidirectional_mask_function:
        implied = True
    elif allow_is_causal_skip and (mask_function is theirs.causal_mask_function or _is_window(mask_function)):
        # The attention counts from the last key; a static cache has empty rows behind it.
        tracing = isinstance(q_offset, Tensor) and theirs.is_tracing(q_offset)
        implied = not tracing and int(q_offset) + q_length == kv_offset + kv_length
    else:
        implied = False
    if implied and (padding is None or (not theirs.is_tracing(padding) and bool(padding.all()))):
        return None
    # Of one query a mask (B, 1, 1, N_k) must say all, since it looks as a full one does.
    if implied and padding is not None and q_length > 1:
        return padding[:, None, None, :]
    mask: Tensor = theirs.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
    )
    return mask


def _is_window(mask_function: Callable[..., Any]) -> bool:
    """Whether it is causal with a sliding window and nothing else."""
    from transformers import masking_utils as theirs

    parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    window = theirs.sliding_window_overlay(1).__qualname__
    return len(parts) == 2 and parts[0].__qualname__ == window and parts[1] is theirs.causal_mask_function


def lmkern_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function on `lmkern.attention`.

    query: (B, H, N_q, D); key, value: (B, H_kv, N_k, D); values may have another width.
    attention_mask: what `lmkern_mask` gave, or a caller's own, boolean (True: seen) or floating (added).
        With a boolean (B, 1, 1, N_k) beside several queries a causal module stays causal; any other says all.
    position_bias: (1 or B, H, N_q, N_k), T5's; or (1, H, 1, 2 R + 1), a relative bias.
    s_aux: (H,) sinks.

    Returns (B, N_q, H, D_v), and None for the weights; ValueError if they are asked for.
    """
    if options.get("output_attentions"):
        raise ValueError(
            'attn_implementation="lmkern": attention weights are never held; '
            'expected output_attentions=False, or attn_implementation="eager"; got output_attentions=True'
        )
    n_q, n_k = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = bias = relative_bias = None
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        mask = attention_mask
    else:
        bias = attention_mask
    whole = bias is not None or (mask is not None and (mask.shape[2] == n_q or not causal))
    causal = bool(causal) and not whole
    window = None if whole or sliding_window is None or not causal else (sliding_window - 1, None)
    if position_bias is not None and position_bias.stride(3) != 0:
        # A bias that is the same for all keys, as T5's of cross-attention, changes no weight.
        if position_bias.shape[2] == 1 and position_bias.shape[3] == 2 * max(n_q, n_k) - 1:
            relative_bias = position_bias[0, :, 0]
        else:
            bias = position_bias if bias is None else bias + position_bias
    if bias is not None and bias.shape[3] > n_k:
        bias = bias[..., :n_k]
    width = value.shape[3]
    if query.shape[3] != width:
        scaling = query.shape[3] ** -0.5 if scaling is None else scaling
        widest = max(query.shape[3], width)
        query, key, value = (F.pad(x, (0, widest - x.shape[3])) for x in (query, key, value))
    shared: dict[str, Any] = {"softmax_scale": scaling, "softcap": softcap, "sinks": s_aux, "window": window}
    decodes = n_q <= DECODED_TOKENS and (causal or n_q == 1) and not dropout
    if decodes and mask is bias is relative_bias is None and not wants_gradient(query, key, value, s_aux):
        out = cached_attention(query, key, value, **shared)
    else:
        out = attention(
            query, key, value, causal=causal, mask=mask, bias=bias, relative_bias=relative_bias,
            dropout_p=dropout, **shared,
        )  # fmt: skip
    assert isinstance(out, Tensor)
    return out[..., :width].transpose(1, 2).contiguous(), None


def register() -> None:
    """Makes `attn_implementation="lmkern"` known to transformers; ImportError without registries."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "lmkern.huggingface: expected transformers with AttentionInterface and AttentionMaskInterface "
            f"(tried with 5.24); got {error}"
        ) from error
    AttentionInterface.register(NAME, lmkern_attention)
    AttentionMaskInterface.register(NAME, lmkern_mask)


class _Ours:
    """Marks the classes made here."""


@cache
def _subclass(cls: type[nn.Module], **methods: Callable[..., Any]) -> type[nn.Module]:
    """cls with other methods, by the same name: transformers writes class names into configurations."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, **methods}
    return type(cls.__name__, (_Ours, cls), names)


def _of_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.") and not isinstance(module, _Ours)


def _own_forward(cls: type[nn.Module]) -> types.FunctionType:
    return inspect.unwrap(cls.forward)  # type: ignore[return-value]


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    tolerance = 1e-4 if theirs.dtype in (torch.float32, torch.float64) else 2e-2
    size = float(theirs.abs().max())
    return ours.shape == theirs.shape and float((ours - theirs).abs().max()) <= tolerance * max(size, 1e-6)


def _row(parameter: Tensor, width: int) -> Tensor:
    """(1, 2, width) numbers of either sign, without torch's generator."""
    numbers = torch.linspace(-3.0, 3.0, 2 * width, device=parameter.device).sin()
    return numbers.view(1, 2, width).to(parameter.dtype)


@contextmanager
def _still(module: nn.Module) -> Iterator[None]:
    """module as in inference: to ask what it computes."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training


def _swap_if_same(module: nn.Module, width: int, cls: type[nn.Module]) -> Undo | None:
    """Swaps the class if the module gives the same numbers then."""
    parameter = next(module.parameters())
    if parameter.is_meta:
        return None
    x = _row(parameter, width)
    with _still(module):
        theirs = module.forward(x)
        undo = swap_class(module, cls)
        if _agree(module.forward(x), theirs):
            return undo
    undo()
    return None


# RMS norms, known by their one parameter and by what they compute.


def _epsilon(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _is_rms_norm(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    named = type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    return (
        _of_transformers(module)
        and named
        and list(parameters) == ["weight"]
        and parameters["weight"].dim() == 1
        and not list(module.children())
    )


def _rms_forward(offset: float) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        return rms_norm(hidden_states, weight.shape, weight, _epsilon(self), offset=offset)

    return forward


_RMS_FORWARDS = (_rms_forward(0.0), _rms_forward(1.0))


def _swap_rms_norm(module: nn.Module) -> Undo | str:
    if _epsilon(module) is not None:
        width = module.weight.shape[0]  # type: ignore[union-attr,index]
        for forward in _RMS_FORWARDS:
            undo = _swap_if_same(module, int(width), _subclass(type(module), forward=forward))
            if undo is not None:
                return undo
    return f"{type(module).__name__} computes no RMS norm that lmkern.rms_norm knows"


# Feed-forward modules, known by the names of their parts: the activation, what it is applied to, the gated
# value or None, dropout or None, what follows or None.
_FEED_FORWARDS = (
    ("act", "c_fc", None, None, "c_proj", "dropout"),
    ("act", "wi", None, "dropout", "wo", None),
    ("act", "wi_0", "wi_1", "dropout", "wo", None),
    ("act_fn", "gate_proj", "up_proj", None, "down_proj", None),
    ("intermediate_act_fn", "dense", None, None, None, None),
    ("transform_act_fn", "dense", None, None, "LayerNorm", None),
)
_FUNCTIONS: dict[Any, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
}


def _feed_forward_parts(module: nn.Module) -> tuple[str | None, ...] | None:
    children = {name for name, _ in module.named_children()}
    found = (parts for parts in _FEED_FORWARDS if children == {name for name in parts if name})
    return next(found, None)


def _product(module: nn.Module, x: Tensor) -> Tensor:
    """Without the bias, which the activation adds."""
    weight: Any = module.weight
    return F.linear(x, weight) if isinstance(module, nn.Linear) else x @ weight


@cache
def _feed_forward(parts: tuple[str | None, ...], function: Any) -> Callable[[Any, Tensor], Tensor]:
    _, gate, value, dropout, down, last = parts

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        up = getattr(self, str(gate))
        if value is None:
            hidden = activation(_product(up, hidden_states), up.bias, function)  # (..., F)
        else:
            halves = up(hidden_states), getattr(self, value)(hidden_states)
            hidden = activation(torch.cat(halves, -1), None, function, gated=True)
        if dropout is not None:
            hidden = getattr(self, dropout)(hidden)
        if down is not None:
            following = getattr(self, down)
            if down == "wo" and not torch.is_autocast_enabled(hidden.device.type):
                # T5 keeps this weight in float32 in models of 16 bits.
                hidden = hidden.to(following.weight.dtype)
            hidden = following(hidden)
        return hidden if last is None else getattr(self, last)(hidden)

    return forward


def _swap_feed_forward(module: nn.Module) -> Undo | str:
    parts = _feed_forward_parts(module)
    assert parts is not None
    act, first = getattr(module, str(parts[0])), getattr(module, str(parts[1]))
    if type(first).__name__ not in ("Linear", "Conv1D"):
        return f"its first layer is a {type(first).__name__}"
    x = torch.linspace(-6, 6, 97, dtype=torch.float32)
    with torch.no_grad():
        function = next(
            (name for name, f in _FUNCTIONS.items() if torch.allclose(act(x), f(x), atol=1e-6)), None
        )
    if function is None:
        return f"its activation {type(act).__name__} is none of {', '.join(_FUNCTIONS)}"
    width = first.weight.shape[1 if isinstance(first, nn.Linear) else 0]
    cls = _subclass(type(module), forward=_feed_forward(parts, function))
    return (
        _swap_if_same(module, width, cls) or f"{type(module).__name__} computes something else than we would"
    )


# Attention, known by its use of the registry; its rotary embedding and T5's bias on the way.


def _is_attention(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return (
        _of_transformers(module)
        and "Attention" in type(module).__name__
        and hasattr(config, "_attn_implementation")
        and hasattr(module, "forward")
    )


def _swap_attention(module: nn.Module) -> Undo | str:
    cls = type(module)
    forward = _own_forward(cls)
    if "ALL_ATTENTION_FUNCTIONS" not in forward.__code__.co_names:
        version = getattr(sys.modules.get("transformers"), "__version__", "?")
        return (
            f"{cls.__name__} does not ask transformers' registry of attentions "
            f"(T5's does in 5.24; this is {version})"
        )
    if getattr(module, "reorder_and_upcast_attn", False):
        return "reorder_and_upcast_attn wants float32 scores of its own"
    methods: dict[str, Callable[..., Any]] = {}
    rope = forward.__globals__.get("apply_rotary_pos_emb")
    if "apply_rotary_pos_emb" in forward.__code__.co_names and rope is not None and _turns_halves(rope):
        methods["forward"] = _with_rotary(forward)
    if (
        hasattr(cls, "_relative_position_bucket")
        and "past_seen_tokens"
        in inspect.signature(
            cls.compute_bias  # type: ignore[attr-defined]
        ).parameters
    ):
        methods["compute_bias"] = _compute_bias(cls)
        methods["forward"] = _without_zero_bias(cls)
    config: Any = module.config
    before = config._attn_implementation
    undo_class = swap_class(module, _subclass(cls, **methods))
    config._attn_implementation = NAME

    def undo() -> None:
        config._attn_implementation = before
        undo_class()

    return undo


@cache
def _turns_halves(rope: Callable[..., Any]) -> bool:
    """Whether apply_rotary_pos_emb(q, k, cos, sin) is Llama's."""
    q, k = (torch.linspace(-1, a, 2 * 3 * 8).sin().view(1, 2, 3, 8) for a in (5.0, 7.0))
    angles = torch.linspace(0, 2, 12).view(1, 3, 4)
    cos, sin = (torch.cat((x, x), -1) for x in (angles.cos(), angles.sin()))
    try:
        theirs = rope(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError):
        return False
    return all(_agree(a, b) for a, b in zip(_apply_rotary(q, k, cos, sin), theirs, strict=True))


def _apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q, k: (B, H, N, D); cos, sin: (1 or B, N, D), the second half of the columns as the first."""
    batch, tokens, columns = cos.shape
    tables = [x[..., : columns // 2].reshape(batch * tokens, columns // 2).float() for x in (cos, sin)]
    positions = None
    if batch > 1:
        positions = torch.arange(batch * tokens, device=q.device).view(batch, tokens)
    return rotary(q, *tables, positions=positions), rotary(k, *tables, positions=positions)


@cache
def _with_rotary(forward: types.FunctionType) -> Callable[..., Any]:
    """The attention's own forward with our rotary embedding in place of its function of that name."""
    theirs = forward.__globals__["apply_rotary_pos_emb"]

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        if rest or named or cos.requires_grad or cos.dim() != 3 or cos.shape[2] != q.shape[3]:
            return theirs(q, k, cos, sin, *rest, **named)
        return _apply_rotary(q, k, cos, sin)

    names = {**forward.__globals__, "apply_rotary_pos_emb": apply_rotary_pos_emb}
    copy = types.FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


@cache
def _compute_bias(cls: Any) -> Callable[..., Any]:
    """T5's bias as (1, H, 1, 2 R + 1), one number a distance, for `lmkern_attention`."""

    def compute_bias(
        self: Any, query_length: int, key_length: int, device: Any = None, past_seen_tokens: Any = 0
    ) -> Tensor:
        if isinstance(past_seen_tokens, Tensor) or past_seen_tokens + query_length != key_length:
            dense: Tensor = cls.compute_bias(self, query_length, key_length, device, past_seen_tokens)
            return dense
        line = bucketed_bias(
            self.relative_attention_bias.weight,
            query_length,
            key_length,
            bidirectional=not self.is_decoder,
            max_distance=self.relative_attention_max_distance,
        )
        return line[None, :, None]

    return compute_bias


@cache
def _without_zero_bias(cls: Any) -> Callable[..., Any]:
    """T5's cross-attention without the zeros it would add to its scores."""

    @wraps(cls.forward)
    def forward(
        self: Any, hidden_states: Tensor, mask: Any = None, key_value_states: Any = None,
        position_bias: Any = None, *rest: Any, **named: Any,
    ) -> Any:  # fmt: skip
        if key_value_states is not None and position_bias is None and not self.has_relative_attention_bias:
            position_bias = hidden_states.new_zeros(()).expand(1, self.n_heads, hidden_states.shape[1], 1)
        return cls.forward(self, hidden_states, mask, key_value_states, position_bias, *rest, **named)

    return forward


# The loss.


def _has_loss(module: nn.Module) -> bool:
    head = getattr(module, "get_output_embeddings", None)
    return _of_transformers(module) and head is not None and _kind_of_loss(type(module)) is not None


def _kind_of_loss(cls: type[nn.Module]) -> str | None:
    """How a model with a head over the vocabulary makes its loss; None for one without."""
    if cls.__name__.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")):
        names = _own_forward(cls).__code__.co_names
        if "loss_function" in names:
            return "masked" if cls.__name__.endswith("ForMaskedLM") else "causal"
        if "CrossEntropyLoss" in names:
            return "plain"
    return None


@contextmanager
def _without_logits(head: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, head gives logits of width 0; what it was called with is in the list."""
    inputs: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        inputs.append(x)
        return x[..., :0]

    head.forward = forward  # type: ignore[method-assign]
    try:
        yield inputs
    finally:
        del head.forward


@cache
def _loss_forward(cls: Any) -> Callable[..., Any]:
    theirs, kind = cls.forward, _kind_of_loss(cls)

    @wraps(theirs)
    def forward(self: Any, *args: Any, **named: Any) -> Any:
        given = inspect.signature(theirs).bind_partial(self, *args, **named).arguments
        labels = given.get("labels")
        if labels is None or not self.training:
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
    with _without_logits(head) as inputs:
        outputs = theirs(self, **named, **extra, return_dict=True)
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


def _swap_loss(module: nn.Module) -> Undo | str:
    model: Any = module
    head = model.get_output_embeddings()
    if type(head) not in (nn.Linear,):
        return f"its loss stays: the head is a {type(head).__name__}"
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier", "router_aux_loss_coef"):
        if hasattr(model.config, name):
            return f"its loss stays: config.{name} is not served"
    return swap_class(module, _subclass(type(module), forward=_loss_forward(type(module))))


def _rules() -> list[Rule]:
    def feeds_forward(module: nn.Module) -> bool:
        return _of_transformers(module) and _feed_forward_parts(module) is not None

    return [
        Rule("loss without logits", _has_loss, _swap_loss),
        Rule("attention", _is_attention, _swap_attention),
        Rule("RMS norm", _is_rms_norm, _swap_rms_norm),
        Rule("feed-forward", feeds_forward, _swap_feed_forward),
    ]


register()
RULES[:0] = _rules()
