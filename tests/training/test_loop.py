import dataclasses
import errno
import io
import json
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lmkern.cli.main import main
from lmkern.data import DataConfig, load, prepare
from lmkern.jobs.steps import evaluate_run
from lmkern.models import GPT
from lmkern.training import RunConfig, Stage, train
from lmkern.training import loop as loop_module
from lmkern.training.run_folder import DERIVED
from lmkern.training.trainer import Trainer

Make = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    yield
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """The signal arrives while a step is computed, the first time it is."""
    plain = Trainer.step
    sent = []

    def interrupted(self: Trainer, at: int) -> Any:
        if at == step and not sent:
            sent.append(at)
            os.kill(os.getpid(), number)
        return plain(self, at)

    monkeypatch.setattr(Trainer, "step", interrupted)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("step", [0, 4, 5, 6, 8, 11])
def test_interrupted_and_continued_is_bit_identical_to_never_interrupted(
    dtype: str,
    step: int,
    make_config: Make,
    dataset: Any,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    uninterrupted: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    read_run: Any,
    assert_same_run: Any,
) -> None:
    config = make_config(dtype=dtype)
    if dtype not in uninterrupted:
        uninterrupted[dtype] = tmp_path_factory.mktemp(dtype)
        train(config, dataset, uninterrupted[dtype], progress=False)
    signal_at(monkeypatch, step, signal.SIGTERM if step % 2 else signal.SIGINT)
    first = train(config, dataset, tmp_path, progress=False)
    if step < 11:
        assert (first["reason"], first["steps"]) == ("interrupted", step + 1)
        second = train(config, dataset, tmp_path, resume=True, progress=False)
        assert (second["reason"], second["steps"]) == ("tokens", 12)
        assert [event["step"] for event in events(tmp_path, "resume")] == [step + 1]
    assert_same_run(read_run(tmp_path), read_run(uninterrupted[dtype]))


def test_an_interrupted_run_says_the_command_that_goes_on(
    make_config: Make,
    dataset: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    signal_at(monkeypatch, 3, signal.SIGINT)
    out = tmp_path / "a run"
    config = dataclasses.replace(make_config(), data=DataConfig(**dataset.manifest["config"]))
    assert train(config, dataset, out)["reason"] == "interrupted"
    *_, said = capsys.readouterr().err.splitlines()
    command = shlex.split(said.partition(" To go on: ")[2])
    assert command == ["lmkern", "train", "--data", str(dataset.folder), "--out", str(out), "--resume"]
    assert main(command[1:]) == 0


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs hangups")
def test_a_run_whose_terminal_is_closed_is_saved(
    make_config: Make, dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Closed())
    signal_at(monkeypatch, 3, signal.SIGHUP)
    # Under nohup the tests inherit it ignored, and then it is no request.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert train(make_config(), dataset, tmp_path)["reason"] == "interrupted"
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "checkpoints" / "step-00000004").is_dir()


def test_killed_between_checkpoints_goes_on_from_the_last_one(
    make_config: Make,
    dataset: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_run: Any,
    assert_same_run: Any,
) -> None:
    config = make_config()
    train(config, dataset, tmp_path / "whole", progress=False)
    plain = Trainer.step

    def dies(self: Trainer, step: int) -> Any:
        if step == 7:
            raise OSError("power cut")
        return plain(self, step)

    monkeypatch.setattr(Trainer, "step", dies)
    with pytest.raises(OSError, match="power cut"):
        train(config, dataset, tmp_path / "cut", progress=False)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    monkeypatch.undo()
    train(config, dataset, tmp_path / "cut", resume=True, progress=False)
    assert [event["step"] for event in events(tmp_path / "cut", "resume")] == [4]
    assert_same_run(read_run(tmp_path / "cut"), read_run(tmp_path / "whole"))


