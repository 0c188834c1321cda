"""Owns search over an archive: exact scores of every row that the filters leave, the best of them. Knows no model and no picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .archive import F32, Archive, IndexedScene, Segment

SearchLevel = Literal["all", "object", "region", "scene"]
SEARCH_LEVELS: tuple[SearchLevel, ...] = ("all", "object", "region", "scene")

_SCORES = 1 << 22  # of rows and visual embeddings that stand in memory at once: 16 MB


@dataclass(frozen=True)
class Filters:
    """What counts. bbox: west, south, east, north in degrees; west > east crosses the antimeridian; rows whose own bounding box meets
    it. after, before: seconds since 1970 UTC, after <= time < before. gsd_m: least and largest native metres per pixel. A scene that
    does not say what a filter asks for does not count.

    Raises:
        InputError: a range that is empty or a box that is none.
    """

    bbox: tuple[float, float, float, float] | None = None
    after: float | None = None
    before: float | None = None
    gsd_m: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.bbox is not None:
            west, south, east, north = self.bbox
            if not (-180 <= west <= 180 and -180 <= east <= 180 and -90 <= south < north <= 90) or west == east:
                raise InputError(
                    f"bbox must be west,south,east,north in degrees with south < north, got {self.bbox}; west > east crosses the "
                    "antimeridian"
                )
        if self.after is not None and self.before is not None and self.after >= self.before:
            raise InputError("after must be earlier than before, got an empty time; swap or widen them")
        if self.gsd_m is not None and not (0 <= self.gsd_m[0] <= self.gsd_m[1] and math.isfinite(self.gsd_m[0])):
            raise InputError(f"gsd must be MIN,MAX in metres per pixel with 0 <= MIN <= MAX, got {self.gsd_m}; correct it")

    def scenes(self, rows: NDArray[Any]) -> NDArray[np.bool_]:
        """bool [scenes] of SCENE_ROW; what is unknown (NaN) meets no range."""
        kept = np.ones(len(rows), dtype=np.bool_)
        if self.after is not None:
            kept &= rows["acquired"] >= self.after
        if self.before is not None:
            kept &= rows["acquired"] < self.before
        if self.gsd_m is not None:
            kept &= (rows["gsd_m"] >= self.gsd_m[0]) & (rows["gsd_m"] <= self.gsd_m[1])
        return kept

    def places(self, bboxes: NDArray[np.float64]) -> NDArray[np.bool_]:
        """bool [rows] of bounding boxes [rows, 4]; a row without a place meets no box."""
        if self.bbox is None:
            return np.ones(len(bboxes), dtype=np.bool_)
        west, south, east, north = self.bbox
        own_west, own_south, own_east, own_north = bboxes.T
        meets = (own_south <= north) & (own_north >= south)
        crosses = own_west > own_east
        # two arcs meet when either begins inside the other; one that crosses the antimeridian is all but its gap
        if west > east:
            across = crosses | (own_west <= east) | (own_east >= west)
        else:
            across = np.where(crosses, (own_west <= east) | (own_east >= west), (own_west <= east) & (own_east >= west))
        return np.asarray(meets & across)


@dataclass(frozen=True)
class ArchiveQuery:
    """What is looked for. A row's score is its largest dot product with `visual` [V, De] plus `text_weight` times that with `text`
    [De]; a text alone is its cosine. Level "all" takes texts alone: their alignment score with each view, by `weights` of (scene,
    region, object) and the `salient` best objects, as `RSVLM.score` does.

    Raises:
        InputError: neither text nor visual, a shape that does not fit, or visual for level "all".
    """

    level: SearchLevel
    text: F32 | None = None
    visual: F32 | None = None
    text_weight: float = 1.0
    weights: tuple[float, float, float] = (1.0, 0.0, 0.0)
    salient: int = 1

    def __post_init__(self) -> None:
        if self.level not in SEARCH_LEVELS:
            raise InputError(f"level must be one of {list(SEARCH_LEVELS)}, got {self.level!r}; choose one of them")
        if self.text is None and self.visual is None:
            raise InputError("a query needs a text or an image, got neither; give one")
        if self.level == "all" and self.visual is not None:
            raise InputError('level "all" scores texts, got an image too; choose level "scene", "region" or "object"')
        if (self.text is not None and self.text.ndim != 1) or (self.visual is not None and self.visual.ndim != 2):
            raise InputError("text must be [De] and visual [V, De]; pass one text and the image's embeddings of one level")
        for vectors in (self.text, self.visual):
            if vectors is not None and not np.isfinite(vectors).all():
                raise InputError("text and visual must be finite, got NaN or infinity; look for an overflow in the embedding")


@dataclass(frozen=True)
class Hit:
    """One find. window: row_off, col_off, height, width in pixels of the scene. view: the encoded window that it lies in.

    view_name: of the view in its archive, SEGMENT/INDEX. answer: what the model said about the view, when it was asked."""

    score: float
    level: SearchLevel
    scene: IndexedScene
    window: tuple[int, int, int, int]
    view: tuple[int, int, int, int]
    bbox: tuple[float, float, float, float] | None
    view_name: str
    answer: str | None = None


@dataclass(frozen=True)
class SearchResult:
    """hits: best first; equal scores in the order of the archive. num_rows: rows that the filters left. num_unknown: scenes that a
    filter left out because they do not say their time, ground distance or place."""

    hits: list[Hit]
    num_rows: int
    num_unknown: int
    exact: bool = True


@dataclass(frozen=True)
class Best:
    """Rows of one segment with their scores."""

    segment: Segment
    scores: F32
    rows: NDArray[np.int64]
    kept: int
    unknown: int = field(default=0)


def search(archive: Archive, query: ArchiveQuery, top: int, filters: Filters | None = None) -> SearchResult:
    """The best rows of a level, exactly: every row that the filters leave is scored in float32.

    Raises:
        InputError: top below 1, a query of another width, or a level that the archive has no rows of.
    """
    if top < 1:
        raise InputError(f"top must be at least 1, got {top}; ask for one find or more")
    check_query(archive, query)
    filters = filters or Filters()
    parts = [best_of(archive, segment, query, top, filters) for segment in archive.segments]
    return result_of(query.level, parts, top)


def result_of(level: SearchLevel, parts: Sequence[Best], top: int) -> SearchResult:
    """The best of all segments, which come in the order of the archive."""
    flat = [(float(score), part, int(row)) for part in parts for score, row in zip(part.scores, part.rows, strict=True)]
    flat.sort(key=lambda entry: -entry[0])  # stable: equal scores stay in the order of the archive
    hits = [_hit(part.segment, level, row, score) for score, part, row in flat[:top]]
    return SearchResult(hits, sum(part.kept for part in parts), sum(part.unknown for part in parts))


def check_query(archive: Archive, query: ArchiveQuery) -> None:
    """Raises InputError for a query that does not fit an archive."""
    width = archive.manifest.embed_size
    for name, vectors in (("text", query.text), ("visual", query.visual)):
        if vectors is not None and vectors.shape[-1] != width:
            raise InputError(f"{name} must have {width} columns as the archive, got {vectors.shape[-1]}; use its checkpoint")
    needed = (
        [query.level]
        if query.level != "all"
        else [level for level, weight in zip(("scene", "region", "object"), query.weights, strict=True) if weight]
    )
    for level in needed:
        if archive.rows("scene") and not archive.rows(level):
            raise InputError(f"archive {archive.folder} has no {level} embeddings; choose another level")


def row_scores(segment: Segment, query: ArchiveQuery) -> F32:
    """float32 [rows of the level; views for "all"]."""
    return _alignment(segment, query) if query.level == "all" else row_scores_of(segment.embeddings(query.level), query)


def row_scores_of(rows: F32, query: ArchiveQuery) -> F32:
    """float32 [rows] of embeddings [rows, De] of one level."""
    # One product for a whole mapping, which streams through memory: threads of a BLAS that meet at every block cost more than they save.
    if query.visual is None:
        assert query.text is not None
        return np.asarray(rows @ query.text, dtype=np.float32)
    scores = np.empty(len(rows), np.float32)
    block = max(1, _SCORES // len(query.visual))
    for first in range(0, len(rows), block):
        np.max(rows[first : first + block] @ query.visual.T, axis=1, out=scores[first : first + block])
    if query.text is not None:
        scores += np.float32(query.text_weight) * (rows @ query.text)
    return scores


def _alignment(segment: Segment, query: ArchiveQuery) -> F32:
    """`RSVLM.score` of each view."""
    assert query.text is not None
    views = segment.views
    scores = np.zeros(len(views), np.float32)
    if not len(views):
        return scores
    scene_weight, region_weight, object_weight = query.weights
    if scene_weight:
        scores += np.float32(scene_weight) * (segment.embeddings("scene") @ query.text)
    if region_weight:
        cosines = segment.embeddings("region") @ query.text
        scores += np.float32(region_weight) * np.maximum.reduceat(cosines, views["first_region"])
    if object_weight:
        cosines = segment.embeddings("object") @ query.text
        firsts = np.append(views["first_object"], len(cosines))
        lengths = np.diff(firsts)
        for length in np.unique(lengths):  # views with as many objects stand in one table
            chosen = np.flatnonzero(lengths == length)
            table = cosines[firsts[chosen][:, None] + np.arange(length)]  # [views, length]
            best = np.sort(table, axis=1)[:, -min(query.salient, length) :]
            scores[chosen] += np.float32(object_weight) * best.mean(axis=1)
    return scores


def kept_rows(archive: Archive, segment: Segment, level: SearchLevel, filters: Filters) -> tuple[NDArray[np.bool_] | None, int]:
    """bool [rows] that filters and dropped scenes leave, None when that is all of them; and how many scenes a filter left out because
    they do not say what it asks for."""
    own = "scene" if level == "all" else level
    counting = archive.counting(segment)
    scenes = counting & filters.scenes(segment.scenes)
    unknown = np.zeros(len(scenes), dtype=np.bool_)
    if filters.after is not None or filters.before is not None:
        unknown |= np.isnan(segment.scenes["acquired"])
    if filters.gsd_m is not None:
        unknown |= np.isnan(segment.scenes["gsd_m"])
    if filters.bbox is not None:
        placeless = np.isnan(segment.views["bbox"][:, 0])
        unknown[segment.views["scene"][placeless]] = True
    num_unknown = int((unknown & counting).sum())
    if scenes.all() and filters.bbox is None:
        return None, num_unknown
    views = scenes[segment.views["scene"]]
    kept = views if own == "scene" else views[segment.places(own)["view"]]
    if filters.bbox is not None:
        kept = kept & filters.places(segment.places(own)["bbox"])
    return kept, num_unknown


def best_of(archive: Archive, segment: Segment, query: ArchiveQuery, top: int, filters: Filters) -> Best:
    kept, unknown = kept_rows(archive, segment, query.level, filters)
    if kept is not None and not kept.any():
        return Best(segment, np.zeros(0, np.float32), np.zeros(0, np.int64), 0, unknown)
    scores = row_scores(segment, query)
    rows = None if kept is None else np.flatnonzero(kept)
    left = scores if rows is None else scores[rows]
    chosen = top_rows(left, top)
    return Best(segment, left[chosen], chosen if rows is None else rows[chosen], len(left), unknown)


def top_rows(scores: F32, top: int) -> NDArray[np.int64]:
    """Rows of the `top` highest scores, best first; equal scores by the lowest row."""
    if top >= len(scores):
        return np.argsort(-scores, kind="stable").astype(np.int64)
    least = np.partition(scores, len(scores) - top)[len(scores) - top]
    rows = np.flatnonzero(scores >= least)  # ascending, so that the stable sort leaves ties with the lowest row in front
    return rows[np.argsort(-scores[rows], kind="stable")][:top].astype(np.int64)


def _hit(segment: Segment, level: SearchLevel, row: int, score: float) -> Hit:
    own = "scene" if level == "all" else level
    place = segment.places(own)[row]
    index = int(segment.view_of(own, np.array([row]))[0])
    view = segment.views[index]
    bbox = tuple(float(value) for value in place["bbox"])
    return Hit(
        score,
        level,
        segment.scene(int(view["scene"])),
        _rectangle(place),
        _rectangle(view),
        None if math.isnan(bbox[0]) else (bbox[0], bbox[1], bbox[2], bbox[3]),
        f"{segment.counts.name}/{index}",
    )


def _rectangle(place: Any) -> tuple[int, int, int, int]:
    return int(place["row_off"]), int(place["col_off"]), int(place["height"]), int(place["width"])
