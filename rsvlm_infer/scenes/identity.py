"""Owns the hashes that say what an answer was made of: file, model, words, settings. Knows no record and no pixels' meaning."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ImageReadError
from ..imagery.source import Scene

if TYPE_CHECKING:
    from ..pipeline import RSVLM

WHOLE_BYTES = 64 << 20  # larger files are known by their size, time and ends: hashing 3 GB takes longer than answering
END_BYTES = 1 << 20
SIDECARS = (".ovr", ".msk", ".aux.xml", ".tfw", ".tifw", ".wld", ".jgw", ".j2w", ".hdr", ".prj")


def json_hash(values: Any) -> str:
    """Hex sha256 of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def content_hash(source: Any, scene: Scene) -> str:
    """Hex sha256 that changes when a scene's pixels or georeference may have changed.

    A file of up to 64 MiB counts with every byte. A larger one counts with its size, its time of change and its first and last MiB: it
    may count as changed when it was only copied, never the reverse unless somebody sets its time back. So do the files beside it that
    GDAL reads. What is no local file counts with its shape, its georeference and its overview.
    """
    digest = hashlib.sha256()
    path = Path(source) if isinstance(source, (str, Path)) else None
    if path is not None and path.is_file():
        besides = (path.with_name(path.name + end) for end in SIDECARS)
        named = (path.with_suffix(end) for end in SIDECARS)
        try:
            for file in (path, *sorted({each for each in (*besides, *named) if each.is_file() and each != path})):
                digest.update(f"{file.suffix} {file.stat().st_size} ".encode())
                _add_file(digest, file)
        except OSError as error:
            raise ImageReadError(f"{path} cannot be read ({error.strerror}); check the file's permissions") from None
        return digest.hexdigest()
    rgb, mask = scene.overview()
    place = [scene.height, scene.width, scene.count, scene.dtype, scene.crs_wkt, scene.transform]
    digest.update(json.dumps(place).encode())
    digest.update(rgb.tobytes())
    digest.update(mask.tobytes())
    return digest.hexdigest()


def _add_file(digest: Any, file: Path) -> None:
    stat = file.stat()
    with file.open("rb") as stream:
        if stat.st_size <= WHOLE_BYTES:
            while block := stream.read(END_BYTES):
                digest.update(block)
            return
        digest.update(f"{stat.st_mtime_ns} ".encode())
        digest.update(stream.read(END_BYTES))
        stream.seek(-END_BYTES, 2)
        digest.update(stream.read(END_BYTES))


def config_hash(model: RSVLM, settings: Mapping[str, Any], stretch: tuple[Any, Any], version: str) -> str:
    """Hex sha256 of everything beside file, model and words that can change an answer."""
    backend = {"backend": model.backend.name, "precision": model.backend.precision, "version": version}
    return json_hash({**settings, **backend, "stretch": [list(edge) for edge in stretch]})
