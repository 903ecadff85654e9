"""AdamW, and its state as named tensors that safetensors can hold."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmkern.nn import Embedding
from lmkern.ops import adamw_
from lmkern.training.config import TrainingConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW, whose state_dict it shares, on the one-pass op `lmkern.adamw_`.

    params, lr, betas, eps, weight_decay: as torch's. The moments of 16-bit parameters are float32, here and
    when they are loaded. Of a parameter that is a DTensor, as FSDP2's are, each process steps its own part.
    Left to torch's own step, and to what it keeps: groups whose parameters are not all on the CPU (fused,
    unless they say otherwise) or not all real, and groups with amsgrad, maximize or a decay that is not
    decoupled.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        fused = param_group.get("fused")
        super().add_param_group(param_group)
        if fused is None and not _on_cpu(param_group):
            param_group["fused"] = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: float = 1.0) -> Any:
        """One step on every parameter that has a gradient; its gradient counts times grad_scale.

        The gradients are left as they are, but for those of groups that torch steps. Returns the closure's
        loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in filter(_ours, self.param_groups):
            for param in group["params"]:
                if param.grad is not None:
                    self._step_one(param, group, grad_scale)
        if others := [group for group in self.param_groups if not _ours(group)]:
            if grad_scale != 1:
                torch._foreach_mul_(
                    [p.grad for group in others for p in group["params"] if p.grad is not None], grad_scale
                )
            groups, self.param_groups = self.param_groups, others
            try:
                _unhooked(torch.optim.AdamW.step)(self)
            finally:
                self.param_groups = groups
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the moments come as they were saved: torch rounds them to the parameter's dtype."""
        loaded = state_dict

        # The last of the hooks that may put another in its place, as one that reorders parameters does.
        def see(_optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            nonlocal loaded
            loaded = state_dict

        last = self.register_load_state_dict_pre_hook(see)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        for saved, group in zip(loaded["param_groups"], self.param_groups, strict=True):
            if _ours(group):
                for index, param in zip(saved["params"], group["params"], strict=True):
                    if index in loaded["state"]:
                        for entry in _MOMENTS:
                            self.state[param][entry] = _laid_out(loaded["state"][index][entry], param)

    def _step_one(self, param: Tensor, group: Mapping[str, Any], grad_scale: float) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            for entry in _MOMENTS:
                state[entry] = torch.zeros_like(param, dtype=_moment_dtype(param))
        for entry in _MOMENTS:
            # A model may take another memory format between two steps.
            if state[entry].stride() != param.stride():
                state[entry] = _laid_out(state[entry], param)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        adamw_(
            *(_local(x, param) for x in (param, param.grad, *(state[entry] for entry in _MOMENTS))),
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=int(state["step"]),
            grad_scale=grad_scale,
        )


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step without the hooks that torch puts around it once it has made one of its class: ours ran."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]


def _on_cpu(group: Mapping[str, Any]) -> bool:
    return all(param.device.type == "cpu" for param in group["params"])


def _ours(group: Mapping[str, Any]) -> bool:
    """Whether `adamw_` computes what the group asks for; asked anew, as a model may move."""
    plain = group["decoupled_weight_decay"] and not (group["amsgrad"] or group["maximize"])
    return plain and _on_cpu(group) and not any(param.is_complex() for param in group["params"])


def _local(x: Any, param: Any) -> Tensor:
    """The part of x that this process holds of param, a DTensor: every element is stepped by itself."""
    if not hasattr(param, "placements"):
        return x  # type: ignore[no-any-return]
    if x.placements != param.placements:
        x = x.redistribute(placements=param.placements)
    return x.to_local()  # type: ignore[no-any-return]


def _moment_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _laid_out(moment: Tensor, param: Tensor) -> Tensor:
    """A copy beside the parameter, in the order of its elements in memory."""
    return torch.empty_like(param, dtype=_moment_dtype(param)).copy_(moment)


def make_optimizer(model: nn.Module, config: TrainingConfig) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) that decays matrices and embeddings only.

    Gains and biases (parameters of fewer than two dimensions) get no decay. A group's "rate" is its learning
    rate as a multiple of the schedule's: embedding_rate for embeddings, a head tied to one included, and for
    every other table: what has two dimensions and is the weight of no linear map.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    maps, tables = (
        {id(module.weight) for module in model.modules() if isinstance(module, kind)}
        for kind in (nn.Linear, nn.Embedding | Embedding)
    )
    matrices = [p for p in parameters if p.ndim >= 2]
    tables |= {id(p) for p in matrices if id(p) not in maps}
    decay, rate = config.weight_decay, config.embedding_rate
    groups: list[dict[str, Any]] = [
        {"params": [p for p in matrices if id(p) not in tables], "weight_decay": decay, "rate": 1.0},
        {"params": [p for p in matrices if id(p) in tables], "weight_decay": decay, "rate": rate},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "rate": 1.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
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
