"""Search is exact: the rows and scores of a loop, with every filter, level and query; ties by the archive's order."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsvlm_infer.backends.base import Embeddings
from rsvlm_infer.config import AlignmentConfig
from rsvlm_infer.errors import InputError
from rsvlm_infer.index.archive import Archive
from rsvlm_infer.index.search import ArchiveQuery, Filters, SearchLevel, search, top_rows
from rsvlm_infer.index.segment import EncodedView
from rsvlm_infer.tasks.retrieve import alignment_scores
from tests.index.archives import WIDTH, filled, scene, unit, view

YEARS = (2018, 2019, None, 2021, 2022, 2023, None)
GSDS = (0.5, 10.0, 10.0, None, 30.0, 0.5, 2.0)


def box(west: float, south: float, side: float = 2.0) -> tuple[float, float, float, float]:
    return west, south, (west + side + 180) % 360 - 180, south + side


@pytest.fixture
def views() -> list[list[EncodedView]]:
    """Seven scenes of one to three views with one to five tiles; every fourth has no place, one crosses the antimeridian."""
    generator = np.random.default_rng(5)
    made = []
    for index in range(7):
        group = []
        for number in range(1 + index % 3):
            tiles = 1 + (index + number) % 5
            place = None if index == 4 else [box(-180 + 51 * index + number, 10 * index - 30.0)] * (tiles + 1)
            if index == 6:
                place = [box(179, 30)] * (tiles + 1)
            group.append(view(generator, tiles, bboxes=place))
        made.append(group)
    return made


@pytest.fixture(params=[1, 3, 1000], ids=lambda count: f"{count} a segment")
def archive(request: pytest.FixtureRequest, views: list[list[EncodedView]], tmp_path: Path) -> Archive:
    scenes = []
    for index, group in enumerate(views):
        year = YEARS[index]
        acquired = None if year is None else f"{year}-06-01T00:00:00+00:00"
        scenes.append((scene(str(index), acquired=acquired, gsd_native_m=GSDS[index]), group))
    return filled(tmp_path / "archive", scenes, request.param)


def level_rows(views: list[list[EncodedView]], level: str) -> list[tuple[int, EncodedView, Any, np.ndarray]]:
    """(scene, view, window, embedding) of every row, in the order of the archive."""
    rows = []
    for index, group in enumerate(views):
        for each in group:
            if level == "scene":
                rows.append((index, each, each.window, each.scene))
            elif level == "region":
                rows += [(index, each, tile, vector) for tile, vector in zip(each.tiles, each.region, strict=True)]
            else:
                rows += [
                    (index, each, tile, vector)
                    for tile, group_ in zip(each.tiles, each.object, strict=True)
                    for vector in group_
                ]
    return rows


@pytest.mark.parametrize("level", ["object", "region", "scene"])
@pytest.mark.parametrize("top", [1, 5, 10_000])
def test_a_text_finds_what_a_loop_finds(level: Any, top: int, archive: Archive, views: list[list[EncodedView]]) -> None:
    query = unit(np.random.default_rng(1), WIDTH)
    rows = level_rows(views, level)
    scores = np.array([float(vector.astype(np.float64) @ query.astype(np.float64)) for *_, vector in rows])
    best = np.argsort(-scores, kind="stable")[:top]
    result = search(archive, ArchiveQuery(level, query), top)
    assert result.num_rows == len(rows)
    assert [hit.scene.source for hit in result.hits] == [f"/{rows[index][0]}" for index in best]
    assert [hit.window for hit in result.hits] == [rows[index][2] for index in best]
    assert [hit.view for hit in result.hits] == [rows[index][1].window for index in best]
    assert [hit.score for hit in result.hits] == pytest.approx(scores[best].tolist(), abs=1e-6)


@pytest.mark.parametrize("with_text", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_an_image_finds_its_likes(with_text: bool, count: int, archive: Archive, views: list[list[EncodedView]]) -> None:
    generator = np.random.default_rng(2)
    visual, text = unit(generator, count, WIDTH), unit(generator, WIDTH)
    rows = level_rows(views, "object")
    scores = np.array([(visual @ vector).max() + (0.5 * (text @ vector) if with_text else 0.0) for *_, vector in rows])
    query = ArchiveQuery("object", text if with_text else None, visual, text_weight=0.5)
    result = search(archive, query, 4)
    assert [hit.score for hit in result.hits] == pytest.approx(np.sort(scores)[::-1][:4].tolist(), abs=1e-6)
    assert [hit.scene.source for hit in result.hits] == [f"/{rows[index][0]}" for index in np.argsort(-scores)[:4]]


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.8, 0.1, 0.1), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize("salient", [1, 4, 8])
def test_level_all_is_the_alignment_score_of_each_view(
    weights: Any, salient: int, archive: Archive, views: list[list[EncodedView]]
) -> None:
    query = unit(np.random.default_rng(3), WIDTH)
    alignment = AlignmentConfig(embed_size=WIDTH, weights=weights, salient_patches=salient)
    flat = [(index, each) for index, group in enumerate(views) for each in group]
    truth = [
        float(alignment_scores(Embeddings(each.object, each.region, each.scene), query[None], alignment)[0]) for _, each in flat
    ]
    result = search(archive, ArchiveQuery("all", query, weights=weights, salient=salient), len(flat))
    order = np.argsort(-np.array(truth), kind="stable")
    assert [hit.scene.source for hit in result.hits] == [f"/{flat[index][0]}" for index in order]
    assert [hit.score for hit in result.hits] == pytest.approx([truth[index] for index in order], abs=1e-6)


def seconds(year: int) -> float:
    return datetime(year, 6, 1, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("filters", "expected", "unknown"),
    [
        (Filters(), {0, 1, 2, 3, 4, 5, 6}, 0),
        (Filters(after=seconds(2019)), {1, 3, 4, 5}, 2),
        (Filters(before=seconds(2019)), {0}, 2),
        (Filters(after=seconds(2019), before=seconds(2022)), {1, 3}, 2),
        (Filters(gsd_m=(1.0, 10.0)), {1, 2, 6}, 1),
        (Filters(gsd_m=(0.5, 0.5), after=seconds(2020)), {5}, 3),
        (Filters(bbox=(-180, -90, 180, 90)), {0, 1, 2, 3, 5, 6}, 1),
        (Filters(bbox=(-129.5, -20, -128, -19)), {1}, 1),
        (Filters(bbox=(-180, 30, -179.5, 31)), {6}, 1),  # a row that crosses the antimeridian, met from the west
        (Filters(bbox=(179.5, 25, -179.8, 31)), {6}, 1),
        (Filters(bbox=(170, -40, -170, -29)), {0}, 1),  # a box that crosses it
        (Filters(bbox=(100, 80, 101, 81)), set(), 1),
    ],
)
@pytest.mark.parametrize("level", ["all", "region", "scene"])
def test_filters_leave_what_they_say(
    filters: Filters, expected: set[int], unknown: int, level: SearchLevel, archive: Archive, views: list[list[EncodedView]]
) -> None:
    query = unit(np.random.default_rng(1), WIDTH)
    result = search(archive, ArchiveQuery(level, query), 1000, filters)
    assert {int(hit.scene.source[1:]) for hit in result.hits} == expected
    assert result.num_unknown == unknown
    assert result.num_rows == len(result.hits)
    whole = search(archive, ArchiveQuery(level, query), 1000)
    kept = [hit for hit in whole.hits if int(hit.scene.source[1:]) in expected]
    assert result.hits == kept, "a filter changes neither scores nor order"


def test_dropped_scenes_are_not_found(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    archive = filled(tmp_path, [(scene("a", content="1"), [view(generator)]), (scene("a", content="2"), [view(generator)])])
    for level in ("all", "object", "region", "scene"):
        result = search(archive, ArchiveQuery(level, unit(generator, WIDTH)), 100)  # type: ignore[arg-type]
        assert {hit.scene.content_hash for hit in result.hits} == {scene("a", content="2").content_hash}
        assert {hit.view_name for hit in result.hits} == {"000001/1"} == set(archive.views())


def test_equal_scores_keep_the_order_of_the_archive(tmp_path: Path) -> None:
    same = view(np.random.default_rng(0))
    archive = filled(tmp_path, [(scene(str(index)), [same]) for index in range(9)], per_segment=2)
    result = search(archive, ArchiveQuery("scene", same.scene), 5)
    assert [hit.scene.source for hit in result.hits] == ["/0", "/1", "/2", "/3", "/4"]


def test_top_rows_by_hand() -> None:
    scores = np.array([1, 3, 2, 3, 0, 3], np.float32)
    assert top_rows(scores, 2).tolist() == [1, 3]
    assert top_rows(scores, 4).tolist() == [1, 3, 5, 2]
    assert top_rows(scores, 6).tolist() == top_rows(scores, 60).tolist() == [1, 3, 5, 2, 0, 4]
    assert top_rows(np.zeros(0, np.float32), 3).tolist() == []


def test_an_empty_archive_finds_nothing(tmp_path: Path) -> None:
    archive = filled(tmp_path, [])
    assert search(archive, ArchiveQuery("all", unit(np.random.default_rng(0), WIDTH)), 5).hits == []


def test_bad_queries_and_filters_are_refused(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    text = unit(generator, WIDTH)
    archive = filled(tmp_path, [(scene("a"), [view(generator)])])
    with pytest.raises(InputError, match="a query needs a text or an image"):
        ArchiveQuery("scene")
    with pytest.raises(InputError, match='level "all" scores texts, got an image too'):
        ArchiveQuery("all", text, text[None])
    with pytest.raises(InputError, match="level must be one of"):
        ArchiveQuery("window", text)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"text must be \[De\]"):
        ArchiveQuery("scene", text[None])
    with pytest.raises(InputError, match="must be finite"):
        ArchiveQuery("scene", np.full(WIDTH, np.nan, np.float32))
    with pytest.raises(InputError, match="text must have 16 columns as the archive, got 8"):
        search(archive, ArchiveQuery("scene", text[:8]), 1)
    with pytest.raises(InputError, match="top must be at least 1, got 0"):
        search(archive, ArchiveQuery("scene", text), 0)
    for bbox in ((0, 10, 5, 5), (0, 0, 181, 5), (5, 0, 5, 1), (0, float("nan"), 1, 1)):
        with pytest.raises(InputError, match="bbox must be west,south,east,north"):
            Filters(bbox=bbox)
    with pytest.raises(InputError, match="after must be earlier than before"):
        Filters(after=2.0, before=1.0)
    with pytest.raises(InputError, match="gsd must be MIN,MAX"):
        Filters(gsd_m=(2.0, 1.0))


def test_a_level_without_embeddings_is_refused(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    empty = np.zeros((0, 0), np.float32)
    plain = EncodedView((0, 0, 1, 1), ((0, 0, 1, 1),), (None, None), None, empty, empty, unit(generator, WIDTH))
    archive = filled(tmp_path, [(scene("a"), [plain])])
    assert len(search(archive, ArchiveQuery("all", unit(generator, WIDTH)), 5).hits) == 1
    for query in (ArchiveQuery("region", plain.scene), ArchiveQuery("all", plain.scene, weights=(0.5, 0.5, 0.0))):
        with pytest.raises(InputError, match="has no region embeddings; choose another level"):
            search(archive, query, 5)
