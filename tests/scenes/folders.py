"""What a job's output folder holds, for comparisons."""

from __future__ import annotations

from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the journal, by its name in the folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("journal.sqlite"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
