"""Puts results on disk so that nobody ever reads half a file. Knows bytes and paths."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import InputError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes bytes, or text as UTF-8, beside its place and moves it in; the folder is made when absent.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InputError(
            f"--output must be a folder that can be written, got {path.parent} ({error.strerror}); choose another"
        ) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
