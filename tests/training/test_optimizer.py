import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lmkern.training import TrainingConfig
from lmkern.training.optimizer import AdamW, load_optimizer_tensors, make_optimizer, optimizer_tensors


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
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


# Not decoupled: a group's own word, which torch forgets when it is loaded or copied.
OPTIONS = ({"maximize": True}, {"amsgrad": True}, {"decoupled_weight_decay": False})


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_what_the_op_does_not_do_is_left_to_torch(option: dict[str, bool]) -> None:
    """In one group of two; the other is stepped, and scaled, by the op."""
    nets = [model() for _ in range(2)]
    for net, kind in zip(nets, (AdamW, torch.optim.AdamW), strict=True):
        first, *others = net.parameters()
        optimizer = kind([{"params": [first], **option}, {"params": others}], lr=0.1, weight_decay=0.3)
        for seed in range(4):
            step(net, optimizer, seed)
    for mine, theirs in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("option", ["maximize", "amsgrad"])
def test_options_of_a_loaded_state_count(option: str) -> None:
    nets = [model() for _ in range(2)]
    source = torch.optim.AdamW(nets[0].parameters(), **{option: True})
    # So large that its square is remembered.
    step(nets[0], source, 0, scale=10.0)
    nets[1].load_state_dict(nets[0].state_dict())
    loaded = AdamW(nets[1].parameters())
    # torch's own loading shares the tensors of a state.
    loaded.load_state_dict(copy.deepcopy(source.state_dict()))
    for seed in range(1, 5):
        step(nets[0], source, seed)
        step(nets[1], loaded, seed)
    for mine, theirs in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_goes_on(duplicate: Callable[[object], tuple[nn.Module, AdamW]]) -> None:
    net = model()
    optimizer = make_optimizer(net, TrainingConfig(learning_rate=0.1))
    step(net, optimizer, 0)
    twin, again = duplicate((net, optimizer))
    step(net, optimizer, 1)
    step(twin, again, 1)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_each_group_is_stepped_where_it_lies() -> None:
    """A group added later, on another device; grad_scale counts for both."""
    net, elsewhere = model(), nn.Parameter(torch.zeros(3, device="meta"))
    alone = model()
    optimizer, expected = AdamW(net.parameters()), AdamW(alone.parameters())
    optimizer.add_param_group({"params": [elsewhere], "fused": False})
    elsewhere.grad = torch.ones_like(elsewhere)
    for mine in (net, alone):
        for parameter in mine.parameters():
            parameter.grad = torch.ones_like(parameter)
    optimizer.step(grad_scale=0.5)
    expected.step(grad_scale=0.5)
    assert optimizer.state[elsewhere]["step"] == 1
    assert len(optimizer.param_groups) == 2
    for a, b in zip(net.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b)


def test_hooks_are_called_once_a_step_whoever_takes_it() -> None:
    net, calls = model(), []
    torch.optim.AdamW(net.parameters())
    first, *others = net.parameters()
    optimizer = AdamW([{"params": [first], "maximize": True}, {"params": others}])
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    step(net, optimizer, 0)
    assert calls == ["before", "after"]


def test_groups_elsewhere_are_fused_unless_they_say_otherwise() -> None:
    weights = [nn.Parameter(torch.zeros(3, device=device)) for device in ("cpu", "meta", "meta")]
    optimizer = AdamW(weights[:1])
    optimizer.add_param_group({"params": weights[1:2]})
    optimizer.add_param_group({"params": weights[2:], "fused": False})
    assert [group["fused"] for group in optimizer.param_groups] == [None, True, False]


def test_a_graph_from_before_the_step_is_refused() -> None:
    weight, x = nn.Parameter(torch.randn(4, 4)), torch.randn(3, 4, requires_grad=True)
    loss = (x @ weight).square().sum()
    weight.grad = torch.randn(4, 4)
    AdamW([weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_hooks_that_reorder_a_state_reorder_the_moments() -> None:
    net, other = model(), model()
    optimizer = AdamW(net.parameters())
    step(net, optimizer, 0)
    loaded = AdamW(reversed(list(other.parameters())))
    last = len(list(net.parameters())) - 1

    def reverse(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "state": {last - index: entry for index, entry in state["state"].items()}}

    hook = loaded.register_load_state_dict_pre_hook(reverse)
    loaded.load_state_dict(optimizer.state_dict())
    for ours, theirs in zip(other.parameters(), net.parameters(), strict=True):
        assert torch.equal(loaded.state[ours]["exp_avg"], optimizer.state[theirs]["exp_avg"])
    hook.remove()
    assert not loaded._optimizer_load_state_dict_pre_hooks


@pytest.mark.parametrize("loads", [False, True])
def test_moments_follow_the_memory_format(loads: bool) -> None:
    nets, optimizers = [], []
    for kind in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        net = nn.Conv2d(8, 8, 3)
        optimizer = kind(net.parameters())
        step(net, optimizer, 0)
        net.to(memory_format=torch.channels_last)
        if loads:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = kind(net.parameters())
            optimizer.load_state_dict(state)
        step(net, optimizer, 1)
        nets.append(net)
        optimizers.append(optimizer)
    for ours, theirs in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert optimizers[0].state[ours]["step"] == 2


def test_complex_parameters_are_left_to_torch() -> None:
    torch.manual_seed(0)
    mine, theirs = (nn.Parameter(torch.ones(3, dtype=torch.complex64)) for _ in range(2))
    mine.grad = theirs.grad = torch.randn(3, dtype=torch.complex64)
    AdamW([mine]).step()
    torch.optim.AdamW([theirs]).step()
    assert torch.equal(mine, theirs)
