"""The Triton kernels of cross-entropy. Imported on first use by triton.py, which launches them."""

# Triton compiles these functions; annotations would be read as types of arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type"

import triton
import triton.language as tl

from lmkern.kernels.triton_kernels import compute_dtype, rounded, tanh, wide
from lmkern.kernels.triton_launch import kernel


@kernel(do_not_specialize=["ignore_index", "stride_dloss"])
def forward_kernel(
    logits_ptr, stride_logits,  # (R, V), elements of a row contiguous
    targets_ptr,  # (R,) int64
    loss_ptr, row_max_ptr, log_sum_ptr,  # (R,); row_max and log_sum None: not wanted
    dloss_ptr, stride_dloss,  # (R,); None: no gradient
    dlogits_ptr, stride_dlogits,  # (R, V), elements of a row contiguous, may be logits; with dloss
    V, ignore_index,
    label_smoothing: tl.float64, z_loss: tl.float64, softcap: tl.float64,
    SMOOTHED: tl.constexpr,  # whether label_smoothing, z_loss and softcap are not 0
    Z_LOSS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row, which keeps its maximum and its sum of exponentials (Milakov and Gimelshein 2018).

        z       = logits, or softcap * tanh(logits / softcap)
        row_max = max(z),    log_sum = log(sum(exp(z - row_max)))
        loss    = (1 - s) (row_max - z[target] + log_sum) + s (row_max - mean(z) + log_sum)
                  + z_loss (row_max + log_sum)^2

    Reads the row once, and once more, out of L2, for its gradient. Traffic: R V elements, with the gradient
    2 R V. A target out of range makes the loss NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = compute_dtype(logits_ptr.dtype.element_ty)
    logits_ptr += row * stride_logits
    target = tl.load(targets_ptr + row)
    # The gradient may take the place of the logits: this one is read first.
    in_range = (target >= 0) & (target < V)
    hit = wide(tl.load(logits_ptr + target, mask=in_range, other=float("nan")))
    if CAPPED:
        hit = _capped(hit, softcap)
    row_max = tl.full((), float("-inf"), dtype)
    row_sum = tl.full((), 0.0, dtype)
    total = tl.full((), 0.0, dtype)
    subtracted = tl.full((), 0.0, dtype)
    # An ignored row is not read.
    columns_read = tl.where(target == ignore_index, 0, V)
    for first in range(0, columns_read, BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        z = _scores(logits_ptr, columns, V, softcap, CAPPED)
        largest = tl.maximum(row_max, tl.max(z, 0))
        # With nothing but -inf so far, a difference to 0 instead keeps exp at 0 and away from NaN.
        finite = tl.where(largest == float("-inf"), 0.0, largest)
        if SMOOTHED:
            # Of z less the largest so far, whose size would be lost in a difference at the end.
            total += tl.where(first == 0, 0.0, first * (subtracted - finite))
            total += tl.sum(tl.where(columns < V, z - finite, 0.0), 0)
            subtracted = finite
        row_sum = row_sum * tl.exp(tl.where(row_max == largest, 0.0, row_max - finite))
        row_sum += tl.sum(tl.exp(z - finite), 0)
        row_max = largest
    log_sum = tl.log(row_sum)
    loss = row_max - hit + log_sum
    if SMOOTHED:
        smoothing = tl.full((), label_smoothing, dtype)
        loss = (1.0 - smoothing) * loss + smoothing * (log_sum - total / V)
    if Z_LOSS:
        lse = row_max + log_sum
        loss += tl.full((), z_loss, dtype) * lse * lse
    ignored = target == ignore_index
    tl.store(loss_ptr + row, tl.where(ignored, 0.0, loss))
    if row_max_ptr is not None:
        tl.store(row_max_ptr + row, tl.where(ignored, 0.0, row_max))
        tl.store(log_sum_ptr + row, tl.where(ignored, 0.0, log_sum))
    if dloss_ptr is not None:
        dlogits_ptr += row * stride_dlogits
        dloss = tl.load(dloss_ptr + row * stride_dloss).to(dtype)
        for first in range(0, V, BLOCK_V):
            columns = first + tl.arange(0, BLOCK_V)
            dz = _gradient(
                logits_ptr, columns, V, target, ignored, row_max, log_sum, dloss,
                label_smoothing, z_loss, softcap, SMOOTHED, Z_LOSS, CAPPED,
            )  # fmt: skip
            tl.store(dlogits_ptr + columns, rounded(dz, dlogits_ptr.dtype.element_ty), mask=columns < V)


@kernel(do_not_specialize=["ignore_index", "stride_dloss"])
def backward_kernel(
    dloss_ptr, stride_dloss,  # (R,)
    logits_ptr, stride_logits,  # (R, V), elements of a row contiguous
    targets_ptr, row_max_ptr, log_sum_ptr,  # (R,)
    dlogits_ptr, stride_dlogits,  # (R, V), elements of a row contiguous
    V, ignore_index,
    label_smoothing: tl.float64, z_loss: tl.float64, softcap: tl.float64,
    SMOOTHED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row and block of classes.

        dz      = softmax(z) (1 + 2 z_loss lse) - s / V - (1 - s) [column = target]
        dlogits = dz * dloss * (1 - tanh(logits / softcap)^2)

    Traffic: 2 R V elements.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    target = tl.load(targets_ptr + row)
    dz = _gradient(
        logits_ptr + row * stride_logits, columns, V, target, target == ignore_index,
        tl.load(row_max_ptr + row), tl.load(log_sum_ptr + row), tl.load(dloss_ptr + row * stride_dloss),
        label_smoothing, z_loss, softcap, SMOOTHED, Z_LOSS, CAPPED,
    )  # fmt: skip
    dlogits_ptr += row * stride_dlogits
    tl.store(dlogits_ptr + columns, rounded(dz, dlogits_ptr.dtype.element_ty), mask=columns < V)


@triton.jit
def _gradient(
    logits_ptr, columns, V, target, ignored, row_max, log_sum, dloss, label_smoothing, z_loss, softcap,
    SMOOTHED: tl.constexpr, Z_LOSS: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """The gradient of a row's loss, times dloss; 0 for an ignored one, whose logits are not read."""
    logits = wide(tl.load(logits_ptr + columns, mask=(columns < V) & (ignored == 0), other=0.0))
    dtype: tl.constexpr = logits.dtype
    z = logits
    if CAPPED:
        share = tanh(logits / tl.full((), softcap, dtype))
        z = share * tl.full((), softcap, dtype)
    dz = tl.exp(z - row_max - log_sum)
    if Z_LOSS:
        dz *= 1.0 + 2.0 * tl.full((), z_loss, dtype) * (row_max + log_sum)
    right = tl.full((), 1.0, dtype)
    if SMOOTHED:
        dz -= tl.full((), label_smoothing, dtype) / V
        right -= tl.full((), label_smoothing, dtype)
    dz = tl.where(columns == target, dz - right, dz) * dloss
    if CAPPED:
        dz *= 1.0 - share * share
    return tl.where(ignored, 0.0, dz)


@triton.jit
def _scores(logits_ptr, columns, V, softcap, CAPPED: tl.constexpr):
    """z of a block of a row; -inf beyond V."""
    z = wide(tl.load(logits_ptr + columns, mask=columns < V, other=float("-inf")))
    if CAPPED:
        z = tl.where(columns < V, _capped(z, softcap), float("-inf"))
    return z


@triton.jit
def _capped(logits, softcap):
    cap = tl.full((), softcap, logits.dtype)
    return tanh(logits / cap) * cap
