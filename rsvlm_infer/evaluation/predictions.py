"""The file of predictions: a header line, then one line per item, written as they come. Knows no model and no metric.

{"schema": ..., "task": ..., "set": {...}, "model": {...}, "settings": {...}}
{"key": ..., "prediction": ...}            or {"key": ..., "error": ...}

A killed run leaves at most one torn line at the end, which is cut off when the run goes on. Of several lines for one key the last
counts: a failed item is tried again.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import InputError

SCHEMA = "rsvlm-predictions/1"
_HEADER_START = b'{"schema": "rsvlm-predictions'  # a torn first line is ours only when it begins so


@dataclass(frozen=True)
class Predictions:
    """What a file holds. `header` is None for a file that another program wrote; `end` is the length in bytes of its whole lines."""

    header: dict[str, Any] | None
    values: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    end: int = 0


def read_predictions(file: Path) -> Predictions:
    """The predictions of a file, without a torn last line.

    Raises:
        InputError: the file cannot be read, or a line other than the last is damaged.
    """
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"--predictions {file} does not exist; check the path, or run without --score-only to make it"
        ) from None
    except OSError as error:
        raise InputError(f"--predictions {file} cannot be read ({error.strerror}); pass a file") from None
    lines = raw.split(b"\n")
    header: dict[str, Any] | None = None
    values: dict[str, Any] = {}
    errors: dict[str, str] = {}
    end = 0
    last = max((number for number, line in enumerate(lines) if line.strip()), default=-1)
    for number, line in enumerate(lines[: last + 1]):
        try:
            entry = json.loads(line) if line.strip() else None
            if entry is not None and number == 0 and "schema" in entry:
                header = _checked_header(file, entry)
            elif entry is not None:
                _add(entry, values, errors)
        except (UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError):
            if number == last and (number > 0 or line.startswith(_HEADER_START[: len(line)])):  # torn by a kill
                break
            raise InputError(
                f"--predictions {file} line {number + 1} must be a JSON object with key and prediction; repair or delete the file"
            ) from None
        end = min(end + len(line) + 1, len(raw))
    return Predictions(header, values, errors, end)


class PredictionWriter:
    """Appends lines to a file, each on disk's way before the next; a context manager."""

    def __init__(self, file: Path, header: dict[str, Any], found: Predictions | None) -> None:
        """Starts a file, or goes on behind the whole lines of the one that `found` came from.

        Raises:
            InputError: the file cannot be written.
        """
        self._name = file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = file.open("r+b" if found is not None else "wb")
            if found is not None:
                self._file.truncate(found.end)
                self._file.seek(max(0, found.end - 1))
                if found.end and self._file.read(1) != b"\n":
                    self._file.write(b"\n")
        except OSError as error:
            raise InputError(f"--predictions {file} cannot be written ({error.strerror}); choose another place") from None
        if found is None or found.header is None:
            self._line({"schema": SCHEMA, **header})

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def add(self, key: str, prediction: Any) -> None:
        """One prediction: a text, or a list of numbers."""
        self._line({"key": key, "prediction": prediction})

    def fail(self, key: str, reason: str) -> None:
        """One item that gave none."""
        self._line({"key": key, "error": reason})

    def _line(self, values: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:  # a full disk: the torn line is cut off by the next run
            raise InputError(
                f"--predictions {self._name} cannot be written ({error.strerror}); make room and run again"
            ) from None


def header_differences(header: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """One line for each value of `expected` that the header has otherwise; what only the header has does not count."""
    lines = []
    for name, value in expected.items():
        found = header.get(name)
        if isinstance(value, dict) and isinstance(found, dict):
            lines += [f"{name}.{line}" for line in header_differences(found, value)]
        elif found != value:
            lines.append(f"{name} was {found!r}, is {value!r}")
    return lines


def _checked_header(file: Path, entry: dict[str, Any]) -> dict[str, Any]:
    if entry["schema"] != SCHEMA:
        raise InputError(f"--predictions {file} must have the schema {SCHEMA!r}, got {entry['schema']!r}; make it again")
    return entry


def _add(entry: dict[str, Any], values: dict[str, Any], errors: dict[str, str]) -> None:
    key = entry["key"]
    if "error" in entry:
        errors[key] = str(entry["error"])
        values.pop(key, None)
    else:
        values[key] = entry["prediction"]
        errors.pop(key, None)
