"""The verbs and tiles of csrc/tile, one small kernel each, compared with NumPy.

On a GPU, and on the CPU through tests/csrc/cuda_emulator.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
EMULATOR, SOURCE = ROOT / "tests/csrc/cuda_emulator", ROOT / "tests/csrc/tile_verbs.cu"
VERBS = ("load", "store", "reduce", "add", "product", "pipeline", "registers", "exp2", "cluster")
BRAIN, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
FOR_HOPPER = (
    "nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=sm_90a",
    "-Xptxas=-v", f"-I{ROOT / 'csrc'}", SOURCE,
)  # fmt: skip

# run(verb, a, b, out, rows and columns of what is mapped, first row, first column, option)
Run = Callable[..., None]


def compiled(device: str, folder: Path) -> Path:
    if device == "cpu":
        path = folder / "tile_verbs.so"
        flags = (
            "-std=c++17",
            "-O1",
            "-fPIC",
            "-mf16c",
            "-w",
            "-shared",
            f"-I{EMULATOR}",
            f"-I{ROOT / 'csrc'}",
        )
        subprocess.run(["g++", *flags, "-x", "c++", SOURCE, "-o", path], check=True)
        return path
    # Each test may be a process of its own: the first compiles, the others wait.
    sources = [
        SOURCE,
        *sorted((ROOT / "csrc/tile").glob("*.hpp")),
        *sorted((ROOT / "csrc/core").glob("*.hpp")),
    ]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"lmkern-tile-verbs-{os.getuid()}-{digest}.so"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            part = path.with_suffix(".part")
            subprocess.run([*FOR_HOPPER, "-shared", "-Xcompiler=-fPIC", "-o", part], check=True)
            part.replace(path)
    return path


def no_hopper() -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA GPU and none is visible"
    if torch.cuda.get_device_capability() != (9, 0):
        return "needs compute capability 9.0"
    return None if shutil.which("nvcc") else "nvcc is not on the PATH"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(
                shutil.which("g++") is None or (platform.system(), platform.machine()) != ("Linux", "x86_64"),
                reason="the CUDA emulator needs g++ on x86-64 Linux",
            ),
        ),
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(no_hopper() is not None, reason=str(no_hopper()))],
        ),
    ],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    device = request.param
    library = ctypes.CDLL(str(compiled(device, tmp_path_factory.mktemp("verbs"))))
    library.run_verb.restype = ctypes.c_char_p
    library.run_verb.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 6]

    def call(
        verb: str, a: Tensor, b: Tensor | None, out: Tensor, *sizes: int, first: tuple[int, int] = (0, 0),
        option: int = 0,
    ) -> None:  # fmt: skip
        there = [x if x is None else x.to(device) for x in (a, b, out)]
        stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
        pointers = [None if x is None else x.data_ptr() for x in there]
        rows, columns = sizes or (0, 0)
        said = library.run_verb(VERBS.index(verb), *pointers, rows, columns, *first, option, stream)
        assert said is None, said.decode()
        if device == "cuda":
            torch.cuda.synchronize()
        assert there[2] is not None
        out.copy_(there[2])

    return call


def integers(*shape: int, dtype: torch.dtype = BRAIN, seed: int = 0) -> Tensor:
    """Small enough for every product and sum of them to be exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)


def as_numpy(x: Tensor) -> np.ndarray:
    return x.double().numpy()


@pytest.mark.parametrize("first_row", [0, 40, 72, 90])
def test_a_loaded_box_is_zero_beyond_the_tensor(first_row: int, run: Run) -> None:
    x = integers(2, 2, 100, 120)
    out = torch.full((64, 128), torch.nan, dtype=BRAIN)
    run("load", x, None, out, 100, 120, first=(first_row, 0))
    expected = np.zeros((64, 128))
    rows = as_numpy(x)[1, 1, first_row : first_row + 64]
    expected[: len(rows), :120] = rows
    np.testing.assert_array_equal(as_numpy(out), expected)


@pytest.mark.parametrize("verb", ["store", "reduce"])
@pytest.mark.parametrize("first", [(0, 0), (8, 64), (72, 64)], ids=str)
def test_a_stored_box_changes_nothing_beyond_the_tensor(verb: str, first: tuple[int, int], run: Run) -> None:
    tile, out = integers(64, 64), integers(2, 2, 100, 120, seed=1)
    expected = as_numpy(out).copy()
    row, column = first
    part = expected[1, 1, row : row + 64, column : column + 64]
    part[...] = as_numpy(tile)[: part.shape[0], : part.shape[1]] + (part if verb == "reduce" else 0)
    run(verb, tile, None, out, 100, 120, first=first)
    np.testing.assert_array_equal(as_numpy(out), expected)


