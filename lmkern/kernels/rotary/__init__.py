"""Rotary positions: pairs of columns turn by angles proportional to the token's position.

    y1 = x1 cos - x2 sin,    y2 = x2 cos + x1 sin

Su et al. 2021, arXiv:2104.09864. The contract of every backend. Derivation: docs/kernels/rotary.md.

    forward(x, cos, sin, positions, *, offset, interleaved, inverse, inplace) -> y
    backward(dy, cos, sin, positions, *, offset, interleaved, inverse) -> dx

    x, y, dx, dy    (B, H, N, D)    any strides; results as layout.empty_like lays them out
    cos, sin        (P, pairs)      float32, elements of a row contiguous; 2 pairs <= D
    positions       (B, N) int64 in [0, P), contiguous, or None: token n stands at offset + n < P
    interleaved     False: x1 is columns 0 to pairs - 1, x2 the next ones (Llama, GPT-NeoX);
                    True: x1 is columns 0, 2, 4, ..., x2 columns 1, 3, 5, ... (GPT-J)
    inverse         turn by the negative angle
    inplace         y is x; overlapping x is not

Columns from 2 pairs on are copied. Computed in float32 (float64 for float64). Backward is forward with the
other `inverse`.
"""

BACKENDS = ("triton", "cpu", "reference")
