import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lmkern.training import RunConfig, Stage
from lmkern.training.trainer import Trainer, derive_seed

Make = Callable[..., RunConfig]


def trainer(config: RunConfig, dataset: Any, dtype: torch.dtype = torch.float32) -> Trainer:
    return Trainer(config, dataset, torch.device("cpu"), dtype)


def test_64_parts_of_one_row_equal_one_part_of_64(make_config: Make, dataset: Any) -> None:
    losses, norms, weights = [], [], []
    for micro in (0, 16, 16 * 24):
        config = make_config(
            batch_tokens=64 * 16,
            micro_batch_tokens=micro,
            stages=(Stage("documents", 16),),
            tokens=64 * 16,
            model={"dropout": 0.0},
        )
        run = trainer(config, dataset)
        result = run.step(0)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        # Gradients, for Adam's first step is their sign and would hide a scale.
        weights.append(torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None]))
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)
    assert norms == pytest.approx([norms[0]] * 3, abs=1e-6)
    for other in weights[1:]:
        assert (other - weights[0]).abs().max() < 1e-6


def test_loss_of_a_step_is_the_mean_over_its_tokens(make_config: Make, dataset: Any) -> None:
    run = trainer(make_config(model={"dropout": 0.0}), dataset)
    inputs, targets = run.batches[0](0)
    expected = run.model.loss(inputs, targets).item()
    assert run.step(0).loss == pytest.approx(expected, abs=1e-6)


def test_gradient_is_clipped_to_the_norm(make_config: Make, dataset: Any) -> None:
    for clip in (0.0, 1e-3):
        run = trainer(make_config(clip=clip), dataset)
        result = run.step(0)
        # The first moment, which starts at 0, is then 1 - beta1 times the gradient that the step has seen.
        moments = [state["exp_avg"] for state in run.optimizer.state.values()]
        after = torch.nn.utils.get_total_norm(moments).item() / (1 - run.config.training.beta1)
        assert result.grad_norm > 1e-2
        assert after == pytest.approx(clip or result.grad_norm, rel=1e-3)


def test_step_moves_the_weights_by_the_scheduled_learning_rate(make_config: Make, dataset: Any) -> None:
    run = trainer(make_config(warmup=0.5, weight_decay=0.0), dataset)
    before = run.model.head.weight.detach().clone()
    result = run.step(0)
    # Adam's first step moves each weight with a gradient by the learning rate.
    moved = (run.model.head.weight.detach() - before).abs().max().item()
    assert result.learning_rate == pytest.approx(1e-2 * 0.5 / 6)
    assert moved == pytest.approx(result.learning_rate, rel=1e-2)


def test_gradient_that_is_not_finite_leaves_the_weights(make_config: Make, dataset: Any) -> None:
    run = trainer(make_config(), dataset)
    run.step(0)
    before = {name: tensor.clone() for group in run.tensors().values() for name, tensor in group.items()}
    handle = next(run.model.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    result = run.step(1)
    assert math.isfinite(result.loss)
    assert not result.taken
    for group in run.tensors().values():
        assert all(torch.equal(tensor, before[name]) for name, tensor in group.items())
    handle.remove()
    assert run.step(2).taken
    assert (run.state.skipped, run.state.skipped_in_a_row) == (1, 0)


def test_a_step_draws_the_same_dropout_whatever_came_before(make_config: Make, dataset: Any) -> None:
    losses = []
    for disturbance in (False, True):
        run = trainer(make_config(model={"dropout": 0.5}), dataset)
        if disturbance:
            run.validate()
            torch.rand(7)
        losses.append(run.step(0).loss)
    assert losses[0] == losses[1]
    assert run.step(0).loss != losses[0]


def test_seed_decides_the_weights_and_the_batches(make_config: Make, dataset: Any) -> None:
    runs = [trainer(make_config(seed=seed), dataset) for seed in (0, 0, 1)]
    first, same, other = ([p.detach() for p in run.model.parameters()] for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])
    batches = [run.batches[0](0)[0] for run in runs]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_stage_begins_at_the_start_of_its_own_data(make_config: Make, dataset: Any) -> None:
    run = trainer(make_config(), dataset)
    asked: list[tuple[int, int]] = []
    for index, plain in enumerate(list(run.batches)):
        run.batches[index] = lambda step, index=index, plain=plain: asked.append((index, step)) or plain(step)  # type: ignore
    for step in (0, 5, 6, 7):
        run.step(step)
    assert asked == [(0, 0), (0, 5), (1, 0), (1, 1)]


def test_validation_scores_the_same_rows_in_evaluation_mode(make_config: Make, dataset: Any) -> None:
    run = trainer(make_config(model={"dropout": 0.5}), dataset)
    inputs, targets = run.validation_batches[0][:2]
    assert inputs.shape == targets.shape == (256 // 32, 32)
    run.model.train()
    first = run.validate()
    assert run.model.training
    assert run.validate() == first
    with torch.no_grad():
        nats = run.model.eval().loss(inputs, targets, reduction="sum").item()
    assert first[0] == pytest.approx(nats / targets.numel(), rel=1e-5)
    other = trainer(make_config(seed=9), dataset)
    assert torch.equal(other.validation_batches[0].inputs, inputs)


def test_bits_per_byte_count_the_bytes_of_the_scored_text(make_config: Make, dataset: Any) -> None:
    run = trainer(make_config(validation_tokens=10_000), dataset)
    loss, bits_per_byte = run.validate()
    _, targets = run.validation_batches[0][:2]
    assert dataset.end_of_text in targets
    text = dataset.tokenizer.decode(targets.flatten().tolist(), skip_special_tokens=True)
    expected = loss * targets.numel() / math.log(2) / len(text.encode())
    assert bits_per_byte == pytest.approx(expected, rel=1e-9)


def test_best_weights_are_those_of_the_best_validation(
    make_config: Make, dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(make_config(), dataset)
    run.step(0)
    run.validate()
    best = {name: tensor.clone() for name, tensor in run.best.items()}
    monkeypatch.setattr(run.model, "loss", lambda *args, **kwargs: torch.tensor(1e9))
    run.validate()
    assert run.state.waited == 1
    assert all(torch.equal(tensor, best[name]) for name, tensor in run.best.items())
    monkeypatch.setattr(run.model, "loss", lambda *args, **kwargs: torch.tensor(float("nan")))
    run.validate()
    assert (run.state.waited, run.state.validation_loss, run.state.best_step) == (2, None, 1)


def test_bfloat16_keeps_parameters_and_gradients_in_float32(make_config: Make, dataset: Any) -> None:
    run = trainer(make_config(), dataset, torch.bfloat16)
    dtypes = []
    run.model.blocks[-1].feed_forward.down.register_forward_hook(
        lambda module, args, out: dtypes.append(out.dtype)
    )
    run.step(0)
    assert set(dtypes) == {torch.bfloat16}
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in run.model.parameters() if p.grad is not None} == {torch.float32}


def test_the_model_learns(make_config: Make, dataset: Any) -> None:
    run = trainer(make_config(tokens=60 * 128, model={"dropout": 0.0}), dataset)
    before = run.validate()[0]
    for step in range(60):
        run.step(step)
    assert run.validate()[0] < before - 1


def test_derived_seeds_differ_by_purpose() -> None:
    seeds = {
        derive_seed(0, "step", 1),
        derive_seed(0, "step", 2),
        derive_seed(1, "step", 1),
        derive_seed(0, "stage", 1),
    }
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