def test_resume_before_the_first_checkpoint_starts_again(
    make_config: Make,
    dataset: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_run: Any,
    assert_same_run: Any,
) -> None:
    config = make_config(tokens=4 * 128, checkpoint_every=0)
    train(config, dataset, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "validate", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, dataset, tmp_path / "cut", progress=False)
    train(config, dataset, tmp_path / "cut", resume=True, progress=False)
    assert_same_run(read_run(tmp_path / "cut"), read_run(tmp_path / "whole"))


def test_second_interrupt_stops_at_once(
    make_config: Make, dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(self: Trainer, step: int) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second SIGINT went unheard")

    monkeypatch.setattr(Trainer, "step", impatient)
    with pytest.raises(KeyboardInterrupt):
        train(make_config(), dataset, tmp_path, progress=False)


def test_trains_outside_the_main_thread(make_config: Make, dataset: Any, tmp_path: Path) -> None:
    results: list[dict[str, Any]] = []
    thread = threading.Thread(
        target=lambda: results.append(train(make_config(tokens=256), dataset, tmp_path, progress=False))
    )
    thread.start()
    thread.join()
    assert results[0]["steps"] == 2


def test_best_weights_end_in_the_model_folder_and_patience_stops(
    make_config: Make, dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.0])
    at_best: dict[str, torch.Tensor] = {}

    def validate(self: Trainer) -> tuple[float, float]:
        loss = next(losses)
        self._judge(loss, loss)
        if self.state.step == 4:
            at_best.update({name: tensor.clone() for name, tensor in self.model.named_parameters()})
        return loss, loss

    monkeypatch.setattr(Trainer, "validate", validate)
    result = train(make_config(validate_every=256, patience=2), dataset, tmp_path, progress=False)
    assert (result["reason"], result["steps"], result["best_step"]) == ("early stopping", 8, 4)
    assert result["best_validation_loss"] == 2.0

    def assert_model_is_the_best() -> None:
        saved = load_file(tmp_path / "model" / "model.safetensors")
        assert all(torch.equal(tensor, at_best[name]) for name, tensor in saved.items())

    assert_model_is_the_best()
    (tmp_path / "model" / "model.safetensors").unlink()
    again = train(make_config(validate_every=256, patience=2), dataset, tmp_path, resume=True, progress=False)
    assert (again["reason"], again["steps"]) == ("early stopping", 8)
    assert_model_is_the_best()


def test_step_without_finite_loss_is_skipped_counted_and_reported(
    make_config: Make,
    dataset: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain, calls = Trainer.step, []

    def poisoned(self: Trainer, step: int) -> Any:
        if step != 2:
            return plain(self, step)
        before = {name: tensor.clone() for name, tensor in flat(self).items()}
        with monkeypatch.context() as patch:
            loss = GPT.loss
            patch.setattr(GPT, "loss", lambda *args, **kwargs: loss(*args, **kwargs) * float("nan"))
            result = plain(self, step)
        after = flat(self)
        assert all(torch.equal(before[name], after[name]) for name in before)
        calls.append(step)
        return result

    def flat(trainer: Trainer) -> dict[str, torch.Tensor]:
        groups = trainer.tensors()
        return {f"{group}/{name}": tensor for group in groups for name, tensor in groups[group].items()}

    monkeypatch.setattr(Trainer, "step", poisoned)
    result = train(make_config(), dataset, tmp_path)
    assert calls == [2]
    assert (result["steps"], result["skipped_steps"]) == (12, 1)
    steps = events(tmp_path, "step")
    assert [event["step"] for event in steps if event["skipped"]] == [3]
    assert steps[2]["loss"] is None
    assert "skipped" in capsys.readouterr().err


def test_loss_that_stays_infinite_ends_the_run(
    make_config: Make, dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = GPT.loss
    monkeypatch.setattr(GPT, "loss", lambda *args, **kwargs: loss(*args, **kwargs) * float("inf"))
    with pytest.raises(FloatingPointError, match="20 steps in a row"):
        train(make_config(tokens=100 * 128), dataset, tmp_path, progress=False)


def test_folder_with_a_run_is_refused_and_left_alone(make_config: Make, dataset: Any, tmp_path: Path) -> None:
    config = make_config(tokens=256)
    train(config, dataset, tmp_path, progress=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match=r"--resume .*--overwrite"):
        train(config, dataset, tmp_path, progress=False)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_overwrite_removes_the_run_and_nothing_else(make_config: Make, dataset: Any, tmp_path: Path) -> None:
    train(make_config(tokens=512), dataset, tmp_path, progress=False)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "evaluation.json").write_text("{}")
    train(make_config(tokens=256, seed=1), dataset, tmp_path, overwrite=True, progress=False)
    assert [event["step"] for event in events(tmp_path, "step")] == [1, 2]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "evaluation.json").exists()


