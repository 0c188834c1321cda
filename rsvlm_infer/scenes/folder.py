"""Owns the output folder of a job: which folder a scene gets, its records and header as the same bytes, files that are whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .outputs.files import write_bytes
from .record import SceneHeader, WindowRecord

JOURNAL = "journal.sqlite"
REPORT = "job.json"
RECORDS, HEADER = "records.jsonl", "header.json"

# what GDAL reads beside a raster and what may change its georeference, mask or overviews
_SIDECARS = (".ovr", ".msk", ".aux.xml", ".rrd")
_SIDECAR_SUFFIXES = (".tfw", ".tifw", ".wld", ".pgw", ".jgw", ".j2w", ".prj", ".rpb", ".imd", ".hdr", ".aux")


def folder_names(sources: Sequence[str]) -> dict[str, str]:
    """A folder name for each scene: its file's stem, and behind it eight digits of a hash of the source where two are called the same."""
    stems = {source: _stem(source) for source in sources}
    counts = Counter(stem.casefold() for stem in stems.values())  # some file systems do not know case
    return {
        source: stem if counts[stem.casefold()] == 1 else f"{stem}-{hashlib.sha256(os.fsencode(source)).hexdigest()[:8]}"
        for source, stem in stems.items()
    }


def stamp_of(source: str) -> str:
    """Changes when a file or what lies beside it for GDAL changes; empty for what has no such stamp, as a URL, or is absent."""
    path = Path(source)
    beside = [path.with_name(path.name + end) for end in _SIDECARS]
    beside += [path.with_suffix(end) for end in _SIDECAR_SUFFIXES] + [path.with_name(f"{path.stem}_RPC.TXT")]
    try:
        marks = [(path.name, path.stat())]
    except (OSError, ValueError):  # ValueError: a null byte
        return ""
    for each in beside:
        try:
            marks.append((each.name, each.stat()))
        except OSError:
            continue
    return ";".join(f"{name} {mark.st_size} {mark.st_mtime_ns}" for name, mark in marks)


def write_scene(folder: Path, header: SceneHeader, records: Iterable[WindowRecord]) -> list[Path]:
    """header.json and records.jsonl, one line for each window in the order of the grid; the same values give the same bytes.

    Gives the paths of both.

    Raises:
        InputError: the folder or a file cannot be written.
    """
    write_bytes(folder / HEADER, _text(header.to_dict(), indent=1))
    write_bytes(folder / RECORDS, b"".join(_text(record.to_dict()) for record in records))
    return [folder / HEADER, folder / RECORDS]


def write_report(folder: Path, values: dict[str, Any]) -> None:
    """job.json. Raises InputError when it cannot be written."""
    write_bytes(folder / REPORT, _text(values, indent=1))


def holds(folder: Path, files: Mapping[str, int]) -> bool:
    """Whether these files, by name with their bytes, are all there."""
    try:
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except OSError:
        return False


def _text(values: dict[str, Any], indent: int | None = None) -> bytes:
    """JSON and a line's end, keys as they come; file names that are no UTF-8 keep their bytes as escapes."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False, indent=indent)
    return f"{text}\n".encode("utf-8", "backslashreplace")


def _stem(source: str) -> str:
    name = source.rstrip("/").rpartition("/")[2]
    stem = Path(name).stem if name else ""
    return (
        "".join(character if character.isalnum() or character in "-_. " else "_" for character in stem).strip(" .") or "scene"
    )
