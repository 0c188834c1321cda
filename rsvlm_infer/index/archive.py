"""Owns an archive on disk: segments of embeddings with their places, and the manifest that says which segments count.

    archive/manifest.json          schema, embedder, encoding, segments with their row counts, dropped scenes; replaced whole
    archive/segments/NNNNNN/       written under another name, renamed when complete, never changed afterwards
        scenes.jsonl  scenes.bin   one line and one row for each scene
        views.bin                  one row for each encoded window
        scene.f32                  float32 [views, De], little-endian
        region.f32    region.bin   float32 [regions, De] and where each lies
        object.f32    object.bin   float32 [objects, De] and where each lies

Everything but the manifest is memory-mapped. Knows no model, no query and no picture.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import LEVELS
from ..errors import CheckpointError, InputError

SCHEMA = "rsvlm-archive/1"
MANIFEST, SEGMENTS, SCENES = "manifest.json", "segments", "scenes.jsonl"

_RECTANGLE = [("row_off", "<i4"), ("col_off", "<i4"), ("height", "<i4"), ("width", "<i4")]
_BBOX = [("bbox", "<f8", 4)]  # west, south, east, north in degrees; NaN without a place; west > east across the antimeridian
SCENE_ROW = np.dtype([("offset", "<i8"), ("length", "<i8"), ("acquired", "<f8"), ("gsd_m", "<f8")])
VIEW_ROW = np.dtype(
    [("scene", "<i4"), *_RECTANGLE, *_BBOX, ("gsd_effective_m", "<f8"), ("first_region", "<i8"), ("first_object", "<i8")]
)
PLACE_ROW = np.dtype([("view", "<i4"), *_RECTANGLE, *_BBOX])
FILES: dict[str, np.dtype[Any]] = {
    "scenes.bin": SCENE_ROW,
    "views.bin": VIEW_ROW,
    "region.bin": PLACE_ROW,
    "object.bin": PLACE_ROW,
}

F32 = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class IndexedScene:
    """One scene of an archive.

    source: absolute path. content_hash: sha256 of the file. crs: WKT, None without one. acquired: ISO 8601 in UTC, None when
    unknown. num_views: windows that were encoded. skipped_px: pixels of windows that were not, because nothing in them is valid.
    """

    source: str
    content_hash: str
    height: int
    width: int
    crs: str | None
    transform: tuple[float, float, float, float, float, float] | None
    gsd_native_m: float | None
    acquired: str | None
    num_views: int
    skipped_px: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> IndexedScene:
        """The reverse of `to_dict`."""
        transform = values["transform"]
        return cls(**{**values, "transform": None if transform is None else tuple(transform)})


@dataclass(frozen=True)
class SegmentCounts:
    """Rows of one segment."""

    name: str
    scenes: int
    views: int
    regions: int
    objects: int

    def rows(self, level: str) -> int:
        """Embeddings of a level."""
        return {"object": self.objects, "region": self.regions, "scene": self.views}[level]


@dataclass(frozen=True)
class Manifest:
    """embedder: digest of the checkpoint. encoding: how scenes were read and planned. dropped: scenes that no longer count, each
    as SEGMENT/INDEX: their file was indexed again with other content."""

    embedder: str
    embed_size: int
    encoding: dict[str, Any]
    segments: tuple[SegmentCounts, ...] = ()
    dropped: tuple[str, ...] = ()

    def to_text(self) -> str:
        """The manifest file."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, sort_keys=True, allow_nan=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an archive.

    Raises:
        InputError: there is no archive, or one of another version. CheckpointError: the manifest is damaged.
    """
    file = folder / MANIFEST
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        schema = values.pop("schema")
        if schema != SCHEMA:
            raise InputError(f"archive {folder} has schema {schema!r}, expected {SCHEMA!r}; make it again with rsvlm index")
        segments = tuple(SegmentCounts(**each) for each in values.pop("segments"))
        return Manifest(**{**values, "segments": segments, "dropped": tuple(values["dropped"])})
    except FileNotFoundError:
        raise InputError(f"archive {folder} has no {MANIFEST}; check the path, or make it with rsvlm index") from None
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, error) from None


class Segment:
    """The mapped rows of one segment."""

    def __init__(self, folder: Path, counts: SegmentCounts, embed_size: int) -> None:
        self.folder, self.counts, self.embed_size = folder, counts, embed_size
        expected = {
            "scenes.bin": counts.scenes,
            "views.bin": counts.views,
            "region.bin": counts.regions,
            "object.bin": counts.objects,
        }
        sizes = {name: FILES[name].itemsize * rows for name, rows in expected.items()}
        sizes |= {f"{level}.f32": counts.rows(level) * embed_size * 4 for level in LEVELS}
        for name, size in sizes.items():
            try:
                found = (folder / name).stat().st_size
            except OSError as error:
                raise _damaged(folder / name, error) from None
            if found != size:
                raise _damaged(folder / name, ValueError(f"it has {found} bytes, the manifest says {size}"))

    @cached_property
    def scenes(self) -> NDArray[Any]:
        """SCENE_ROW [scenes]."""
        return self._mapped("scenes.bin", SCENE_ROW, (self.counts.scenes,))

    @cached_property
    def views(self) -> NDArray[Any]:
        """VIEW_ROW [views]."""
        return self._mapped("views.bin", VIEW_ROW, (self.counts.views,))

    def places(self, level: str) -> NDArray[Any]:
        """PLACE_ROW of a level's rows; VIEW_ROW for scenes, which has the same fields but `view`."""
        return self.views if level == "scene" else self._places[level]

    def embeddings(self, level: str) -> F32:
        """float32 [rows, De], mapped."""
        return self._embeddings[level]

    def view_of(self, level: str, rows: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Which view each row belongs to."""
        return np.asarray(rows if level == "scene" else self._places[level]["view"][rows], dtype=np.int64)

    def scene(self, index: int) -> IndexedScene:
        """One scene's own line."""
        row = self.scenes[index]
        file = self.folder / SCENES
        try:
            with file.open("rb") as lines:
                lines.seek(int(row["offset"]))
                return IndexedScene.from_dict(json.loads(lines.read(int(row["length"]))))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(file, error) from None

    def all_scenes(self) -> list[IndexedScene]:
        """Every scene's line."""
        file = self.folder / SCENES
        try:
            with file.open("rb") as lines:
                found = [IndexedScene.from_dict(json.loads(line)) for line in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(file, error) from None
        if len(found) != self.counts.scenes:
            raise _damaged(file, ValueError(f"it has {len(found)} lines, the manifest says {self.counts.scenes}"))
        return found

    @cached_property
    def _places(self) -> dict[str, NDArray[Any]]:
        return {level: self._mapped(f"{level}.bin", PLACE_ROW, (self.counts.rows(level),)) for level in ("object", "region")}

    @cached_property
    def _embeddings(self) -> dict[str, F32]:
        shape = {level: (self.counts.rows(level), self.embed_size) for level in LEVELS}
        return {level: self._mapped(f"{level}.f32", np.dtype("<f4"), shape[level]) for level in LEVELS}

    def _mapped(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        if 0 in shape:  # an empty file cannot be mapped
            return np.empty(shape, dtype)
        return np.memmap(self.folder / name, dtype, "r", shape=shape).view(np.ndarray)


class Archive:
    """An archive to search. What a writer adds later is seen by opening it again."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.graphs: dict[str, Any] = {}  # level -> what graph.py opened for it
        self.segments = [Segment(folder / SEGMENTS / each.name, each, manifest.embed_size) for each in manifest.segments]

    @classmethod
    def open(cls, folder: Path | str) -> Archive:
        """An archive that `rsvlm index` made.

        Raises:
            InputError: there is none, or one of another version. CheckpointError: it is damaged.
        """
        folder = Path(folder).expanduser()
        return cls(folder, read_manifest(folder))

    def require_embedder(self, embedder: str) -> None:
        """Refuses a checkpoint other than the one that encoded the scenes: their cosines would mean nothing.

        Raises:
            CheckpointError: the digests differ.
        """
        if embedder != self.manifest.embedder:
            raise CheckpointError(
                f"archive {self.folder} was encoded by checkpoint {self.manifest.embedder[:12]}, it cannot be searched with "
                f"checkpoint {embedder[:12]}; pass that checkpoint, or make the archive again with this one"
            )

    def rows(self, level: str) -> int:
        """Embeddings of a level, dropped scenes included."""
        return sum(each.rows(level) for each in self.manifest.segments)

    def counting(self, segment: Segment) -> NDArray[np.bool_]:
        """bool [scenes]: which scenes of a segment still count."""
        counts = np.ones(segment.counts.scenes, dtype=np.bool_)
        for each in self.manifest.dropped:
            name, _, index = each.partition("/")
            if name == segment.counts.name:
                counts[int(index)] = False
        return counts

    def scenes(self) -> Iterator[tuple[str, IndexedScene]]:
        """Every scene that counts, with its name SEGMENT/INDEX."""
        for segment in self.segments:
            for index, (scene, counts) in enumerate(zip(segment.all_scenes(), self.counting(segment), strict=True)):
                if counts:
                    yield f"{segment.counts.name}/{index}", scene


def _damaged(file: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())
    return CheckpointError(
        f"{file} must be a readable part of an archive, it is not ({type(error).__name__}: {reason}); restore the archive or make "
        "it again with rsvlm index"
    )
