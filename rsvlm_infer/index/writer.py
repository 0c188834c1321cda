"""Owns how an archive grows: one writer at a time, whole segments, no scene twice. A kill loses at most the segment in work.

Knows no model: it is given embeddings.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..config import LEVELS
from ..errors import InputError, RsvlmError
from ..imagery.footprint import BBox
from .archive import (
    F32,
    FILES,
    MANIFEST,
    PLACE_ROW,
    SCENE_ROW,
    SCENES,
    SEGMENTS,
    VIEW_ROW,
    Archive,
    IndexedScene,
    Manifest,
    SegmentCounts,
    read_manifest,
)

SEGMENT_VIEWS = 4096  # a segment is closed when it has so many; few segments keep a search short
SEGMENT_S = 120.0  # or when it took so long: what a kill may cost
LOCK, PART = ".lock", ".part"


class ArchiveUnwritableError(InputError):
    """The archive itself cannot grow: every scene would fail for the same reason."""


Rectangle = tuple[int, int, int, int]  # row_off, col_off, height, width


@dataclass(frozen=True)
class EncodedView:
    """One encoded window of a scene: embeddings and where they lie.

    object [T, k, De], region [T, De], scene [De]; an absent level is empty. tiles: the part of the scene that each tile shows. bboxes:
    of the window, then of each tile; None without a place.
    """

    window: Rectangle
    tiles: tuple[Rectangle, ...]
    bboxes: tuple[BBox | None, ...]
    gsd_effective_m: float | None
    object: F32
    region: F32
    scene: F32


class ArchiveWriter:
    """Adds scenes to an archive; a context manager. Leaving it makes every scene that is whole a part of the archive."""

    def __init__(self, folder: Path, embedder: str, embed_size: int, encoding: dict[str, Any]) -> None:
        """Opens an archive to add to it, or makes a new one.

        Raises:
            InputError: another writer is at work, the folder holds other files or cannot be written, or the archive was encoded in
                another way or by another checkpoint.
        """
        self.folder = folder
        self._lock = _locked(folder)
        try:
            self._manifest = self._opened(Manifest(embedder, embed_size, encoding))
            self._clean()
            scenes = list(Archive(folder, self._manifest).scenes())
        except BaseException:
            self._lock.close()
            raise
        self._sources = {scene.content_hash: scene.source for _, scene in scenes}
        self._names = {scene.source: (name, scene.content_hash) for name, scene in scenes}
        self._replaced: list[str] = []
        self._segment: _OpenSegment | None = None

    @property
    def manifest(self) -> Manifest:
        """What is in the archive already."""
        return self._manifest

    def source_of(self, content_hash: str) -> str | None:
        """Where a scene with this content was read when it was added; None when it is not in the archive."""
        return self._sources.get(content_hash)

    def add(self, scene: IndexedScene, views: Iterable[EncodedView]) -> IndexedScene:
        """Adds one scene whose views come as they are encoded; `num_views` and `skipped_px` are counted here. An earlier scene of the
        same source is dropped.

        An error of `views` leaves the archive without the scene and goes on to the caller.

        Raises:
            InputError: the scene is in the archive already. ArchiveUnwritableError: a file cannot be written.
        """
        known = self.source_of(scene.content_hash)
        if known is not None:
            raise InputError(f"scene {scene.source} is in the archive already, as {known}; leave it out")
        try:
            segment = self._segment = self._segment or _OpenSegment(self._part_folder, self._manifest.embed_size)
            added = segment.add(scene, views)
        except RsvlmError:  # of the scene, which is an OSError too when it cannot be read
            raise
        except OSError as error:
            raise self._unwritable(error) from None
        if scene.source in self._names:
            name, content = self._names[scene.source]
            self._replaced.append(name)
            del self._sources[content]
        name = f"{self._next_name}/{segment.counts('').scenes - 1}"
        self._sources[scene.content_hash], self._names[scene.source] = scene.source, (name, scene.content_hash)
        if segment.counts("").views >= SEGMENT_VIEWS or time.monotonic() - segment.started >= SEGMENT_S:
            self.close_segment()
        return added

    def close_segment(self) -> None:
        """Makes what was added so far a part of the archive.

        Raises:
            ArchiveUnwritableError: a file cannot be written.
        """
        segment, self._segment = self._segment, None
        if segment is None or not segment.counts("").scenes:
            return
        name = self._next_name
        try:
            segment.close()
            segment.folder.replace(self.folder / SEGMENTS / name)
            _sync_folder(self.folder / SEGMENTS)
            segments = (*self._manifest.segments, segment.counts(name))
            dropped = (*self._manifest.dropped, *self._replaced)
            self._write(dataclasses.replace(self._manifest, segments=segments, dropped=dropped))
            self._replaced = []
        except OSError as error:
            raise self._unwritable(error) from None

    def __enter__(self) -> ArchiveWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.close_segment()
            else:  # the scenes that are whole stay; a second error must not hide the first
                with suppress(InputError):
                    self.close_segment()
        finally:
            with suppress(OSError):
                self._clean()
            self._lock.close()

    @property
    def _next_name(self) -> str:
        return f"{max((int(each.name) for each in self._manifest.segments), default=0) + 1:06d}"

    @property
    def _part_folder(self) -> Path:
        return self.folder / SEGMENTS / PART

    def _opened(self, fresh: Manifest) -> Manifest:
        """The archive's manifest, or a fresh one that is written."""
        if not (self.folder / MANIFEST).exists():
            others = sorted(
                path.name for path in self.folder.iterdir() if path.name not in (LOCK, SEGMENTS, f".{MANIFEST}.part")
            )
            if others:
                raise InputError(
                    f"archive {self.folder} must be a new folder or an archive, it holds {others[:5]}; choose another"
                )
            try:
                (self.folder / SEGMENTS).mkdir(exist_ok=True)
                self._write(fresh)
            except OSError as error:
                raise self._unwritable(error) from None
            return fresh
        found = read_manifest(self.folder)
        Archive(self.folder, found).require_embedder(fresh.embedder)
        if found.encoding != fresh.encoding:
            names = sorted(
                name for name in found.encoding | fresh.encoding if found.encoding.get(name) != fresh.encoding.get(name)
            )
            lines = ", ".join(f"{name} {found.encoding.get(name)!r} is now {fresh.encoding.get(name)!r}" for name in names)
            raise InputError(f"archive {self.folder} was encoded in another way: {lines}; use its options, or another folder")
        return found

    def _write(self, manifest: Manifest) -> None:
        scratch = self.folder / f".{MANIFEST}.part"
        with scratch.open("w", encoding="utf-8") as file:
            file.write(manifest.to_text())
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self.folder / MANIFEST)
        _sync_folder(self.folder)
        self._manifest = manifest

    def _clean(self) -> None:
        """Removes what a killed writer left: a segment in work, and one that was renamed before the manifest knew it."""
        known = {each.name for each in self._manifest.segments}
        for path in (self.folder / SEGMENTS).iterdir():
            if path.name not in known:
                shutil.rmtree(path)

    def _unwritable(self, error: OSError) -> ArchiveUnwritableError:
        return ArchiveUnwritableError(
            f"archive {self.folder} cannot be written ({error.strerror or error}); make room or choose another folder"
        )