def test_what_was_made_from_earlier_weights_goes_when_training_goes_on(
    make_config: Make, dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_at(monkeypatch, 2, signal.SIGINT)
    train(make_config(), dataset, tmp_path, progress=False)
    for name in DERIVED:
        (tmp_path / name).write_text("{}")
    train(make_config(), dataset, tmp_path, resume=True, progress=False)
    assert not [name for name in DERIVED if (tmp_path / name).exists()]
    # A run that was finished keeps its weights, and all that was made from them.
    (tmp_path / "evaluation.json").write_text("{}")
    train(make_config(), dataset, tmp_path, resume=True, progress=False)
    assert (tmp_path / "evaluation.json").exists()


def test_overwrite_with_a_configuration_that_does_not_fit_loses_nothing(
    make_config: Make, dataset: Any, tmp_path: Path
) -> None:
    train(make_config(tokens=256), dataset, tmp_path, progress=False)
    wrong = make_config(stages=(Stage("documents", 32),), validation_tokens=8)
    with pytest.raises(ValueError, match="validation needs at least a row of 32 tokens"):
        train(wrong, dataset, tmp_path, overwrite=True, progress=False)
    assert (tmp_path / "checkpoints" / "step-00000002").is_dir()


def test_resume_with_another_configuration_lists_what_differs(
    make_config: Make, dataset: Any, tmp_path: Path
) -> None:
    train(make_config(tokens=256), dataset, tmp_path, progress=False)
    other = make_config(tokens=256, learning_rate=0.5, keep_checkpoints=9, model={"dropout": 0.25})
    with pytest.raises(ValueError, match=r"model\.dropout was 0\.1 and is now 0\.25; ") as error:
        train(other, dataset, tmp_path, resume=True, progress=False)
    assert "training.learning_rate was 0.01 and is now 0.5" in str(error.value)
    assert "keep_checkpoints" not in str(error.value)


def test_a_run_finds_its_data_where_it_was_moved_and_takes_no_other(
    make_config: Make, dataset: Any, tmp_path: Path
) -> None:
    moved, run = tmp_path / "moved", tmp_path / "run"
    shutil.copytree(dataset.folder, moved)
    train(make_config(), load(moved), run, progress=False)
    about = json.loads((run / "run.json").read_text())
    shutil.move(moved, tmp_path / "here")
    train(make_config(), load(tmp_path / "here"), run, resume=True, progress=False)
    assert json.loads((run / "run.json").read_text()) == about | {"data": str(tmp_path / "here")}
    evaluate_run(run)
    shutil.rmtree(tmp_path / "here")
    source = tmp_path / "text"
    source.mkdir()
    for split in ("train", "validation", "test"):
        (source / f"{split}.txt").write_text(" ".join(getattr(dataset, split).text()))
    prepare(DataConfig(paths=(str(source),), vocab_size=290, max_document_bytes=2000), tmp_path / "here")
    with pytest.raises(ValueError, match=r"evaluate: .*here is not what the run .* was trained on: expected"):
        evaluate_run(run)


def test_resume_with_other_data_is_refused(make_config: Make, dataset: Any, tmp_path: Path) -> None:
    train(make_config(tokens=256), dataset, tmp_path, progress=False)
    manifest = dataset.manifest | {"corpus": dataset.manifest["corpus"] | {"sha256": "another"}}
    with pytest.raises(ValueError, match=r"data must be that of the run.*got another"):
        train(
            make_config(tokens=256),
            dataclasses.replace(dataset, manifest=manifest),
            tmp_path,
            resume=True,
            progress=False,
        )


@pytest.mark.parametrize("option", ["resume", "overwrite", "progress"])
def test_what_is_on_or_off_is_true_or_false(
    make_config: Make, dataset: Any, tmp_path: Path, option: str
) -> None:
    options: dict[str, Any] = {option: "no"}
    with pytest.raises(TypeError, match=f"train: {option} must be True or False; got 'no'"):
        train(make_config(), dataset, tmp_path, **options)


def test_resume_without_a_run_is_refused(make_config: Make, dataset: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="leave --resume out"):
        train(make_config(), dataset, tmp_path / "none", resume=True, progress=False)
    assert not (tmp_path / "none").exists()


def test_resume_from_a_damaged_checkpoint_names_it_and_the_one_before(
    make_config: Make, dataset: Any, tmp_path: Path
) -> None:
    train(make_config(), dataset, tmp_path, progress=False)
    file = tmp_path / "checkpoints" / "step-00000012" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"step-00000012/optimizer\.safetensors is truncated.*step-00000008"):
        train(make_config(), dataset, tmp_path, resume=True, progress=False)


