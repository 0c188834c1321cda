"""Owns an archive on disk: segments of embeddings with their places, and the manifest that says which segments count.

    archive/manifest.json          schema, embedder, encoding, segments with their row counts, dropped scenes; replaced whole
    archive/segments/NNNNNN/       written under another name, renamed when complete, never changed afterwards
        scenes.jsonl  scenes.bin   one line and one row for each scene
        views.bin                  one row for each encoded window
        scene.f32                  float32 [views, De], little-endian
        region.f32    region.bin   float32 [regions, De] and where each lies
        object.f32    object.bin   float32 [objects, De] and where each lies
        features.f32  features.bin only with kept features: the taps of each view, float32 or float16 (features.f16), and its row
        features.jsonl             one line for each view: its plan and warnings

Everything but the manifest is memory-mapped, when the archive is opened: one that stays open keeps what it opened, whatever a writer
merges or removes meanwhile. Knows no model, no query and no picture.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..config import LEVELS
from ..errors import CheckpointError, InputError

SCHEMA = "rsvlm-archive/1"
MANIFEST, SEGMENTS, SCENES, PLANS = "manifest.json", "segments", "scenes.jsonl", "features.jsonl"

_RECTANGLE = [("row_off", "<i4"), ("col_off", "<i4"), ("height", "<i4"), ("width", "<i4")]
_BBOX = [("bbox", "<f8", 4)]  # west, south, east, north in degrees; NaN without a place; west > east across the antimeridian
SCENE_ROW = np.dtype([("offset", "<i8"), ("length", "<i8"), ("acquired", "<f8"), ("gsd_m", "<f8")])
VIEW_ROW = np.dtype(
    [("scene", "<i4"), *_RECTANGLE, *_BBOX, ("gsd_effective_m", "<f8"), ("first_region", "<i8"), ("first_object", "<i8")]
)
PLACE_ROW = np.dtype([("view", "<i4"), *_RECTANGLE, *_BBOX])
FEATURE_ROW = np.dtype([("first_patch", "<i8"), ("patches", "<i8"), ("offset", "<i8"), ("length", "<i8")])
FILES: dict[str, np.dtype[Any]] = {
    "scenes.bin": SCENE_ROW,
    "views.bin": VIEW_ROW,
    "region.bin": PLACE_ROW,
    "object.bin": PLACE_ROW,
}
FEATURES = "features.bin"
_OPENINGS = 20  # of an archive that is merged again and again while it is opened

FeatureType = Literal["float32", "float16"]
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
class FeatureFormat:
    """What an archive keeps of the vision encoder: `levels` taps of `width` numbers for each patch, as `dtype`, and who made them.

    levels: 3 (object, region, scene), or 1: the scene's tap, where the model reads no other to answer.
    """

    dtype: FeatureType
    levels: int
    width: int
    backend: str
    precision: str

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float16"):
            raise InputError(f'features must be "float32" or "float16", got {self.dtype!r}; choose one of them')

    @property
    def file(self) -> str:
        """Name of the file of values."""
        return f"features.f{self.type.itemsize * 8}"

    @property
    def type(self) -> np.dtype[Any]:
        """On the disk, little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def patch_bytes(self) -> int:
        """Of one patch, all levels."""
        return self.levels * self.width * self.type.itemsize


@dataclass(frozen=True)
class ViewFeatures:
    """What the vision encoder gave for one view: taps [levels, S, Dv], float32 or float16, and as JSON values the plan of its tiles
    and the warnings of its reading."""

    taps: NDArray[Any]
    plan: dict[str, Any]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class SegmentCounts:
    """Rows of one segment. patches: of all views whose features are kept."""

    name: str
    scenes: int
    views: int
    regions: int
    objects: int
    patches: int = 0

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

    @property
    def features(self) -> FeatureFormat | None:
        """How features are kept; None when they are not."""
        values = self.encoding.get("features")
        return None if values is None else FeatureFormat(**values)

    def row_bytes(self) -> dict[str, int]:
        """Bytes of one row of each file whose rows have a fixed length."""
        features = self.features
        kept = {} if features is None else {FEATURES: FEATURE_ROW.itemsize, features.file: features.patch_bytes}
        tables = {name: dtype.itemsize for name, dtype in FILES.items()}
        return tables | {f"{level}.f32": self.embed_size * 4 for level in LEVELS} | kept

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
        found = Manifest(**{**values, "segments": segments, "dropped": tuple(values["dropped"])})
        found.row_bytes()  # the format of the features can be read
        return found
    except FileNotFoundError:
        raise InputError(f"archive {folder} has no {MANIFEST}; check the path, or make it with rsvlm index") from None
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, error) from None


