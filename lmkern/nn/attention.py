"""Attention as modules: torch's MultiheadAttention, and the self-attention of our own models."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmkern.nn.linear import Linear
from lmkern.nn.positions import Rotary, positions_within
from lmkern.nn.state_dict import LoadsWhole
from lmkern.nn.stream import check_stream, takes_dtype
from lmkern.ops import attention, linear
from lmkern.ops.dispatch import flag


class KeyValueCache:
    """The keys and values of the tokens that one layer has read.

    batch: B. context: the most tokens it can hold. Memory is taken once, at the first append, in the dtype
    and on the device of the keys: (B, H_kv, context, D) each. Meant for inference: with gradients on, a later
    append makes an earlier backward fail, as torch reports.
    """

    def __init__(self, batch: int, context: int) -> None:
        self.batch, self.context = batch, context
        self.length = 0
        self._keys = self._values = torch.empty(0)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Takes k, v (B, H_kv, N, D) of the next N tokens; returns views (B, H_kv, length, D) of all so far.

        Raises ValueError, with nothing changed, for another batch size or more tokens than it can hold.
        """
        batch, heads, tokens, head_dim = k.shape
        end = self.length + tokens
        if batch != self.batch or end > self.context:
            raise ValueError(
                f"KeyValueCache: expected a batch of {self.batch} and at most "
                f"{self.context - self.length} more tokens; got k {tuple(k.shape)} (B, H_kv, N, D). "
                "Begin again with a new cache"
            )
        if not self._keys.numel():
            shape = (batch, heads, self.context, head_dim)
            self._keys, self._values = k.new_empty(shape), v.new_empty(shape)
        self._keys[:, :, self.length : end] = k
        self._values[:, :, self.length : end] = v
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def reorder(self, rows: Tensor) -> None:
        """Sequence b becomes what sequence rows[b] was. rows: (new B,) int64, in any order, also repeated."""
        self.batch = rows.shape[0]
        if not self._keys.numel():
            return
        for name in ("_keys", "_values"):
            old: Tensor = getattr(self, name)
            new = old.new_empty(self.batch, *old.shape[1:])
            new[:, :, : self.length] = old[:, :, : self.length][rows.to(old.device)]
            setattr(self, name, new)


