from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from lmkern.nn import FeedForward
from lmkern.nn.feed_forward import Activation

FORMULAS = {
    "gelu": lambda h: h * 0.5 * (1 + torch.erf(h / 2**0.5)),
    "gelu_tanh": lambda h: 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))),
    "relu": lambda h: h.clamp(min=0),
    "relu_squared": lambda h: h.clamp(min=0) ** 2,
    "silu": lambda h: h * torch.sigmoid(h),
    "geglu": lambda h: F.gelu(h[..., :6]) * h[..., 6:],
    "geglu_tanh": lambda h: F.gelu(h[..., :6], approximate="tanh") * h[..., 6:],
    "swiglu": lambda h: h[..., :6] * torch.sigmoid(h[..., :6]) * h[..., 6:],
}


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("bias", [True, False])
def test_is_down_of_activation_of_up(activation, bias):
    torch.manual_seed(0)
    module = FeedForward(4, 6, activation=activation, bias=bias).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    hidden = FORMULAS[activation](F.linear(x, module.up.weight, module.up.bias))
    expected = F.linear(hidden, module.down.weight, module.down.bias)
    torch.testing.assert_close(module(x), expected)
    assert (module.up.bias is not None) == bias


def test_hidden_dropout_falls_between_the_maps_in_training_only():
    torch.manual_seed(0)
    module = FeedForward(64, 64, activation="relu", hidden_dropout=0.5, bias=False)
    torch.nn.init.eye_(module.down.weight)
    x = torch.randn(8, 64)
    kept = F.relu(F.linear(x, module.up.weight))
    y = module(x)
    assert 0.6 < (y == 0).float().mean() < 0.9
    torch.testing.assert_close(y[y != 0], 2 * kept[y != 0])
    torch.testing.assert_close(module.eval()(x), kept)


def test_unknown_activation_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"FeedForward: activation must be one of gelu, .*; got 'tanh'"):
        FeedForward(4, 8, activation="tanh")


class Adapter(torch.nn.Module):
    """A map and something added to it, with the map's weight for its own, as adapters have it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, x):
        return self.base(x) + 1


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_what_took_the_first_maps_place_is_called(activation):
    torch.manual_seed(0)
    module, heard = FeedForward(4, 6, activation=activation).double(), []
    x = torch.randn(3, 4, dtype=torch.float64)
    expected = F.linear(FORMULAS[activation](module.up(x) + 1), module.down.weight, module.down.bias)
    module.up.register_forward_hook(lambda *seen: heard.append(seen[0]))
    module(x)
    module.up = Adapter(module.up)
    torch.testing.assert_close(module(x), expected)
    assert heard == [module.up.base] * 2
