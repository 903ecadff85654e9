import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmkern.files import checksum
from lmkern.training import RunConfig, dump_config, train
from lmkern.training import checkpoint as module
from lmkern.training.checkpoint import list_checkpoints, load_checkpoint, remove_unfinished, save_checkpoint

Tensors = dict[str, dict[str, torch.Tensor]]


def tensors(step: int) -> Tensors:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(step))
    return {"model": {"weight": weight, "transposed": weight.T}, "optimizer": {}}


def save(folder: Path, step: int, keep: int = 9) -> Path:
    return save_checkpoint(folder, step, tensors(step), {"loss": 0.1 + 0.2, "best": None}, keep=keep)


def assert_holds(path: Path, step: int) -> None:
    found = load_checkpoint(path)
    assert (found.step, found.state["loss"], found.state["best"]) == (step, 0.1 + 0.2, None)
    assert found.tensors.keys() == {"model", "optimizer"}
    assert all(
        torch.equal(tensor, tensors(step)["model"][name]) for name, tensor in found.tensors["model"].items()
    )


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    assert_holds(save(tmp_path, 7), 7)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 99_999_999, 100_000_000):
        save(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-99999999", "step-100000000"]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_file_is_named_and_refused(name: str, damage: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    file = path / name
    content = bytearray(file.read_bytes())
    expected = (
        None
        if name == "state.json"
        else json.loads((path / "state.json").read_text())["files"][name]["sha256"]
    )
    if damage == "truncated":
        file.write_bytes(content[:-1] if name != "state.json" else content[:-20])
    elif damage == "altered":
        # In state.json this is a digit of the loss: the file is still JSON.
        at = content.index(b"0.3000") + 2 if name == "state.json" else len(content) - 1
        content[at] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    with pytest.raises(ValueError, match=rf"step-00000002/{name} is .*step-00000001") as error:
        load_checkpoint(path)
    if damage != "missing":
        assert "SHA-256" in str(error.value)
        if expected:
            assert expected in str(error.value)
            assert checksum(file)["sha256"] in str(error.value)
    assert_holds(tmp_path / "step-00000001", 1)


def test_only_damaged_checkpoint_says_to_start_again(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "state.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint before it: start again with --overwrite"):
        load_checkpoint(path)


def test_other_format_or_version_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"version": 2}))
    with pytest.raises(
        ValueError, match="must be lmkern-checkpoint version 1; got lmkern-checkpoint version 2"
    ):
        load_checkpoint(path)


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="step-00000009"):
        load_checkpoint(tmp_path / "step-00000009")


def count_writes(monkeypatch: pytest.MonkeyPatch, fail_at: int | None) -> list[str]:
    """What a save does to the disk, in order; the one at fail_at raises OSError instead."""
    done: list[str] = []

    def watch(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if len(done) == fail_at:
                raise OSError("power cut")
            done.append(name)
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in (
        (module, "save_tensors"),
        (module, "flush_to_disk"),
        (module, "write_text"),
        (Path, "mkdir"),
        (Path, "rename"),
    ):
        watch(owner, name)
    return done


def test_save_that_fails_at_any_write_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        save(tmp_path / "whole", 1)
        writes = count_writes(patch, None)
        save(tmp_path / "whole", 2)
    assert len(writes) >= 7
    for at in range(len(writes)):
        folder = tmp_path / str(at)
        save(folder, 1)
        with monkeypatch.context() as patch:
            patch.setattr(module.shutil, "rmtree", lambda *args, **kwargs: None)
            count_writes(patch, at)
            with pytest.raises(OSError, match="power cut"):
                save(folder, 2)
        newest = list_checkpoints(folder)[-1]
        assert_holds(newest, int(newest.name[-1]))
        remove_unfinished(folder)
        assert all(path.name.startswith("step-") for path in folder.iterdir())
        assert_holds(save(folder, 2), 2)


def test_failed_save_cleans_up_after_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_checkpoint_and_leaves_the_one_before(tmp_path: Path, full_disk: Any) -> None:
    save(tmp_path, 1)
    with full_disk(60_000), pytest.raises(OSError, match="too large") as refused:
        save_checkpoint(tmp_path, 2, {"model": {"x": torch.ones(30_000)}}, {}, keep=9)
    assert refused.value.filename == str(tmp_path / "step-00000002" / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert_holds(tmp_path / "step-00000001", 1)


def test_intact_checkpoint_of_the_same_step_stays_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    inode = (path / "state.json").stat().st_ino
    save(tmp_path, 1)
    assert (path / "state.json").stat().st_ino == inode
    (path / "model.safetensors").write_bytes(b"")
    save(tmp_path, 1)
    assert_holds(path, 1)


KILLED = """
import os, signal, sys
from lmkern.data import load
from lmkern.training import checkpoint, load_config, train

plain, calls = checkpoint.save_tensors, []

def killed(*args, **kwargs):
    calls.append(args)
    plain(*args, **kwargs)
    # The second file of the second checkpoint: the first checkpoint is whole, this one is half there.
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save_tensors = killed
train(load_config(sys.argv[1]), load(sys.argv[2]), sys.argv[3], progress=False)
"""


def test_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(
    make_config: Callable[..., RunConfig],
    dataset: Any,
    tmp_path: Path,
    read_run: Any,
    assert_same_run: Any,
) -> None:
    config = make_config()
    (tmp_path / "config.toml").write_text(dump_config(config))
    arguments = [tmp_path / "config.toml", dataset.train.path.parent, tmp_path / "cut"]
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    # The package is found as it is here, installed or not.
    environment = os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[2])}
    child = subprocess.run([sys.executable, script, *arguments], env=environment, timeout=120, check=False)
    assert child.returncode == -signal.SIGKILL
    checkpoints = tmp_path / "cut" / "checkpoints"
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step-00000004"]
    assert (checkpoints / ".part-step-00000008" / "model.safetensors").exists()
    train(config, dataset, tmp_path / "cut", resume=True, progress=False)
    assert not list(checkpoints.glob(".*"))
    train(config, dataset, tmp_path / "whole", progress=False)
    assert_same_run(read_run(tmp_path / "cut"), read_run(tmp_path / "whole"))
