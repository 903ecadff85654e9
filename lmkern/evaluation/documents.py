"""Token streams and the documents in them, checked once for every model that is evaluated."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]


def document_spans(name: str, tokens: ArrayLike, documents: ArrayLike) -> tuple[Ints, Ints, Ints]:
    """tokens, starts and ends as int64 arrays: document i is tokens[starts[i]:ends[i]].

    name: the calling function, for error texts.
    tokens: (N,) integers, an array or a tensor.
    documents: (documents,) start offsets, ascending, the first 0.

    Raises ValueError for tokens that are not one row of integers, and for offsets that do not cut them into
    documents of at least one token.
    """
    tokens, starts = np.asarray(tokens), np.asarray(documents)
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise ValueError(
            f"{name}: tokens must be one row of integers; got shape {tokens.shape}, {tokens.dtype}. "
            "Pass the tokens of a whole split, one document after the other"
        )
    if starts.ndim != 1 or (starts.size and starts.dtype.kind not in "iu"):
        raise ValueError(
            f"{name}: documents must be one row of integer offsets; got shape {starts.shape}, "
            f"{starts.dtype}. Pass the index of each document's first token"
        )
    tokens, starts = tokens.astype(np.int64), starts.astype(np.int64)
    ends = np.append(starts, len(tokens))[1:]
    if (len(tokens) and starts[:1].tolist() != [0]) or (starts >= ends).any():
        raise ValueError(
            f"{name}: documents must start at 0 and ascend, each holding at least one of {len(tokens)} "
            f"tokens; got {len(starts)} starts, {starts[:4].tolist()} first, {starts[-2:].tolist()} last. "
            "Pass the index of each document's first token"
        )
    return tokens, starts, ends