class SelfAttention(nn.Module):
    """Self-attention with grouped heads, rotary positions, a relative bias, padding and a cache.

    width: E. heads: H. kv_heads: H_kv, default H; H must be a multiple. head_dim: D, default E / H.
    causal: a token sees those before it and itself. softmax_scale: default 1 / sqrt(D).
    rotary: rotates queries and keys, or None.
    weight_dropout falls on the attention weights. bias: of both linear maps.

    qkv: ((H + 2 H_kv) D, E), the queries above the keys above the values; one product makes all three, and
    the op reads them as views of it. out: (E, H D). Raises ValueError for head counts that do not divide.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = True,
        softmax_scale: float | None = None,
        weight_dropout: float = 0.0,
        bias: bool = True,
        rotary: Rotary | None = None,
    ) -> None:
        super().__init__()
        causal, bias = flag("SelfAttention", "causal", causal), flag("SelfAttention", "bias", bias)
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or (head_dim is None and width % heads):
            raise ValueError(f"SelfAttention: width must be a multiple of heads; got {width}, {heads}")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"SelfAttention: heads must be a multiple of kv_heads; got {heads}, {kv_heads}")
        self.width, self.heads, self.kv_heads = width, heads, kv_heads
        self.head_dim = head_dim or width // heads
        self.causal, self.softmax_scale, self.weight_dropout = causal, softmax_scale, weight_dropout
        self.qkv = Linear(width, (heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.out = Linear(heads * self.head_dim, width, bias=bias)
        self.rotary = rotary

    @takes_dtype("x")
    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        relative_bias: Tensor | None = None,
        cache: KeyValueCache | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """(B, N, E) -> (B, N, E). The N tokens follow those in the cache and join it.

        mask, relative_bias, cu_seqlens: as `lmkern.attention` takes them; packed documents, each with
        positions of its own, have no cache.
        """
        if cache is not None and cu_seqlens is not None:
            raise ValueError("SelfAttention: give a cache or cu_seqlens, documents read whole; got both")
        check_stream(self, "x", x, self.width)
        counts = (self.heads, self.kv_heads, self.kv_heads)
        qkv = self.qkv(x).view(*x.shape[:2], sum(counts), self.head_dim)  # (B, N, H + 2 H_kv, D)
        if self.rotary is None:
            q, k, v = qkv.split(counts, dim=2)
        else:
            # Queries and keys lie side by side and turn together.
            qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
            if cu_seqlens is None:
                qk = self.rotary(qk, offset=0 if cache is None else cache.length)
            else:
                qk = self.rotary(
                    qk, positions=positions_within("SelfAttention", cu_seqlens, x.shape[1])[None]
                )
            q, k = qk.split(counts[:2], dim=2)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # (B, H or H_kv, N, D)
        if cache is not None:
            k, v = cache.append(k, v)
        attended = attention(
            q,
            k,
            v,
            causal=self.causal,
            softmax_scale=self.softmax_scale,
            mask=mask,
            relative_bias=relative_bias,
            cu_seqlens=cu_seqlens,
            dropout_p=self.weight_dropout if self.training else 0.0,
        )
        y = cast(Tensor, attended)  # (B, H, N, D)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MultiheadAttention(LoadsWhole, nn.MultiheadAttention):
    """torch.nn.MultiheadAttention, argument for argument and key for key, on lmkern's attention.

    Weights load from torch's module and back. need_weights=True, the default as in torch, has to hold the
    (N_q, N_k) weights: ask for need_weights=False where only the output is used.

    Differences: a query that sees no key gets zeros (and zero weights) where torch may give NaN;
    is_causal=True without attn_mask means the causal mask, where torch raises; nested tensors are refused.
    """

    @takes_dtype("query", "key", "value")
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The attended values, and the weights if they are asked for.

        query: (N_q, B, E), key: (N_k, B, kdim), value: (N_k, B, vdim). With batch_first B comes first;
            unbatched there is none.
        key_padding_mask: (B, N_k), or (N_k,) unbatched. attn_mask: (N_q, N_k) or (B * num_heads, N_q, N_k).
            Both are boolean (True: the key is NOT seen) or floating (added to the scores).
        is_causal: a promise that attn_mask is the causal mask, so that the kernels need not read it; it goes
            with key_padding_mask.

        Returns the output in query's layout, and weights (B, N_q, N_k) averaged over heads, or
        (B, num_heads, N_q, N_k) if not average_attn_weights, or None if not need_weights. Dropout, in
        training, falls on the weights. Raises ValueError for shapes and dtypes.
        """
        need_weights = flag("MultiheadAttention", "need_weights", need_weights)
        average_attn_weights = flag("MultiheadAttention", "average_attn_weights", average_attn_weights)
        is_causal = flag("MultiheadAttention", "is_causal", is_causal)
        self._check(query, key, value, key_padding_mask, attn_mask)
        batched = query.dim() == 3
        if not batched:
            query, key, value = _unsqueezed(query, key, value, 0 if self.batch_first else 1)
        q, k, v = (self._heads(x) for x in self._project(query, key, value))  # (B, H, N_q or N_k, D)
        n_q, n_k = q.shape[2], k.shape[2]
        # The kernels' causal counts from the last key, torch's from the first.
        causal = is_causal and not need_weights and not self._extra_keys and n_q == n_k
        if causal:
            attn_mask = None
        elif is_causal and attn_mask is None:
            attn_mask = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).triu(1)
        mask, bias = self._merge(attn_mask, key_padding_mask, q.shape[0])
        k, v = self._with_extra_keys(k, self.bias_k), self._with_extra_keys(v, self.bias_v)

        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = F.dropout(_weights(q, k, mask, bias), dropout_p)  # (B, H, N_q, N_k)
            y = weights @ v  # (B, H, N_q, D)
        else:
            y = cast(Tensor, attention(q, k, v, causal=causal, mask=mask, bias=bias, dropout_p=dropout_p))
        # (B, N_q, E), or (N_q, B, E): a view where y lies as q does.
        out = self.out_proj(y.permute((0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if batched:
            return out, weights
        return out.squeeze(0 if self.batch_first else 1), None if weights is None else weights.squeeze(0)

    @property
    def _extra_keys(self) -> int:
        """Keys beyond those given, that every query sees: the learned one and the zero one."""
        return int(self.bias_k is not None) + int(self.add_zero_attn)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each (..., E): one product where they are of one tensor."""
        bias = self.in_proj_bias
        if query is key and key is value and self.in_proj_weight is not None:
            q, k, v = linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
            return q, k, v
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        if key is value and self.in_proj_weight is not None:
            both = None if bias is None else bias[self.embed_dim :]
            k, v = linear(key, self.in_proj_weight[self.embed_dim :], both).chunk(2, dim=-1)
            return linear(query, weights[0], biases[0]), k, v
        q, k, v = (linear(*each) for each in zip((query, key, value), weights, biases, strict=True))
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, E) or (N, B, E), as batch_first says, as a view (B, H, N, D)."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.permute((0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3))

    def _with_extra_keys(self, x: Tensor, learned: Tensor | None) -> Tensor:
        """Keys or values (B, H, N, D) followed by the learned one and the zero one."""
        if learned is not None:
            last = learned.to(x.dtype).view(1, self.num_heads, 1, self.head_dim)
            x = torch.cat((x, last.expand(x.shape[0], -1, -1, -1)), dim=2)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _merge(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Both masks as a mask (True: the key is seen) and a bias, which broadcast to (B, H, N_q, N_k).

        A boolean and a floating one stay apart, so that neither is expanded.
        """
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (batch, self.num_heads))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.view(batch, 1, 1, key_padding_mask.shape[-1])
        mask = bias = None
        for each in (attn_mask, key_padding_mask):
            if each is None:
                continue
            if each.dtype == torch.bool:
                mask = ~each if mask is None else mask & ~each
            else:
                bias = each if bias is None else bias + each
        if self._extra_keys:
            mask = None if mask is None else F.pad(mask, (0, self._extra_keys), value=True)
            bias = None if bias is None else F.pad(bias, (0, self._extra_keys))
        return mask, bias

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> None:
        def fail(what: str, got: str) -> None:
            raise ValueError(f"MultiheadAttention: {what}; got {got}")

        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        if query.is_nested or key.is_nested or value.is_nested:
            fail("nested tensors are not supported; pad them and give key_padding_mask", "a nested tensor")
        if query.dim() not in (2, 3) or not (query.dim() == key.dim() == value.dim()):
            fail("query, key and value must all be batched (3 dimensions) or all unbatched (2)", shapes)
        widths = (self.embed_dim, self.kdim, self.vdim)
        if (query.shape[-1], key.shape[-1], value.shape[-1]) != widths:
            fail(f"query, key and value must have widths {widths}", shapes)
        axis = 0 if self.batch_first else 1
        batch = query.shape[axis] if query.dim() == 3 else 1
        if key.shape[:-1] != value.shape[:-1] or (query.dim() == 3 and key.shape[axis] != batch):
            fail("query, key and value must share the batch size, key and value also the length", shapes)
        n_q = query.shape[-2] if self.batch_first or query.dim() == 2 else query.shape[0]
        n_k = key.shape[-2] if self.batch_first or key.dim() == 2 else key.shape[0]
        padding_shape = (batch, n_k) if query.dim() == 3 else (n_k,)
        if key_padding_mask is not None and tuple(key_padding_mask.shape) != padding_shape:
            fail(f"key_padding_mask must be {padding_shape}", f"{tuple(key_padding_mask.shape)}")
        mask_shapes = ((n_q, n_k), (batch * self.num_heads, n_q, n_k))
        if attn_mask is not None and tuple(attn_mask.shape) not in mask_shapes:
            fail(f"attn_mask must be {mask_shapes[0]} or {mask_shapes[1]}", f"{tuple(attn_mask.shape)}")
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None and mask.dtype != torch.bool and not mask.dtype.is_floating_point:
                fail(f"{name} must be boolean (True: not seen) or floating (added)", f"{mask.dtype}")


def _unsqueezed(query: Tensor, key: Tensor, value: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """With a batch of one each; what is one tensor stays one."""
    q = query.unsqueeze(axis)
    k = q if key is query else key.unsqueeze(axis)
    return q, k, k if value is key else value.unsqueeze(axis)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """softmax(q @ k^T / sqrt(D) + bias), (B, H, N_q, N_k) in q's dtype; the softmax in float32 or wider."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, N_q, N_k)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is None and bias is None:
        return scores.softmax(dim=-1).to(q.dtype)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    # softmax over nothing is NaN: such a row gets any finite scores, then zero weights.
    unseen = (scores == -math.inf).all(dim=-1, keepdim=True)
    return scores.masked_fill(unseen, 0.0).softmax(dim=-1).masked_fill(unseen, 0.0).to(q.dtype)
