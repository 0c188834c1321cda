"""Nobody reads half a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsvlm_infer.bench.output import write_atomically
from rsvlm_infer.errors import InputError


def test_file_is_replaced_whole_and_readable(tmp_path: Path) -> None:
    file = tmp_path / "new" / "bench.md"
    write_atomically(file, "old")
    write_atomically(file, "möbius\n")
    assert file.read_text(encoding="utf-8") == "möbius\n"
    assert file.stat().st_mode & 0o444 == 0o444
    assert [path.name for path in file.parent.iterdir()] == ["bench.md"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "bench.md"
    write_atomically(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "\ud800")
    assert file.read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["bench.md"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--output must be a folder"):
        write_atomically(tmp_path / "file" / "bench.md", "x")
