"""Where a token stands: sinusoidal, learned and rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lmkern.ops import rotary
from lmkern.ops.attention_checks import check_cu_seqlens, check_ends


def sinusoidal_positions(
    length: int, width: int, *, offset: int = 0, device: torch.device | None = None
) -> Tensor:
    """(length, width) float32: the row of position p = offset, offset + 1, ... is

        sin(p / 10000^(2i / width)) in column 2i,    cos(p / 10000^(2i / width)) in column 2i + 1.

    Vaswani et al. 2017, arXiv:1706.03762, section 3.5. An odd width ends in a sine. Raises ValueError unless
    length >= 0 and width >= 1.
    """
    if length < 0 or width < 1:
        raise ValueError(
            f"sinusoidal_positions: length must be at least 0 and width at least 1; got {length}, {width}"
        )
    angles = _angles(length, width, 10000.0, offset, device)  # (N, ceil(E / 2))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :width].float()


def _angles(length: int, width: int, base: float, offset: int, device: torch.device | None) -> Tensor:
    """(length, ceil(width / 2)) float64: position x base^(-2i / width), in radians."""
    # In float32 an angle of a thousand turns has lost three of its seven digits.
    positions = torch.arange(offset, offset + length, device=device, dtype=torch.float64)
    exponents = torch.arange(0, width, 2, device=device, dtype=torch.float64) / width
    return torch.outer(positions, base**-exponents)


def positions_within(name: str, cu_seqlens: Tensor, length: int) -> Tensor:
    """(length,) int64: where each token of packed documents stands in its own.

    cu_seqlens: as `lmkern.attention` takes it. Raises ValueError in name's name for another shape or dtype,
    and on the CPU for numbers that do not begin at 0, fall, or end elsewhere than at length.
    """
    check_cu_seqlens(name, "cu_seqlens", cu_seqlens)
    if not torch.compiler.is_compiling():
        check_ends(name, "cu_seqlens", cu_seqlens, length)
    tokens = torch.arange(length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    # The last document that begins at a token or before it: empty ones hold none.
    document = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
    return (tokens - cu_seqlens[document]).long()


class SinusoidalPositions(nn.Module):
    """Rows of the sinusoidal table: no parameters, no longest length."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, length: int, *, offset: int = 0, device: torch.device | None = None) -> Tensor:
        """(length, width) float32: positions offset, offset + 1, ..."""
        return sinusoidal_positions(length, self.width, offset=offset, device=device)


class LearnedPositions(nn.Module):
    """A trained vector for each position. weight: (context, width), at first normal with deviation 0.02."""

    def __init__(self, context: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(context, width))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, length: int, *, offset: int = 0, device: torch.device | None = None) -> Tensor:
        """(length, width) in the weight's dtype and on its device: positions offset, offset + 1, ...

        Raises ValueError for a position that has no vector.
        """
        if offset + length > self.weight.shape[0]:
            raise ValueError(
                f"LearnedPositions: there are vectors for {self.weight.shape[0]} positions; "
                f"got {length} from {offset} on. Give fewer tokens, or build with a longer context"
            )
        return self.weight[offset : offset + length]


class Rotary(nn.Module):
    """Turns queries and keys by angles proportional to position, so that their products see the distance.

        y1 = x1 cos - x2 sin,    y2 = x2 cos + x1 sin,    angle(p, i) = p x base^(-2i / D)

    with x1, x2 the two halves of the head (not neighbouring pairs). head_dim: even. context: positions in the
    tables. Su et al. 2021, arXiv:2104.09864.

    The tables follow from the arguments, so the state_dict does not hold them. They stay float32 in a model
    of any dtype. Raises ValueError for an odd head_dim.
    """

    cos: Tensor  # (context, D / 2)
    sin: Tensor  # (context, D / 2)

    def __init__(self, head_dim: int, context: int, *, base: float = 10000.0) -> None:
        super().__init__()
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"Rotary: head_dim must be even and at least 2; got {head_dim}")
        self.head_dim, self.context, self.base = head_dim, context, base
        self._build_tables(None)

    def _build_tables(self, device: torch.device | None) -> None:
        angles = _angles(self.context, self.head_dim, self.base, 0, device)  # (context, D / 2)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # .bfloat16() would round the tables and .to_empty() would leave them unfilled.
        super()._apply(fn, recurse)
        self._build_tables(self.cos.device)
        return self

    def forward(self, x: Tensor, *, offset: int = 0, positions: Tensor | None = None) -> Tensor:
        """x: (B, N, H, D) at positions offset, offset + 1, ... Returns the same shape and dtype.

        positions: (B, N) int64 instead. Computed in float32 (float64 for float64). Raises ValueError past the
        end of the tables.
        """
        if self.cos.is_meta and not x.is_meta:
            # load_state_dict(assign=True) gives a model from meta its parameters, and no tables.
            with torch.inference_mode(False):
                self._build_tables(x.device)
        length, head_dim = x.shape[1], x.shape[3]
        if head_dim != self.head_dim or (positions is None and offset + length > self.context):
            raise ValueError(
                f"Rotary: expected head_dim {self.head_dim} and positions below {self.context}; "
                f"got {tuple(x.shape)} (B, N, H, D) from position {offset} on"
            )
        y = rotary(x.transpose(1, 2), self.cos, self.sin, offset=offset, positions=positions)  # (B, H, N, D)
        return y.transpose(1, 2)