def test_vocabulary_smaller_than_the_data_is_refused(make_config: Make, dataset: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set model\.vocab_size = 300"):
        train(make_config(model={"vocab_size": 299}), dataset, tmp_path, progress=False)


def test_run_folder_tells_what_was_done(make_config: Make, dataset: Any, tmp_path: Path) -> None:
    config = make_config()
    result = train(config, dataset, tmp_path, progress=False)
    about = json.loads((tmp_path / "run.json").read_text())
    assert (about["format"], about["version"]) == ("lmkern-run", 1)
    assert about["corpus_sha256"] == dataset.manifest["corpus"]["sha256"]
    assert Path(about["data"]) == dataset.train.path.parent.resolve()
    assert about["resolved"]["dtype"] == "float32"
    tokenizer = (dataset.folder / "tokenizer.json").read_bytes()
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == tokenizer
    steps = events(tmp_path, "step")
    assert [event["tokens"] for event in steps] == [128 * (i + 1) for i in range(12)]
    assert [event["stage"] for event in steps] == [0] * 6 + [1] * 6
    assert [event["step"] for event in events(tmp_path, "stage")] == [0, 6]
    assert [event["step"] for event in events(tmp_path, "validation")] == [3, 6, 9, 12]
    assert [event["step"] for event in events(tmp_path, "checkpoint")] == [4, 8, 12]
    (end,) = events(tmp_path, "end")
    assert end["reason"] == result["reason"] == "tokens"
    phases = ("data", "forward", "backward", "optimizer", "validation", "checkpoint")
    assert all(end["seconds"][phase] > 0 for phase in phases)
    assert sum(end["seconds"].values()) <= end["elapsed"]


def test_training_leaves_threads_and_random_state_as_they_were(
    make_config: Make, dataset: Any, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    expected, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(5)
    train(make_config(tokens=256, threads=threads + 1), dataset, tmp_path, progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_auto_dtype_is_recorded_and_kept_on_resume(
    make_config: Make,
    dataset: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_run: Any,
    assert_same_run: Any,
) -> None:
    monkeypatch.setattr(loop_module, "choose_dtype", lambda device: torch.bfloat16)
    train(make_config(dtype="auto"), dataset, tmp_path / "whole", progress=False)
    signal_at(monkeypatch, 5, signal.SIGINT)
    train(make_config(dtype="auto"), dataset, tmp_path / "cut", progress=False)
    monkeypatch.setattr(loop_module, "choose_dtype", lambda device: torch.float32)
    train(make_config(dtype="auto"), dataset, tmp_path / "cut", resume=True, progress=False)
    assert events(tmp_path / "cut", "resume")[0]["dtype"] == "bfloat16"
    assert_same_run(read_run(tmp_path / "cut"), read_run(tmp_path / "whole"))
