"""AdamW on parameters of which each process holds a part."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lmkern.training.optimizer import AdamW

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed")


def model() -> nn.Module:
    torch.manual_seed(0)
    # Of three rows two processes hold two and one; of one row, one and none.
    return nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))


def backward(net: nn.Module, seed: int) -> None:
    net.zero_grad()
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    net(x).square().mean().backward()


def work(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    try:
        steps_of_fully_sharded_parameters(processes)
        steps_of_a_gradient_that_lies_elsewhere(processes)
    finally:
        dist.destroy_process_group()


def steps_of_fully_sharded_parameters(processes: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole, sharded = model(), fully_shard(model(), mesh=init_device_mesh("cpu", (processes,)))
    theirs = torch.optim.AdamW(whole.parameters(), lr=0.1)
    ours = AdamW(sharded.parameters(), lr=0.1)
    for seed in range(4):
        for net, optimizer in ((whole, theirs), (sharded, ours)):
            backward(net, seed)
            optimizer.step()
        if seed == 1:
            state = copy.deepcopy(ours.state_dict())
            ours = AdamW(sharded.parameters(), lr=0.1)
            ours.load_state_dict(state)
    for a, b in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.full_tensor(), b, rtol=1e-5, atol=1e-6)
        moment = ours.state[a]["exp_avg"]
        assert moment.placements == a.placements
        torch.testing.assert_close(moment.full_tensor(), theirs.state[b]["exp_avg"], rtol=1e-5, atol=1e-6)


def steps_of_a_gradient_that_lies_elsewhere(processes: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, x, grad = init_device_mesh("cpu", (processes,)), torch.ones(4, 6), torch.arange(24.0).view(4, 6)
    whole, sharded = nn.Parameter(x.clone()), nn.Parameter(distribute_tensor(x, mesh, [Shard(1)]))
    whole.grad, sharded.grad = grad, distribute_tensor(grad, mesh, [Replicate()])
    torch.optim.AdamW([whole]).step()
    AdamW([sharded]).step()
    torch.testing.assert_close(sharded.full_tensor(), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("processes", [1, 2])
def test_sharded_parameters_are_stepped_as_whole_ones(processes: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (processes, str(tmp_path)), nprocs=processes)
