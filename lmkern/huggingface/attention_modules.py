"""Attention modules of transformers, known by their use of its registry; rotary embeddings, and T5's bias."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from lmkern.huggingface.attention import NAME, lmkern_attention
from lmkern.huggingface.swapping import Recipe, agree, of_transformers, own_forward, subclass
from lmkern.nn import Embedding
from lmkern.nn.residual import plain
from lmkern.ops import bucketed_bias, rotary
from lmkern.patching import Undo, swap_class

_T5S_ARGUMENTS = ("self", "hidden_states", "mask", "key_value_states", "position_bias")


def is_attention(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return (
        of_transformers(module)
        and "Attention" in type(module).__name__
        and hasattr(config, "_attn_implementation")
        and hasattr(module, "forward")
    )


def swap_attention(module: nn.Module) -> Undo | str:
    cls: Any = type(module)
    forward = own_forward(cls)
    if "ALL_ATTENTION_FUNCTIONS" not in forward.__code__.co_names:
        return f"{cls.__name__} does not ask transformers' registry of attentions"
    if getattr(module, "reorder_and_upcast_attn", False):
        return "reorder_and_upcast_attn wants float32 scores of its own"
    eager = forward.__globals__.get("eager_attention_forward")
    if unknown := _options(eager) - _options(lmkern_attention):
        return f"its scores take {', '.join(sorted(unknown))}, which lmkern's do not"
    if _causal_by_mask_alone(module):
        return "it does not say that it is causal, but leaves it to a mask that lmkern does not make"
    methods: dict[str, Recipe] = {}
    rope = forward.__globals__.get("apply_rotary_pos_emb")
    if "apply_rotary_pos_emb" in forward.__code__.co_names and rope is not None and _turns_halves(rope):
        methods["forward"] = (_with_rotary, cls)
    if hasattr(cls, "_relative_position_bucket") and hasattr(cls, "compute_bias"):
        if tuple(inspect.signature(forward).parameters)[:5] != _T5S_ARGUMENTS:
            return f"{cls.__name__} takes other arguments than T5's attention"
        methods["compute_bias"] = (_compute_bias, cls)
        methods["forward"] = (_without_zero_bias, cls)
    config: Any = module.config
    before = config._attn_implementation
    undo_class = swap_class(module, subclass(cls, **methods))
    config._attn_implementation = NAME

    def undo() -> None:
        config._attn_implementation = before
        undo_class()

    return undo


def _options(function: Callable[..., Any] | None) -> set[str]:
    parameters = inspect.signature(function).parameters.values() if function else ()
    return {x.name for x in parameters if x.kind is not x.VAR_KEYWORD}


def _causal_by_mask_alone(module: Any) -> bool:
    """Whether a decoder's flag may be wrong: as where no model of the file runs on SDPA, but T5's is right.

    The encoder is left with the decoder where they share a configuration, which says for both what serves.
    """
    from transformers import PreTrainedModel

    file = type(module).__module__
    classes = [x for x in vars(sys.modules[file]).values() if isinstance(x, type) and x.__module__ == file]
    if any(issubclass(x, PreTrainedModel) and x._supports_sdpa for x in classes):
        return False
    decodes = getattr(module, "is_decoder", False) or module.config.is_encoder_decoder
    return decodes and not getattr(module, "is_causal", True) and not hasattr(module, "compute_bias")


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
    return all(agree(a, b) for a, b in zip(_apply_rotary(q, k, cos, sin), theirs, strict=True))


def _apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q, k: (B, H, N, D); cos, sin: (1 or B, N, D), the second half of the columns as the first."""
    batch, tokens, columns = cos.shape
    tables = [x[..., : columns // 2].reshape(batch * tokens, columns // 2).float() for x in (cos, sin)]
    positions = None
    if batch > 1:
        positions = torch.arange(batch * tokens, device=q.device).view(batch, tokens)
    return rotary(q, *tables, positions=positions), rotary(k, *tables, positions=positions)


def _with_rotary(cls: Any) -> Callable[..., Any]:
    """The attention's own forward with our rotary embedding in place of its function of that name."""
    forward = own_forward(cls)
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


def _compute_bias(cls: Any) -> Callable[..., Any]:
    """T5's bias as (1, H, 1, 2 R + 1), one number a distance, for `lmkern_attention`."""

    def compute_bias(
        self: Any, query_length: int, key_length: int, device: Any = None, past_seen_tokens: Any = 0
    ) -> Tensor:
        table = self.relative_attention_bias
        # What is listened to, or has taken the table's place, is called, for every pair of tokens.
        called = not (plain(table, nn.Embedding) or plain(table, Embedding))
        if called or isinstance(past_seen_tokens, Tensor) or past_seen_tokens + query_length != key_length:
            dense: Tensor = cls.compute_bias(self, query_length, key_length, device, past_seen_tokens)
            return dense
        line = bucketed_bias(
            table.weight,
            query_length,
            key_length,
            bidirectional=not self.is_decoder,
            max_distance=self.relative_attention_max_distance,
        )
        return line[None, :, None]

    return compute_bias


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
