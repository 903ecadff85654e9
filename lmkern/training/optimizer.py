"""AdamW, and its state as named tensors that safetensors can hold."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lmkern.training.config import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) that decays matrices and embeddings only.

    Gains and biases (parameters of fewer than two dimensions) get no decay. The fused implementation runs on
    CPU and CUDA.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as "<parameter>.<entry>" -> tensor; empty before the first step."""
    return {
        f"{name}.{entry}": tensor
        for name, parameter in model.named_parameters()
        for entry, tensor in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what optimizer_tensors gave. Raises ValueError for a tensor that belongs to no parameter."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition(".")
        if name not in parameters:
            raise ValueError(
                f"load_optimizer_tensors: {key!r} belongs to no parameter of the model: "
                "the checkpoint is of another model"
            )
        parameter = parameters[name]
        optimizer.state[parameter][entry] = tensor.to(parameter.device, copy=True)
