import pytest
import torch
from torch import nn

from lmkern.training import TrainingConfig
from lmkern.training.optimizer import AdamW, load_optimizer_tensors, make_optimizer, optimizer_tensors


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


def quadratic(optimizer_class: type[torch.optim.Optimizer], steps: int, **options: object) -> nn.Module:
    net = model()
    optimizer = optimizer_class(net.parameters(), lr=0.01, betas=(0.8, 0.9), eps=1e-7, **options)
    for seed in range(steps):
        step(net, optimizer, seed)
    return net


def test_parameters_are_torchs() -> None:
    mine = quadratic(AdamW, 5, weight_decay=0.3)
    theirs = quadratic(torch.optim.AdamW, 5, weight_decay=0.3)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_state_goes_to_torchs_optimizer_and_back() -> None:
    net = model()
    mine, theirs = AdamW(net.parameters()), torch.optim.AdamW(net.parameters())
    step(net, mine, 0)
    theirs.load_state_dict(mine.state_dict())
    step(net, theirs, 1)
    mine.load_state_dict(theirs.state_dict())
    step(net, mine, 2)
    for parameter in net.parameters():
        state = mine.state[parameter]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["step"] == 3


def test_moments_of_16_bit_parameters_are_float32_and_loaded_as_they_were() -> None:
    net = model().bfloat16()
    optimizer = AdamW(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    other = AdamW(net.parameters())
    other.load_state_dict(optimizer.state_dict())
    for parameter in net.parameters():
        for entry in ("exp_avg", "exp_avg_sq"):
            assert other.state[parameter][entry].dtype == torch.float32
            assert torch.equal(other.state[parameter][entry], optimizer.state[parameter][entry])


def test_grad_scale_clips_and_leaves_the_gradients() -> None:
    nets = [model() for _ in range(2)]
    for net, scale in zip(nets, (0.5, 1.0), strict=True):
        optimizer = AdamW(net.parameters())
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, 3.0 if scale == 0.5 else 1.5)
        optimizer.step(grad_scale=scale)
        assert all((p.grad == (3.0 if scale == 0.5 else 1.5)).all() for p in net.parameters())
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a, b)


def test_closure_is_called_with_gradients_on() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = AdamW([weight])

    def closure() -> torch.Tensor:
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    assert (weight < 1).all()
