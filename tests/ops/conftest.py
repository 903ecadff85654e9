"""Where the tensors of the op tests lie."""

from collections.abc import Iterator

import pytest
import torch


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
