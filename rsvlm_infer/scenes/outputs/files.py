"""Owns how an output file comes to be: whole under its name or not at all, the same bytes for the same values. Knows no format."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ...errors import InputError

SCORE_DECIMALS = 6  # float32 scores agree between machines to about this


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which becomes `path` when the block ends well and is removed when it does not.

    Raises:
        InputError: it cannot be written.
    """
    scratch = path.with_name(f".{path.name}.part")  # one name: a kill leaves at most one, and the next run overwrites it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        raise InputError(
            f"output {path} cannot be written ({error.strerror or error}); make room or choose another folder"
        ) from None
    finally:
        with suppress(OSError):
            scratch.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Raises InputError when it cannot be written."""
    with replacing(path) as scratch:
        scratch.write_bytes(content)


def json_text(values: Any, indent: int | None = None) -> str:
    """JSON with sorted keys and no NaN. File names that are no UTF-8 keep their bytes as escapes."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=indent)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def number(value: float | None) -> float | None:
    """A score as files hold it: SCORE_DECIMALS decimals, None when it is not finite."""
    return None if value is None or not math.isfinite(value) else round(float(value), SCORE_DECIMALS) + 0.0