def test_a_bulk_copy_adds_float32(run: Run) -> None:
    a, out = integers(128, dtype=SINGLE), integers(128, dtype=SINGLE, seed=1)
    expected = as_numpy(a) + as_numpy(out)
    run("add", a, None, out)
    np.testing.assert_array_equal(as_numpy(out), expected)


# (A in registers, A transposed, B transposed, N)
PRODUCTS = [
    *((False, a, b, N) for a in (False, True) for b in (False, True) for N in (32, 64, 128)),
    *((True, False, b, N) for b in (False, True) for N in (64, 128)),
    (True, False, True, 256),
]


@pytest.mark.parametrize("dtype", [BRAIN, HALF], ids=str)
@pytest.mark.parametrize(("registers", "a_transposed", "b_transposed", "N"), PRODUCTS)
def test_product(
    registers: bool, a_transposed: bool, b_transposed: bool, N: int, dtype: torch.dtype, run: Run
) -> None:
    a, b = integers(64, 64, dtype=dtype), integers(64, N, dtype=dtype, seed=1)
    out = torch.full((64, N), torch.nan, dtype=SINGLE)
    option = (dtype == HALF) + 2 * registers + 4 * a_transposed + 8 * b_transposed
    a_lies, b_lies = a.t() if a_transposed else a, b if b_transposed else b.t()
    run("product", a_lies.contiguous(), b_lies.contiguous(), out, 0, N, option=option)
    np.testing.assert_array_equal(as_numpy(out), as_numpy(a) @ as_numpy(b))


def test_product_with_the_second_half_of_a_chunk(run: Run) -> None:
    a, b = integers(64, 64), integers(64, 32, seed=1)
    out = torch.full((64, 32), torch.nan, dtype=SINGLE)
    run("product", a, b, out, 0, 32, first=(0, 32), option=8)
    np.testing.assert_array_equal(as_numpy(out), as_numpy(a) @ as_numpy(b))


@pytest.mark.parametrize("size", [2, 8, 16])
def test_blocks_of_a_cluster_send_to_each_other(size: int, run: Run) -> None:
    a, out = integers(16, 16, dtype=SINGLE), torch.full((16, 16), torch.nan, dtype=SINGLE)
    run("cluster", a, None, out, option=size)
    expected = np.full((16, 16), np.nan)
    expected[:size, :size] = as_numpy(a).T[:size, :size]
    np.testing.assert_array_equal(as_numpy(out), expected)


def test_a_ring_of_barriers_between_warpgroups_of_unequal_registers(run: Run) -> None:
    x = integers(2, 2, 5 * 64, 128)
    out = torch.full((128,), torch.nan)
    run("pipeline", x, None, out, 5 * 64, 128)
    np.testing.assert_array_equal(as_numpy(out), as_numpy(x)[1, 1].sum(0))


def test_register_tiles_are_stored_rounded(run: Run) -> None:
    a = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    out = torch.full((2, 64, 64), torch.nan, dtype=BRAIN)
    run("registers", a, None, out)
    expected = torch.stack((a, a)).to(BRAIN)
    expected[1, 60:] = expected[1, :, 56:] = torch.nan
    np.testing.assert_array_equal(as_numpy(out), as_numpy(expected))


def test_exp2_by_polynomial(run: Run) -> None:
    a = torch.linspace(-126, 20, 128)
    a[:3] = torch.tensor([-torch.inf, -1e4, torch.nan])
    out = torch.zeros(128)
    run("exp2", a, None, out)
    assert out[:2].tolist() == [0, 0] and out[2].isnan()
    np.testing.assert_allclose(as_numpy(out[3:]), 2 ** as_numpy(a[3:]), rtol=3e-6)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
def test_the_kernels_compile_for_hopper(tmp_path: Path) -> None:
    done = subprocess.run(
        [*FOR_HOPPER, "-cubin", "-o", tmp_path / "verbs.cubin"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    assert "0 bytes spill stores" in output
    assert not [line for line in output.splitlines() if "C75" in line or "warning" in line]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
def test_a_wait_that_lasts_too_long_ends_the_kernel_in_debug_builds(tmp_path: Path) -> None:
    path = tmp_path / "verbs.ptx"
    subprocess.run([*FOR_HOPPER, "-DLMKERN_CUDA_DEBUG", "-ptx", "-o", path], check=True, capture_output=True)
    assert "trap;" in path.read_text() and "vprintf" in path.read_text()
