import pytest
import torch
from torch import nn

from lmkern.training import TrainingConfig
from lmkern.training.optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_only_matrices_decay() -> None:
    net = model()
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    optimizer = make_optimizer(net, TrainingConfig(learning_rate=0.1, weight_decay=0.5))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in net.named_parameters():
        shrunk = 0.95 if parameter.ndim >= 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * shrunk)


def test_tied_parameter_is_updated_once() -> None:
    net = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    net[1].weight = net[0].weight
    groups = make_optimizer(net, TrainingConfig()).param_groups
    assert [len(group["params"]) for group in groups] == [1]


def test_state_put_back_continues_bit_for_bit() -> None:
    net, config = model(), TrainingConfig(learning_rate=0.1)
    optimizer = make_optimizer(net, config)
    for seed in range(3):
        step(net, optimizer, seed)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, net).items()}
    other = model()
    other.load_state_dict(net.state_dict())
    resumed = make_optimizer(other, config)
    load_optimizer_tensors(resumed, other, saved)
    step(net, optimizer, 3)
    step(other, resumed, 3)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_before_the_first_step_is_empty() -> None:
    net = model()
    assert optimizer_tensors(make_optimizer(net, TrainingConfig()), net) == {}


def test_state_of_another_model_is_refused() -> None:
    net = model()
    with pytest.raises(ValueError, match=r"'9\.weight\.exp_avg' belongs to no parameter"):
        load_optimizer_tensors(
            make_optimizer(net, TrainingConfig()), net, {"9.weight.exp_avg": torch.zeros(1)}
        )
