"""The fastest matrix product of this machine, measured: the yardstick of training, and of dtype "auto"."""

import time

import torch

# A size is left for the next, twice as large, while its product takes less than this many seconds.
QUICK = 0.02
LARGEST = {"cpu": 2048, "cuda": 8192}
# bfloat16 costs accuracy, so it is taken only where it pays clearly.
WORTHWHILE = 1.5


def measure_ceiling(device: torch.device, dtype: torch.dtype, *, tries: int = 5) -> float:
    """FLOP/s of a square matrix product in this dtype, best of a few.

    The size starts at 256 and doubles while a product is quick, so a processor that emulates the dtype is
    not kept busy for long. Takes well under a second.
    """
    size = 256
    seconds = _product_seconds(device, dtype, size, 2)
    while seconds < QUICK and size < LARGEST.get(device.type, 2048):
        size *= 2
        seconds = _product_seconds(device, dtype, size, 2)
    seconds = min(seconds, _product_seconds(device, dtype, size, tries))
    return 2 * size**3 / seconds


def choose_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where its products run at least 1.5 times as fast as float32's, else float32."""
    fast = measure_ceiling(device, torch.bfloat16, tries=3)
    return (
        torch.bfloat16
        if fast >= WORTHWHILE * measure_ceiling(device, torch.float32, tries=3)
        else torch.float32
    )


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is cuda where there is one, else cpu. ValueError for no device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device must be auto or one that this torch can use; got {name!r}: {reason}"
        ) from error


def synchronize(device: torch.device) -> None:
    """Wait for a GPU to finish what it was given; a clock read without this measures the queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _product_seconds(device: torch.device, dtype: torch.dtype, size: int, tries: int) -> float:
    # Random numbers: a GPU multiplies constants faster than any data, for want of bits that flip.
    a = torch.rand(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    best = float("inf")
    for _ in range(tries):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
