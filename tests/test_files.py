import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lmkern import files
from lmkern.files import (
    check_place,
    checksum,
    damage,
    replacing,
    replacing_folder,
    save_tensors,
    write_json,
    write_text,
)


def interrupted(part: Path) -> None:
    """A write that a Ctrl-C stops in the middle."""
    part.write_text("new")
    raise KeyboardInterrupt


def fails(path: Path) -> None:
    raise OSError("no space left on device")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_checksum_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    expected = {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    assert checksum(tmp_path / "file") == expected
    assert damage(tmp_path / "file", expected) is None


@pytest.mark.parametrize(("content", "kind"), [(b"abd", "altered"), (b"ab", "truncated or altered")])
def test_damage_names_the_file_and_both_checksums(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    before = checksum(path)
    path.write_bytes(content)
    assert damage(path, before) == (
        f"{path} is {kind}: expected 3 bytes with SHA-256 {before['sha256']}, "
        f"got {len(content)} bytes with SHA-256 {hashlib.sha256(content).hexdigest()}"
    )


def test_tensors_have_the_mode_of_other_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_tensors({"x": torch.ones(2)}, tmp_path / "x.safetensors", {"format": "ours"})
        (tmp_path / "other").write_text("")
    finally:
        os.umask(before)
    mode = (tmp_path / "x.safetensors").stat().st_mode
    assert mode == (tmp_path / "other").stat().st_mode
    assert mode & 0o777 == 0o640
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "ours"}
        assert torch.equal(file.get_tensor("x"), torch.ones(2))


def test_a_place_where_nothing_can_be_made_is_refused_by_its_name(tmp_path: Path) -> None:
    check_place(tmp_path / "a" / "b")
    assert names(tmp_path) == set()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError) as error:
        check_place(tmp_path / "file" / "a" / "b")
    assert error.value.filename == str(tmp_path / "file" / "a" / "b")


def test_failed_write_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_text(path, "old ü")
    monkeypatch.setattr(files, "flush_to_disk", fails)
    with pytest.raises(OSError, match="no space left"):
        write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old ü"
    assert names(tmp_path) == {"file"}


def test_of_several_files_none_is_replaced_before_all_are_written(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(first, second) as (part, _):
        interrupted(part)
    assert first.read_text() == "old"
    assert names(tmp_path) == {"first"}
    with replacing(first, second) as parts:
        for part in parts:
            part.write_text("new")
        assert first.read_text() == "old"
    assert first.read_text() == second.read_text() == "new"
    assert names(tmp_path) == {"first", "second"}


def test_two_writers_of_a_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as (first,):
        first.write_text("first")
        with replacing(path) as (second,):
            second.write_text("second")
        assert path.read_text() == "second"
        assert first.read_text() == "first"
    assert path.read_text() == "first"
    assert names(tmp_path) == {"file"}


@pytest.mark.skipif(os.name != "posix", reason="asks for a process by signal 0")
def test_what_a_killed_writer_left_goes_with_the_next_and_a_living_ones_stays(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from lmkern.files import replacing, replacing_folder\n"
        "with replacing_folder(Path(sys.argv[1])) as part, replacing(Path(sys.argv[2])) as (file,):\n"
        "    (part / 'a').write_text('a'), file.write_text('a'), os._exit(0)"
    )
    folder, file = tmp_path / "folder", tmp_path / "file"
    subprocess.run([sys.executable, "-c", script, str(folder), str(file)], check=True, timeout=120)
    assert len(names(tmp_path)) == 2
    # A process of another container may have gone on with what was written now.
    write_text(file, "new")
    assert len(names(tmp_path)) == 3
    for left in tmp_path.glob(".*"):
        os.utime(left, (0, 0))
    with replacing_folder(folder) as living:
        (living / "a").write_text("new")
        write_text(file, "new")
        assert names(tmp_path) == {"file", living.name}
        with replacing_folder(tmp_path / "other"):
            assert living.is_dir()
    assert names(tmp_path) == {"file", "folder", "other"}


def test_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "above" / "folder"
    with replacing_folder(folder) as part:
        (part / "a").write_text("old")
        assert not folder.exists()
    with pytest.raises(KeyboardInterrupt), replacing_folder(folder) as part:
        interrupted(part / "b")
    assert names(folder) == {"a"}
    with replacing_folder(folder) as part:
        (part / "b").write_text("new")
    assert names(folder) == {"b"}
    assert names(folder.parent) == {"folder"}


def test_the_system_refuses_by_the_name_that_was_asked_for(tmp_path: Path) -> None:
    # The longest name that may be: what is written aside has a longer one.
    path = tmp_path / ("x" * 255)
    with pytest.raises(OSError, match="name too long") as refused:
        write_text(path, "new")
    assert refused.value.filename == str(path)
    with pytest.raises(OSError, match="name too long") as refused, replacing_folder(path):
        pass
    assert refused.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as refused, replacing_folder(tmp_path / "folder") as part:
        (part / "a" / "b").write_text("new")
    assert refused.value.filename == str(tmp_path / "folder" / "a" / "b")
    assert names(tmp_path) == set()


def test_a_full_disk_is_an_error_of_the_system_that_names_the_file(tmp_path: Path, full_disk: Any) -> None:
    path = tmp_path / "file"
    with full_disk(60_000):
        with pytest.raises(OSError, match="too large") as refused:
            save_tensors({"x": torch.ones(30_000)}, path)
        assert refused.value.filename == str(path)
        path.unlink()
        with pytest.raises(OSError, match="too large") as refused:
            write_text(path, "x" * 100_000)
        assert refused.value.filename == str(path)
        with (
            pytest.raises(OSError, match="too large") as refused,
            replacing(path, tmp_path / "other") as parts,
        ):
            parts[0].write_text("x" * 100_000)
        assert refused.value.filename == str(tmp_path)
        with pytest.raises(OSError, match="too large") as refused, replacing_folder(path) as part:
            (part / "a").write_text("x" * 100_000)
    assert refused.value.filename == str(path)
    assert names(tmp_path) == set()


def test_tensors_that_make_no_file_are_safetensors_own_error(tmp_path: Path) -> None:
    x = torch.ones(2)
    with pytest.raises(RuntimeError, match="share memory"):
        save_tensors({"x": x, "y": x}, tmp_path / "file")


def test_json_comes_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"text": "ä", "none": None})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"text": "ä", "none": None}
    assert names(tmp_path) == {"a.json"}


def test_a_path_that_is_no_text_comes_back_from_json(tmp_path: Path) -> None:
    path = os.fsdecode(b"l\xe4uf")
    write_json(tmp_path / "a.json", {"path": path})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"path": path}
