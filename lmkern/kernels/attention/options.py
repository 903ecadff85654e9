"""The options of a call of attention: the second half of the contract."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Options:
    """What else a call says: how scores are made, and which of them are seen.

    Never changed. Not frozen: that doubles the time it takes to make one, and every call makes one.

        score = softcap(q . k * softmax_scale) + bias + relative_bias

    softcap(s) = softcap * tanh(s / softcap), nothing if it is 0.

    Positions. A query's position is p = i + N_k - N_q, so that the last query stands at the last key; with
    top_left p = i. It sees the keys p - left <= j <= p + right; None: no bound on that side.

    Packed documents. B is 1 and the tokens of all documents lie one after the other; document s holds the
    queries cu_seqlens_q[s] to cu_seqlens_q[s + 1] and the keys cu_seqlens_k[s] to cu_seqlens_k[s + 1]. Each
    is a sequence of its own: i, j, N_q and N_k above count within it. A document may be empty on either side.

    Dropout acts on the weights after softmax: out = sum over keys of keep / (1 - p) * weight * v. The bits
    are Philox4x32-10 (Salmon et al. 2011) with the key (low, high 32 bits of seed) and the counter (j // 8,
    i, head, sequence), j and i within the sequence, which is the batch element or the document; key j takes
    16 of the 128 bits, word (j % 8) // 2, its low half if j is even. It is kept if they are at least
    round(dropout_p * 65536), and what is kept is scaled by 65536 / (65536 - round(dropout_p * 65536)).
    """

    softmax_scale: float
    left: int | None = None
    right: int | None = None
    top_left: bool = False
    softcap: float = 0.0
    dropout_p: float = 0.0
    # Whether lse is a result: else it serves the backward pass alone and may be that of rounded weights.
    exact_lse: bool = True
    seed: Tensor | None = None  # () int64; with dropout_p > 0
    bias: Tensor | None = None  # broadcasts to (B, H, N_q, N_k), 4 dimensions, float; -inf hides a key
    mask: Tensor | None = None  # broadcasts to (B, H, N_q, N_k), 4 dimensions, bool; True: seen
    # (H or 1, 2 R + 1) float32 (float64 for float64), R >= max(N_q, N_k) - 1: element R + j - p is added.
    relative_bias: Tensor | None = None
    # (H,) float32 (float64): a score beside each query's keys whose value is zero; it is part of lse.
    sinks: Tensor | None = None
    cu_seqlens_q: Tensor | None = None  # (documents + 1,) int32, contiguous, on q's device
    cu_seqlens_k: Tensor | None = None  # likewise; both or neither; not beside bias or mask
