import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lmkern.data.shards import identity
from lmkern.training import RunConfig, dump_config
from lmkern.training.run_folder import (
    DERIVED,
    check_run_folder,
    held,
    open_run_folder,
    other_data,
    remove_derived,
)

Make = Callable[..., RunConfig]


def test_half_written_checkpoint_is_ignored_and_cleaned_away(tmp_path: Path, make_config: Make) -> None:
    (tmp_path / "config.toml").write_text(dump_config(make_config()))
    for name in ("step-00000004", ".part-step-00000008"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    path = check_run_folder(make_config(), tmp_path, resume=True, overwrite=False)
    assert path == tmp_path / "checkpoints" / "step-00000004"
    open_run_folder(tmp_path, fresh=False)
    assert [found.name for found in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


def test_folder_that_holds_only_data_is_free(tmp_path: Path, make_config: Make) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "timings.json").write_text("{}")
    assert check_run_folder(make_config(), tmp_path, resume=False, overwrite=False) is None
    open_run_folder(tmp_path, fresh=True)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "data", "timings.json"}


def test_what_was_made_from_a_model_goes_and_the_rest_stays(tmp_path: Path) -> None:
    for name in (*DERIVED, "config.toml", "metrics.jsonl", "timings.json", "notes.txt"):
        (tmp_path / name).write_text("")
    remove_derived(tmp_path)
    remove_derived(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("config.toml", "metrics.jsonl", "timings.json", "notes.txt"),
    }


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path, make_config: Make) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(FileExistsError, match="is a file; choose another"):
        check_run_folder(make_config(), tmp_path / "run", resume=False, overwrite=True)


def test_what_cannot_be_gone_on_with_is_offered_to_be_replaced(tmp_path: Path, make_config: Make) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileExistsError, match=r"\(checkpoints\): pass --overwrite to replace it, or"):
        check_run_folder(make_config(), tmp_path, resume=False, overwrite=False)
    with pytest.raises(FileNotFoundError, match=r"config\.toml does not exist: pass --overwrite instead"):
        check_run_folder(make_config(), tmp_path, resume=True, overwrite=False)
    (tmp_path / "config.toml").write_text(dump_config(make_config()))
    with pytest.raises(FileExistsError, match=r"pass --resume to go on with it, --overwrite to replace it"):
        check_run_folder(make_config(), tmp_path, resume=False, overwrite=False)


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path, make_config: Make) -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        check_run_folder(make_config(), tmp_path, resume=True, overwrite=True)


def test_a_folder_is_held_against_other_processes_and_let_go(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    program = (
        "import sys; from pathlib import Path; from lmkern.training.run_folder import held\n"
        "with held(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(FileExistsError, match="another process is training in"), held(folder):
            pass
        other.kill()
    assert folder.is_dir()
    with held(folder):
        (folder / "something").touch()
    assert folder.is_dir()
    (folder / "something").unlink()
    with pytest.raises(KeyError), held(tmp_path / "new"):
        raise KeyError
    assert not (tmp_path / "new").exists()


def test_data_that_is_another_is_told() -> None:
    manifest = {
        "corpus": {"sha256": "a"},
        "files": {"tokenizer.json": {"sha256": "b"}, "train.txt": {"sha256": "c"}, "removed.jsonl": {}},
    }
    recorded = {"corpus_sha256": "a", "data_sha256": identity(manifest)}
    assert other_data(recorded, manifest) is None
    assert other_data({"corpus_sha256": "a"}, manifest) is None
    moved = {**manifest, "files": {**manifest["files"], "removed.jsonl": {"sha256": "of other paths"}}}
    assert other_data(recorded, moved) is None
    assert "corpus with SHA-256 a, got z" in str(
        other_data(recorded, {**manifest, "corpus": {"sha256": "z"}})
    )
    again = {**manifest, "files": {**manifest["files"], "tokenizer.json": {"sha256": "z"}}}
    assert "tokenized otherwise" in str(other_data(recorded, again))