class _OpenSegment:
    """A segment in work: rows go to its files as they come, so that a large scene never stands in memory."""

    def __init__(self, folder: Path, embed_size: int) -> None:
        self.folder, self.started, self._embed_size = folder, time.monotonic(), embed_size
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        self._closed: SegmentCounts | None = None
        self._stack = ExitStack()
        names = (SCENES, *FILES, *(f"{level}.f32" for level in LEVELS))
        self._files: dict[str, BinaryIO] = {name: self._stack.enter_context((folder / name).open("wb")) for name in names}

    def add(self, scene: IndexedScene, views: Iterable[EncodedView]) -> IndexedScene:
        """Writes a scene and its views, or nothing when `views` raises."""
        ends = {name: file.tell() for name, file in self._files.items()}
        try:
            count = seen_px = 0
            for view in views:
                self._add_view(view)
                count += 1
                seen_px += view.window[2] * view.window[3]
            scene = dataclasses.replace(scene, num_views=count, skipped_px=scene.height * scene.width - seen_px)
            line = (json.dumps(scene.to_dict(), sort_keys=True, allow_nan=False) + "\n").encode()
            row = np.zeros(1, SCENE_ROW)
            row["offset"], row["length"] = ends[SCENES], len(line)
            row["acquired"] = np.nan if scene.acquired is None else _seconds(scene.acquired)
            row["gsd_m"] = np.nan if scene.gsd_native_m is None else scene.gsd_native_m
            self._files[SCENES].write(line)
            self._files["scenes.bin"].write(row.tobytes())
        except BaseException:
            for name, file in self._files.items():
                file.seek(ends[name])
                file.truncate()
            raise
        return scene

    def counts(self, name: str) -> SegmentCounts:
        """Rows so far."""
        if self._closed is not None:
            return dataclasses.replace(self._closed, name=name)
        rows = {file: self._files[file].tell() // dtype.itemsize for file, dtype in FILES.items()}
        return SegmentCounts(name, *(rows[file] for file in ("scenes.bin", "views.bin", "region.bin", "object.bin")))

    def close(self) -> None:
        """Brings everything to the disk."""
        self._closed = self.counts("")
        with self._stack:
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())

    def _add_view(self, view: EncodedView) -> None:
        counts = self.counts("")
        row = np.zeros(1, VIEW_ROW)
        row["scene"] = counts.scenes
        row["first_region"], row["first_object"] = counts.regions, counts.objects
        row["gsd_effective_m"] = np.nan if view.gsd_effective_m is None else view.gsd_effective_m
        _place(row, view.window, view.bboxes[0])
        self._files["views.bin"].write(row.tobytes())
        self._write_embeddings("scene", view.scene.reshape(1, -1))
        tiles = np.zeros(len(view.tiles), PLACE_ROW)
        tiles["view"] = counts.views
        for index, (tile, bbox) in enumerate(zip(view.tiles, view.bboxes[1:], strict=True)):
            _place(tiles[index : index + 1], tile, bbox)
        if view.region.size:
            self._files["region.bin"].write(tiles.tobytes())
            self._write_embeddings("region", view.region)
        if view.object.size:
            self._files["object.bin"].write(np.repeat(tiles, view.object.shape[1]).tobytes())
            self._write_embeddings("object", view.object.reshape(-1, self._embed_size))

    def _write_embeddings(self, level: str, rows: F32) -> None:
        if rows.shape[1] != self._embed_size or not np.isfinite(rows).all():
            raise InputError(
                f"{level} embeddings must be finite [rows, {self._embed_size}], got {list(rows.shape)}; look for an overflow in the "
                "model, or another checkpoint"
            )
        self._files[f"{level}.f32"].write(np.ascontiguousarray(rows, "<f4").tobytes())


def _place(row: NDArray[Any], window: Rectangle, bbox: BBox | None) -> None:
    row["row_off"], row["col_off"], row["height"], row["width"] = window
    row["bbox"] = (np.nan,) * 4 if bbox is None else bbox


def _seconds(acquired: str) -> float:
    return datetime.fromisoformat(acquired).timestamp()


def _locked(folder: Path) -> BinaryIO:
    """An open file that holds the archive's lock; the system frees it when the process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("ab")
    except OSError as error:
        raise InputError(f"archive {folder} cannot be written ({error.strerror}); choose another folder") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise InputError(
            f"archive {folder} is being written by another process; wait for it, or choose another folder"
        ) from None
    return file


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