class Segment:
    """The mapped rows of one segment."""

    def __init__(self, folder: Path, counts: SegmentCounts, manifest: Manifest) -> None:
        """Maps every file.

        Raises:
            FileNotFoundError: the segment is gone. CheckpointError: it is damaged.
        """
        self.folder, self.counts, self.embed_size, self.features_format = folder, counts, manifest.embed_size, manifest.features
        row_bytes = manifest.row_bytes()
        self._tables: dict[str, NDArray[Any]] = {}
        for name, count in self.rows_of_files().items():
            self._tables[name] = self._mapped(name, count * row_bytes[name])
        self._scene_lines = self._mapped(SCENES)
        self._plan_lines = None if self.features_format is None else self._mapped(PLANS)
        self.scenes = self._table("scenes.bin", SCENE_ROW)  # SCENE_ROW [scenes]
        self.views = self._table("views.bin", VIEW_ROW)  # VIEW_ROW [views]
        self._places = {level: self._table(f"{level}.bin", PLACE_ROW) for level in ("object", "region")}
        self._embeddings = {
            level: self._table(f"{level}.f32", np.dtype("<f4")).reshape(counts.rows(level), self.embed_size) for level in LEVELS
        }

    def rows_of_files(self) -> dict[str, int]:
        """Rows of each file whose rows have a fixed length."""
        counts, kept = self.counts, self.features_format
        rows = {
            "scenes.bin": counts.scenes,
            "views.bin": counts.views,
            "region.bin": counts.regions,
            "object.bin": counts.objects,
        }
        rows |= {f"{level}.f32": counts.rows(level) for level in LEVELS}
        return rows if kept is None else rows | {FEATURES: counts.views, kept.file: counts.patches}

    @property
    def nbytes(self) -> int:
        """Of all files."""
        lines = len(self._scene_lines) + (0 if self._plan_lines is None else len(self._plan_lines))
        return lines + sum(table.nbytes for table in self._tables.values())

    def places(self, level: str) -> NDArray[Any]:
        """PLACE_ROW of a level's rows; VIEW_ROW for scenes, which has the same fields but `view`."""
        return self.views if level == "scene" else self._places[level]

    def embeddings(self, level: str) -> F32:
        """float32 [rows, De], mapped."""
        return self._embeddings[level]

    def view_of(self, level: str, rows: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Which view each row belongs to."""
        return np.asarray(rows if level == "scene" else self._places[level]["view"][rows], dtype=np.int64)

    def rows_of_view(self, level: str, view: int) -> slice:
        """The rows of one view, which lie together."""
        if level == "scene":
            return slice(view, view + 1)
        firsts = self.views[f"first_{level}"]
        return slice(int(firsts[view]), int(firsts[view + 1]) if view + 1 < len(firsts) else self.counts.rows(level))

    def scene(self, index: int) -> IndexedScene:
        """One scene's own line."""
        try:
            return IndexedScene.from_dict(json.loads(self.scene_line(index)))
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(self.folder / SCENES, error) from None

    def scene_line(self, index: int) -> bytes:
        """One scene's line as it stands in the file."""
        return _line(self._scene_lines, self.scenes[index])

    def all_scenes(self) -> list[IndexedScene]:
        """Every scene's line."""
        return [self.scene(index) for index in range(self.counts.scenes)]

    @property
    def feature_rows(self) -> NDArray[Any]:
        """FEATURE_ROW [views], of an archive that keeps features."""
        return self._table(FEATURES, FEATURE_ROW)

    def plan_line(self, view: int) -> bytes:
        """The line of one view's plan and warnings as it stands in the file."""
        assert self._plan_lines is not None
        return _line(self._plan_lines, self.feature_rows[view])

    def taps(self, view: int) -> NDArray[Any]:
        """The kept taps of one view [levels, S, Dv], mapped."""
        kept, row = self.features_format, self.feature_rows[view]
        assert kept is not None  # asked for by who knows that features are kept
        first, patches = int(row["first_patch"]), int(row["patches"])
        values = self._tables[kept.file][first * kept.patch_bytes : (first + patches) * kept.patch_bytes]
        return values.view(kept.type).reshape(kept.levels, patches, kept.width)

    def features(self, view: int) -> ViewFeatures:
        """What is kept of one view."""
        try:
            values = json.loads(self.plan_line(view))
            return ViewFeatures(self.taps(view), values["plan"], tuple(values["warnings"]))
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(self.folder / PLANS, error) from None

    def _table(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        return self._tables[name].view(dtype)

    def _mapped(self, name: str, expected: int | None = None) -> NDArray[np.uint8]:
        path = self.folder / name
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                if expected is not None and size != expected:
                    raise _damaged(path, ValueError(f"it has {size} bytes, the manifest says {expected}"))
                if not size:  # an empty file cannot be mapped
                    return np.zeros(0, np.uint8)
                return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _damaged(path, error) from None


def _line(lines: NDArray[np.uint8], row: Any) -> bytes:
    return lines[int(row["offset"]) : int(row["offset"]) + int(row["length"])].tobytes()


class Archive:
    """An archive to search. What a writer adds later is seen by opening it again."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.graphs: dict[str, Any] = {}  # level -> what graph.py opened for it
        self.segments = [Segment(folder / SEGMENTS / each.name, each, manifest) for each in manifest.segments]

    @classmethod
    def open(cls, folder: Path | str) -> Archive:
        """An archive that `rsvlm index` made. It may grow or be merged meanwhile: what is opened is what one manifest said.

        Raises:
            InputError: there is none, or one of another version. CheckpointError: it is damaged.
        """
        folder = Path(folder).expanduser()
        manifest = read_manifest(folder)
        for _ in range(_OPENINGS):
            try:
                return cls(folder, manifest)
            except FileNotFoundError as error:  # merged after the manifest was read: then there is a new one
                found = read_manifest(folder)
                if found == manifest:
                    raise _damaged(Path(error.filename), error) from None
                manifest = found
        raise InputError(f"archive {folder} changed each of {_OPENINGS} times it was opened; wait for its writer")

    def require_embedder(self, embedder: str) -> None:
        """Refuses a checkpoint other than the one that encoded the scenes: their cosines would mean nothing.

        Raises:
            CheckpointError: the digests differ.
        """
        if embedder != self.manifest.embedder:
            raise CheckpointError(
                f"archive {self.folder} was encoded by checkpoint {self.manifest.embedder[:12]}, it cannot be used with "
                f"checkpoint {embedder[:12]}; pass that checkpoint, or make the archive again with this one"
            )

    def require_features(self, backend: str, precision: str) -> FeatureFormat:
        """How features are kept, when this backend at this precision can go on from them: with another one the answers would not be
        those that it gives to the scenes.

        Raises:
            InputError: the archive keeps none. CheckpointError: another backend or precision made them.
        """
        kept = self.manifest.features
        if kept is None:
            raise InputError(
                f"archive {self.folder} keeps no features to answer from; make it with rsvlm index --features float32, or ask its "
                "scenes with rsvlm ask"
            )
        if (kept.backend, kept.precision) != (backend, precision):
            raise CheckpointError(
                f"archive {self.folder} keeps features of backend {kept.backend} at {kept.precision}, backend {backend} at "
                f"{precision} cannot go on from them; choose that one by --checkpoint, --backend and --precision, or use rsvlm ask"
            )
        return kept

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

    def views(self) -> Iterator[str]:
        """Names of all views that count, SEGMENT/INDEX, in the order of the archive."""
        for segment in self.segments:
            for index in np.flatnonzero(self.counting(segment)[segment.views["scene"]]).tolist():
                yield f"{segment.counts.name}/{index}"

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
