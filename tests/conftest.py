"""Every test: Triton's interpreter where there is no GPU, a fixed seed, and two threads at most."""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator

import pytest

# Two processes of two threads share two cores: who waits must not spin. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# Read when Triton is imported, which nothing has done yet.
if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Indices are looked at on GPUs too.
os.environ.setdefault("LMKERN_CHECKED", "1")

# Without it cuBLAS refuses to run where deterministic algorithms are asked for, as poisoned memory is.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

THREADS = 2

# Files that take half a minute and more, begun first: one that is left for the end has a core to itself.
LONGEST = (
    "test_triton_compile", "test_cuda_build", "test_attention_torch", "test_attention_packed", "test_gpu",
    "test_attention_features", "test_attention", "test_linear_cross_entropy", "test_triton_attention",
    "test_cross_entropy_torch", "test_amx",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True)
def known_state() -> Iterator[None]:
    """The same random numbers and threads for every test, whatever ran before it."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def full_disk() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """A context in which no file grows beyond so many bytes: what writes meet the error of a full disk."""
    resource = pytest.importorskip("resource")

    @contextlib.contextmanager
    def full(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return full
