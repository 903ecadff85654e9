"""torch.nn's encoder, decoder and Transformer, argument for argument and key for key, on lmkern's kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmkern.nn.attention import MultiheadAttention
from lmkern.nn.embedding import Embedding
from lmkern.nn.feed_forward import mapped
from lmkern.nn.linear import Linear
from lmkern.nn.norm import LayerNorm, RMSNorm
from lmkern.nn.residual import Seam, normed, plain
from lmkern.nn.state_dict import LoadsWhole
from lmkern.ops.activation import Function
from lmkern.ops.dispatch import flag

Layer = nn.TransformerEncoderLayer | nn.TransformerDecoderLayer


class TransformerEncoderLayer(LoadsWhole, nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer on attention, add_norm and the activation with its bias.

    Weights load from torch's layer and back. Dropout, in training, falls where torch has it, on the attention
    weights too. ReLU, GELU and SiLU take the bias along; any other activation is called.

    Differences: those of MultiheadAttention, and gradients are differentiable once. Padded positions are
    computed like all others, where torch's fast path for inference makes them zero.
    """

    @wraps(nn.TransformerEncoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _adopt_what_torch_built(self, args, kwargs)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """(N, B, E), (B, N, E) with batch_first, or (N, E) -> the same shape.

        src_mask: (N, N) or (B * nhead, N, N). src_key_padding_mask: (B, N), or (N,) unbatched. Both are
        boolean (True: not seen) or floating (added). is_causal: a promise that src_mask is the causal mask.
        """
        if src.is_nested:
            if src_mask is not None or src_key_padding_mask is not None or is_causal:
                raise ValueError(
                    "TransformerEncoderLayer: nested sequences take no src_mask, src_key_padding_mask or "
                    "is_causal, as in torch; got one. Pad the sequences"
                )
            if not self.self_attn.batch_first:
                raise ValueError("TransformerEncoderLayer: nested sequences need batch_first=True; got False")
            return self._nested(src)

        def attend(x: Tensor) -> Tensor:
            masks = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask}
            return cast(Tensor, self.self_attn(x, x, x, need_weights=False, is_causal=is_causal, **masks)[0])

        if self.norm_first:
            attended = attend(self.norm1(src))
            y, h = normed(self.norm2, Seam.of(src, attended, self.dropout1))
            return h + cast(Tensor, self.dropout2(_feed_forward(self, y)))
        x = _norm_of_sum(attend(src), src, self.dropout1, self.norm1)
        return _norm_of_sum(_feed_forward(self, x), x, self.dropout2, self.norm2)

    def _nested(self, src: Tensor) -> Tensor:
        """Sequences of their own lengths, which torch's TransformerEncoder hands to its layers."""
        lengths = torch.tensor([len(sequence) for sequence in src.unbind()], device=src.device)
        padded = src.to_padded_tensor(0.0)  # (B, N, E)
        padding = torch.arange(padded.shape[1], device=src.device) >= lengths[:, None]  # (B, N)
        y = self.forward(padded, src_key_padding_mask=padding)
        rows = [x[:n] for x, n in zip(y, lengths.tolist(), strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=src.layout)


class TransformerDecoderLayer(LoadsWhole, nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer; everything else as in TransformerEncoderLayer."""

    @wraps(nn.TransformerDecoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _adopt_what_torch_built(self, args, kwargs)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """tgt (N_q, B, E), memory (N_k, B, E), B first with batch_first, none unbatched -> tgt's shape.

        tgt_mask: (N_q, N_q), memory_mask: (N_q, N_k), or (B * nhead, ...) of these. Padding: (B, N_q) and
        (B, N_k). All are boolean (True: not seen) or floating (added).
        """

        def attend(x: Tensor) -> Tensor:
            masks = {
                "attn_mask": tgt_mask,
                "key_padding_mask": tgt_key_padding_mask,
                "is_causal": tgt_is_causal,
            }
            return cast(Tensor, self.self_attn(x, x, x, need_weights=False, **masks)[0])

        def read(x: Tensor) -> Tensor:
            masks = {
                "attn_mask": memory_mask,
                "key_padding_mask": memory_key_padding_mask,
                "is_causal": memory_is_causal,
            }
            return cast(Tensor, self.multihead_attn(x, memory, memory, need_weights=False, **masks)[0])

        if self.norm_first:
            y, h = normed(self.norm2, Seam.of(tgt, attend(self.norm1(tgt)), self.dropout1))
            y, h = normed(self.norm3, Seam.of(h, read(y), self.dropout2))
            return h + cast(Tensor, self.dropout3(_feed_forward(self, y)))
        x = _norm_of_sum(attend(tgt), tgt, self.dropout1, self.norm1)
        x = _norm_of_sum(read(x), x, self.dropout2, self.norm2)
        return _norm_of_sum(_feed_forward(self, x), x, self.dropout3, self.norm3)


class TransformerEncoder(LoadsWhole, nn.TransformerEncoder):
    """torch.nn.TransformerEncoder. enable_nested_tensor and mask_check are taken and change nothing."""

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor=False, mask_check=mask_check)
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As TransformerEncoderLayer. is_causal None: whether mask is the causal one is looked up; a compiler
        cannot look, and takes mask as it is."""
        causal = _is_causal("TransformerEncoder", mask, is_causal)
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=causal)
        return src if self.norm is None else cast(Tensor, self.norm(src))


class TransformerDecoder(LoadsWhole, nn.TransformerDecoder):
    """torch.nn.TransformerDecoder."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As TransformerDecoderLayer, with tgt_is_causal as TransformerEncoder's is_causal."""
        causal = _is_causal("TransformerDecoder", tgt_mask, tgt_is_causal)
        for layer in self.layers:
            tgt = layer(
                tgt,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=causal,
                memory_is_causal=memory_is_causal,
            )
        return tgt if self.norm is None else cast(Tensor, self.norm(tgt))


class Transformer(LoadsWhole, nn.Transformer):
    """torch.nn.Transformer, of the encoder and decoder here. A custom one is taken as it is."""

    @wraps(nn.Transformer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # It tells of a fast path of torch's that is not used here.
            warnings.filterwarnings("ignore", message="enable_nested_tensor is True")
            super().__init__(*args, **kwargs)
        _adopt_what_torch_built(self, args, kwargs)


# torch.nn's class -> ours, which adds no state: an object of the one becomes the other by its class alone.
COUNTERPARTS: Mapping[type[nn.Module], type[nn.Module]] = MappingProxyType(
    {
        nn.Transformer: Transformer,
        nn.TransformerEncoder: TransformerEncoder,
        nn.TransformerDecoder: TransformerDecoder,
        nn.TransformerEncoderLayer: TransformerEncoderLayer,
        nn.TransformerDecoderLayer: TransformerDecoderLayer,
        nn.MultiheadAttention: MultiheadAttention,
        nn.LayerNorm: LayerNorm,
        nn.RMSNorm: RMSNorm,
        nn.Embedding: Embedding,
        nn.Linear: Linear,
    }
)


def _adopt_what_torch_built(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Makes the children ours, and theirs, but for those that the caller gave."""
    given = [*args, *kwargs.values()]
    for child in module.children():
        if not any(child is each for each in given):
            for each in child.modules():
                each.__class__ = COUNTERPARTS.get(type(each), type(each))


def _is_causal(name: str, mask: Tensor | None, hint: bool | None) -> bool:
    """The hint; without one, whether mask is the causal mask."""
    if hint is not None:
        return flag(name, "is_causal", hint)
    if mask is None or torch.compiler.is_compiling():
        return False
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        return False
    hides = True if mask.dtype == torch.bool else float("-inf")
    return torch.equal(mask, torch.full_like(mask, hides).triu(1))


def _norm_of_sum(x: Tensor, residual: Tensor, dropout: nn.Module, norm: nn.Module) -> Tensor:
    """norm(residual + dropout(x)) in the dtype of the sum: under autocast what runs through stays wide."""
    return normed(norm, Seam.of(residual, x, dropout).wide())[0]


def _feed_forward(layer: Layer, x: Tensor) -> Tensor:
    """linear2(dropout(activation(linear1(x))))."""
    function = _function_of(layer.activation)
    if function is None:
        hidden = layer.activation(layer.linear1(x))
    else:
        hidden = mapped(layer.linear1, x, function)
    return cast(Tensor, layer.linear2(layer.dropout(hidden)))


_FUNCTIONS: tuple[tuple[Callable[..., Any], Function], ...] = (
    (F.relu, "relu"),
    (torch.relu, "relu"),
    (F.gelu, "gelu"),
    (F.silu, "silu"),
)


def _function_of(activation: Callable[[Tensor], Tensor]) -> Function | None:
    """The activation op's name for what a layer was given; None for what it does not know."""
    if plain(activation, nn.GELU):
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if plain(activation, nn.ReLU):
        return "relu"
    if plain(activation, nn.SiLU):
        return "silu"
    return next((name for known, name in _FUNCTIONS if activation is known), None)
