"""Reads entries that users write themselves: {text, level} as JSON lines or CSV. Owns that format; knows no embedding."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import LEVELS
from ..errors import InputError
from .mine import Entry

KEYS = {"text", "level"}
MAX_CHARACTERS = 400  # a cue is a phrase or a fact, not a document


def read_own_entries(file: Path) -> list[Entry]:
    """The entries of a .jsonl file, or of a .csv file whose first line names the columns text and level, in their order.

    Levels are the words object, region and scene. Blank lines are skipped.

    Raises:
        InputError: the file cannot be read, or a line is wrong; the message names the line.
    """
    readers = {".jsonl": _json_lines, ".csv": _csv_rows}
    if file.suffix.lower() not in readers:
        raise InputError(f"--add file must end in .jsonl or .csv, got {file.name!r}; rename or convert it")
    try:
        text = file.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--add file {file} cannot be read ({error}); pass a text file in UTF-8") from None
    entries = [_entry(values, f"{file}, line {number}") for number, values in readers[file.suffix.lower()](text, file)]
    if not entries:
        raise InputError(f"--add file {file} must hold at least one entry, it has none; write a text and a level")
    return entries


def _json_lines(text: str, file: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"{file}, line {number} must be a JSON object ({error}); correct it") from None


def _csv_rows(text: str, file: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(text.splitlines(keepends=True), skipinitialspace=True, strict=True)
    try:
        for values in reader:
            yield reader.line_num, values
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num} must be CSV ({error}); correct it") from None


def _entry(values: Any, where: str) -> Entry:
    if not isinstance(values, dict) or set(values) != KEYS:
        got = sorted(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise InputError(f"{where} must have exactly the keys text and level, got {got}; correct it")
    level, text = values["level"], values["text"]
    if level not in LEVELS:
        raise InputError(f"{where}: level must be one of {list(LEVELS)}, got {level!r}; choose one of them")
    if not isinstance(text, str) or not text.strip() or len(text) > MAX_CHARACTERS:
        shown = text[:40] if isinstance(text, str) else text
        raise InputError(f"{where}: text must be 1 to {MAX_CHARACTERS} characters, got {shown!r}; write a phrase or a fact")
    return Entry(" ".join(text.split()), LEVELS.index(level))
