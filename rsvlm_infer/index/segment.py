"""Owns the writing of one segment: rows go to its files as they come, from encoded views or from another segment. Knows no manifest."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..imagery.footprint import BBox
from .archive import (
    F32,
    FEATURE_ROW,
    FEATURES,
    PLACE_ROW,
    PLANS,
    SCENE_ROW,
    SCENES,
    VIEW_ROW,
    FeatureFormat,
    IndexedScene,
    Manifest,
    Segment,
    SegmentCounts,
    ViewFeatures,
)

_COPIED_ROWS = 1 << 15  # of embeddings at once

Rectangle = tuple[int, int, int, int]  # row_off, col_off, height, width


@dataclass(frozen=True)
class EncodedView:
    """One encoded window of a scene: embeddings and where they lie.

    object [T, k, De], region [T, De], scene [De]; an absent level is empty. tiles: the part of the scene that each tile shows. bboxes:
    of the window, then of each tile; None without a place. features: what the vision encoder gave, where an archive keeps it.
    """

    window: Rectangle
    tiles: tuple[Rectangle, ...]
    bboxes: tuple[BBox | None, ...]
    gsd_effective_m: float | None
    object: F32
    region: F32
    scene: F32
    features: ViewFeatures | None = None


class OpenSegment:
    """A segment in work: rows go to its files as they come, so that a large scene never stands in memory."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.started, self._embed_size = folder, time.monotonic(), manifest.embed_size
        self._kept, self._row_bytes = manifest.features, manifest.row_bytes()
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        self._closed: SegmentCounts | None = None
        self._stack = ExitStack()
        names = [SCENES, *self._row_bytes, *([] if self._kept is None else [PLANS])]
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
        rows = {file: self._files[file].tell() // size for file, size in self._row_bytes.items()}
        patches = 0 if self._kept is None else rows[self._kept.file]
        return SegmentCounts(name, rows["scenes.bin"], rows["views.bin"], rows["region.bin"], rows["object.bin"], patches)

    def close(self) -> None:
        """Brings everything to the disk."""
        self._closed = self.counts("")
        with self._stack:
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())

    def copy(self, segment: Segment, kept: NDArray[np.bool_]) -> None:
        """Adds the scenes of another segment that `kept`, bool [scenes], says, as they stand there."""
        counts, scenes = self.counts(""), segment.scenes[kept]
        for row, index in zip(scenes, np.flatnonzero(kept), strict=True):
            row["offset"] = self._files[SCENES].tell()
            self._files[SCENES].write(segment.scene_line(int(index)))
        self._files["scenes.bin"].write(scenes.tobytes())
        kept_views = kept[segment.views["scene"]]
        views = segment.views[kept_views]
        views["scene"] = (counts.scenes + np.cumsum(kept) - 1)[views["scene"]]
        new_views = counts.views + np.cumsum(kept_views) - 1
        self._copy_embeddings("scene", segment, kept_views)
        for level in ("region", "object"):
            places = segment.places(level)
            kept_rows = kept_views[places["view"]]
            before = np.concatenate([[0], np.cumsum(kept_rows)])  # kept rows before each row
            views[f"first_{level}"] = counts.rows(level) + before[views[f"first_{level}"]]
            places = places[kept_rows]
            places["view"] = new_views[places["view"]]
            self._files[f"{level}.bin"].write(places.tobytes())
            self._copy_embeddings(level, segment, kept_rows)
        self._files["views.bin"].write(views.tobytes())
        if self._kept is not None:
            for view in np.flatnonzero(kept_views).tolist():
                self._write_features(self._kept, segment.taps(view), segment.plan_line(view))

    def _copy_embeddings(self, level: str, segment: Segment, kept_rows: NDArray[np.bool_]) -> None:
        rows = segment.embeddings(level)
        for first in range(0, len(rows), _COPIED_ROWS):
            part = slice(first, first + _COPIED_ROWS)
            self._files[f"{level}.f32"].write(rows[part][kept_rows[part]].tobytes())

    def _write_features(self, kept: FeatureFormat, taps: NDArray[Any], line: bytes) -> None:
        row = np.zeros(1, FEATURE_ROW)
        row["first_patch"], row["patches"] = self._files[kept.file].tell() // kept.patch_bytes, taps.shape[1]
        row["offset"], row["length"] = self._files[PLANS].tell(), len(line)
        self._files[FEATURES].write(row.tobytes())
        self._files[PLANS].write(line)
        self._files[kept.file].write(np.ascontiguousarray(taps, kept.type).data)

    def _add_features(self, kept: FeatureFormat, features: ViewFeatures | None) -> None:
        shape = None if features is None else features.taps.shape
        if features is None or shape is None or (shape[0], shape[2]) != (kept.levels, kept.width):
            raise InputError(f"features must be taps [{kept.levels}, patches, {kept.width}], got {shape}; encode with features")
        with np.errstate(over="ignore"):  # what is too large for the type is said below
            taps = features.taps.astype(kept.type)
        if not np.isfinite(taps).all():
            raise InputError(
                f"features must be finite {kept.dtype} numbers, they reach {np.abs(features.taps).max():.3g}; use --features float32, "
                "or look for an overflow in the model"
            )
        about = {"plan": features.plan, "warnings": list(features.warnings)}
        self._write_features(kept, taps, (json.dumps(about, sort_keys=True, allow_nan=False) + "\n").encode())

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
        if self._kept is not None:
            self._add_features(self._kept, view.features)

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
