"""`attn_implementation="lmkern"`: transformers' attention and mask functions on `lmkern.attention`.

Both are needed: without its mask function no mask reaches the attention, and padded batches are silently
wrong. The mask says as little as it can: nothing for a batch without padding, a boolean (B, 1, 1, N_k) for
padded keys, and only for other patterns (static caches, packed sequences) a boolean (B, 1, N_q, N_k).

A query that sees no key, as those of left padding in a causal model, gives zeros and takes no gradient.
transformers' eager attention gives it the mean of all values instead, its SDPA what torch makes of it: a
loss must leave out the positions of padding, and with left padding the first token after it, which would be
predicted from such a position.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmkern.huggingface.modelling import asks_registry, says_causal
from lmkern.ops import attention

NAME = "lmkern"
# The first version of transformers whose T5 asks the registry of attentions.
OLDEST = (5, 15)


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
    Raises ValueError if the attention of config's models would not take it.
    """
    theirs = _masking()
    config = options.get("config")
    if config is not None and not asks_registry(config):
        raise ValueError(
            f'attn_implementation="lmkern": expected a model whose attention asks transformers\' registry; '
            f"got one of {type(config).__name__}, whose own does not. Build it with "
            'attn_implementation="eager" and call lmkern.patch(model)'
        )
    mask_function = theirs.causal_mask_function if mask_function is None else mask_function
    padding: Tensor | None = theirs.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None and padding.shape[-1] > kv_length:
        padding = padding[:, kv_offset : kv_offset + kv_length]
    if allow_is_bidirectional_skip and mask_function is theirs.bidirectional_mask_function:
        implied = True
    elif allow_is_causal_skip and (mask_function is theirs.causal_mask_function or _is_window(mask_function)):
        # The attention counts from the last key; a static cache has empty rows behind it.
        tracing = isinstance(q_offset, Tensor) and theirs.is_tracing(q_offset)
        implied = not tracing and int(q_offset) + q_length == kv_offset + kv_length
        # Attention without a flag takes the mask at its word.
        implied = implied and (config is None or says_causal(config))
    else:
        implied = False
    if implied and (padding is None or (not theirs.is_tracing(padding) and bool(padding.all()))):
        return None
    # Of one query a mask (B, 1, 1, N_k) must say all, since it looks as a full one does.
    if implied and padding is not None and q_length > 1:
        return padding[:, None, None, :]
    full: Tensor = theirs.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
    )
    return full


def _masking() -> Any:
    from transformers import masking_utils

    return masking_utils


def _is_window(mask_function: Callable[..., Any]) -> bool:
    """Whether it is causal with a sliding window and nothing else; a compiler cannot tell."""
    if torch.compiler.is_compiling():
        return False
    theirs = _masking()
    parts: Any = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    window = theirs.sliding_window_overlay(1).__qualname__
    return bool(
        len(parts) == 2 and parts[0].__qualname__ == window and parts[1] is theirs.causal_mask_function
    )


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
        A module without a flag is_causal is not causal.
    position_bias: (1 or B, H, N_q, N_k), T5's; or (1, H, 1, 2 R + 1), a relative bias.
    s_aux: (H,) sinks.

    Returns (B, N_q, H, D_v), zeros where a query sees no key, and None for the weights.
    Raises ValueError if they are asked for.
    """
    if options.get("output_attentions"):
        raise ValueError(
            'attn_implementation="lmkern": attention weights are never held; '
            'expected output_attentions=False, or attn_implementation="eager"; got output_attentions=True'
        )
    n_q, n_k = query.shape[2], key.shape[2]
    # Eager attention sees all that no mask hides; only a flag says more.
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
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
    out = attention(
        query, key, value, causal=causal, window=window, softmax_scale=scaling, softcap=softcap, mask=mask,
        bias=bias, relative_bias=relative_bias, sinks=s_aux, dropout_p=dropout,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out[..., :width].transpose(1, 2).contiguous(), None


def register() -> None:
    """Makes `attn_implementation="lmkern"` known to transformers; ImportError if older than `OLDEST`."""
    import transformers

    installed = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    if installed < OLDEST:
        raise ImportError(
            f"lmkern.huggingface: expected transformers {OLDEST[0]}.{OLDEST[1]} or later, whose T5 asks the "
            f"registry of attentions; got {transformers.__version__}: pip install -U 'lmkern[hf]'"
        )
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, lmkern_attention)
    AttentionMaskInterface.register(NAME, lmkern_mask)
