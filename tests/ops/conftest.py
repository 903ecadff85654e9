"""Where the tensors of the op tests lie, and what a backend that takes some calls alone does not take."""

from collections.abc import Iterator

import pytest
import torch

from lmkern.kernels.backends import UnsupportedBackend


@pytest.fixture(autouse=True)
def on_the_device_of_the_target(request: pytest.FixtureRequest) -> Iterator[None]:
    """A tensor of which a test does not say where it lies is made where the test's target runs."""
    target = getattr(request.node, "callspec", None) and request.node.callspec.params.get("target")
    if target is None or target.device == "cpu":
        # A default device slows every call of torch down.
        yield
        return
    with torch.device(target.device):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A call that the CUDA kernels refuse in words is no fault of theirs; other backends take every call."""
    target = getattr(item, "callspec", None) and item.callspec.params.get("target")
    try:
        return (yield)
    except UnsupportedBackend as error:
        if target is None or target.backend != "cuda":
            raise
        pytest.skip(str(error))
