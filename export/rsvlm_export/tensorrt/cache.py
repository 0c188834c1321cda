"""Built engines by what they were built from: model, TensorRT, chip, precision, graph and buckets. Knows no builder.

One engine is two files, `<key>.engine` and `<key>.json`, which says what it is and its sha256; both are written beside their place and
renamed, the description last. An entry whose content is not what its description says does not count.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsvlm_infer.models.checkpoint import sha256_of

from .profiles import Profile


@dataclass(frozen=True)
class EngineKey:
    """What decides an engine's bytes. `graph_sha256` covers the graph with its weights, `model_sha256` names the checkpoint."""

    graph: str
    graph_sha256: str
    model_sha256: str
    library: str
    version: str
    chip: str
    precision: str
    profiles: tuple[Profile, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @property
    def place(self) -> str:
        """Path below the cache's folder, without suffix: readable first, then what tells the rest apart."""
        digest = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()
        folder = f"{self.model_sha256[:12]}-{self.library}-{self.version}-{self.chip}-{self.precision}"
        return f"{folder}/{self.graph}-{digest[:16]}"


def graph_digest(graph: Path, weights: Path) -> str:
    """Hex sha256 of a graph file and the weights file beside it, which some graphs do not have."""
    parts = [sha256_of(file) for file in (graph, weights) if file.is_file()]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def default_cache() -> Path:
    """$RSVLM_HOME/engines, or ~/.cache/rsvlm/engines."""
    home = os.environ.get("RSVLM_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache" / "rsvlm") / "engines"


class EngineCache:
    """A folder of engines. Several processes may use it: a file appears whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: EngineKey, build: Callable[[], bytes]) -> tuple[Path, dict[str, Any], bool]:
        """An engine's file, its description, and whether it had to be built."""
        file, described = self._files(key)
        known = self._known(key)
        if known is not None:
            return file, known, False
        file.parent.mkdir(parents=True, exist_ok=True)
        content = build()
        description = {**key.to_dict(), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        description = json.loads(json.dumps(description))  # as it reads back
        _write(file, content)
        _write(described, (json.dumps(description, indent=2) + "\n").encode())
        return file, description, True

    def _files(self, key: EngineKey) -> tuple[Path, Path]:
        place = self.folder / key.place
        return place.with_name(f"{place.name}.engine"), place.with_name(f"{place.name}.json")

    def _known(self, key: EngineKey) -> dict[str, Any] | None:
        file, described = self._files(key)
        try:
            description = json.loads(described.read_text(encoding="utf-8"))
            whole = description["sha256"] == sha256_of(file)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        same = {name: description.get(name) for name in key.to_dict()} == json.loads(json.dumps(key.to_dict()))
        return description if whole and same else None


def place_file(source: Path, target: Path) -> None:
    """The same file at a second place: a link where the file system has them, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write(file: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(content)
        temporary.chmod(0o644)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
