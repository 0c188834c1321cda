"""Owns how an archive grows: one writer at a time, whole segments, no scene twice. A kill loses at most the segment in work.

Knows no model: it is given embeddings.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ..errors import InputError, RsvlmError
from .archive import MANIFEST, SEGMENTS, Archive, IndexedScene, Manifest, Segment, SegmentCounts, read_manifest
from .segment import EncodedView, OpenSegment

SEGMENT_VIEWS = 4096  # a segment is closed when it has so many; few segments keep a search short
SEGMENT_S = 120.0  # or when it took so long: what a kill may cost
# Many short runs leave many small segments. MERGED or more small neighbours become one when that at least doubles the largest of them:
# so a row is copied once for each doubling of its segment (some ten times from 60 KB), and not with each run.
MERGED = 8
SMALL_BYTES = 1 << 26  # larger segments are left alone
DROPPED_SHARE = 0.5  # of a segment's views: from there on it is written anew without them
LOCK, PART = ".lock", ".part"


class ArchiveUnwritableError(InputError):
    """The archive itself cannot grow: every scene would fail for the same reason."""


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
        self._know(scenes)
        self._replaced: list[str] = []
        self._segment: OpenSegment | None = None

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
            segment = self._segment = self._segment or OpenSegment(self._part_folder, self._manifest)
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
        try:
            segments = (*self._manifest.segments, self._closed(segment))
            dropped = (*self._manifest.dropped, *self._replaced)
            self._write(dataclasses.replace(self._manifest, segments=segments, dropped=dropped))
            self._replaced = []
        except OSError as error:
            raise self._unwritable(error) from None

    def merge(self, left_alone: Collection[str] = ()) -> int:
        """Makes one segment of many small neighbours, and rewrites segments of which most was dropped; how many segments went.

        The order of what is left stays, and so do ties between finds. The old segments are removed once the manifest no longer names
        them; an archive that was opened before keeps them mapped.

        Args:
            left_alone: names of segments that must stay: a graph counts rows through them.

        Raises:
            ArchiveUnwritableError: a file cannot be written.
        """
        self.close_segment()
        gone = 0
        while chosen := self._to_merge(left_alone):
            gone += len(chosen)
            try:
                self._replace(chosen)
            except OSError as error:
                raise self._unwritable(error) from None
        if gone:
            self._know(list(Archive(self.folder, self._manifest).scenes()))
        return gone

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

    def _know(self, scenes: Sequence[tuple[str, IndexedScene]]) -> None:
        self._sources = {scene.content_hash: scene.source for _, scene in scenes}
        self._names = {scene.source: (name, scene.content_hash) for name, scene in scenes}

    def _closed(self, segment: OpenSegment) -> SegmentCounts:
        """Brings a segment to the disk under the next name; no manifest knows it yet."""
        name = self._next_name
        segment.close()
        segment.folder.replace(self.folder / SEGMENTS / name)
        _sync_folder(self.folder / SEGMENTS)
        return segment.counts(name)

    def _to_merge(self, left_alone: Collection[str]) -> list[Segment]:
        """The first neighbours that should be one segment, or the first segment that should be written anew."""
        archive = Archive(self.folder, self._manifest)
        run: list[Segment] = []
        for segment in [*archive.segments, None]:
            if segment is not None and segment.nbytes < SMALL_BYTES and segment.counts.name not in left_alone:
                run.append(segment)
                continue
            first, stop = worth_merging([each.nbytes for each in run])
            if stop:
                return run[first:stop]
            run = []
        for segment in archive.segments:
            dropped = ~archive.counting(segment)[segment.views["scene"]]
            if segment.counts.name not in left_alone and dropped.any() and dropped.mean() >= DROPPED_SHARE:
                return [segment]
        return []

    def _replace(self, chosen: list[Segment]) -> None:
        """One new segment with what counts in these neighbours, in their place."""
        archive, names = Archive(self.folder, self._manifest), [segment.counts.name for segment in chosen]
        merged = OpenSegment(self._part_folder, self._manifest)
        for segment in chosen:
            merged.copy(segment, archive.counting(segment))
        made = [self._closed(merged)]
        if not made[0].scenes:  # all of them were dropped; what was written is cleaned up
            made = []
        segments = self._manifest.segments
        first = segments.index(chosen[0].counts)
        dropped = tuple(each for each in self._manifest.dropped if each.partition("/")[0] not in names)
        segments = (*segments[:first], *made, *segments[first + len(chosen) :])
        self._write(dataclasses.replace(self._manifest, segments=segments, dropped=dropped))
        self._clean()

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


def worth_merging(sizes: Sequence[int]) -> tuple[int, int]:
    """The first neighbours that should become one, as many as can: first and stop, (0, 0) for none."""
    for first in range(len(sizes) - MERGED + 1):
        total = largest = stop = 0
        for index in range(first, len(sizes)):
            total, largest = total + sizes[index], max(largest, sizes[index])
            if index - first + 1 >= MERGED and total >= 2 * largest:
                stop = index + 1
        if stop:
            return first, stop
    return 0, 0


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
