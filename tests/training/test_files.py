import hashlib
from pathlib import Path

import pytest

from lmkern.training import files
from lmkern.training.files import sha256_of_file, write_atomically


def test_checksum_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()


def test_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old ü")

    def fails(path: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "flush_to_disk", fails)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old ü"
