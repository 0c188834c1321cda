"""The graph proposes, exact scores decide; what it cannot do is said, or searched exactly."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsvlm_infer.errors import InputError, MissingDependencyError
from rsvlm_infer.index import graph
from rsvlm_infer.index.archive import Archive
from rsvlm_infer.index.graph import GRAPHS, build_graph, find, why_no_graph
from rsvlm_infer.index.search import ArchiveQuery, Filters, search
from tests.index.archives import WIDTH, filled, scene, unit, view


def make(folder: Path, count: int = 40, first: int = 0) -> Archive:
    generator = np.random.default_rng(first)
    return filled(folder, [(scene(str(first + index)), [view(generator, 5)]) for index in range(count)], per_segment=15)


@pytest.mark.parametrize("level", ["object", "region", "scene"])
def test_a_small_graph_finds_what_the_exact_search_finds(level: Any, tmp_path: Path) -> None:
    pytest.importorskip("usearch")
    archive = make(tmp_path)
    assert build_graph(archive, level).is_file()
    generator = np.random.default_rng(7)
    for query in (
        ArchiveQuery(level, unit(generator, WIDTH)),
        ArchiveQuery(level, None, unit(generator, 1, WIDTH)),
        ArchiveQuery(level, unit(generator, WIDTH), unit(generator, 1, WIDTH), text_weight=0.5),
    ):
        found, truth = find(archive, query, 5, way="graph"), search(archive, query, 5)
        assert [hit.scene.source for hit in found.hits] == [hit.scene.source for hit in truth.hits]
        assert [hit.score for hit in found.hits] == pytest.approx([hit.score for hit in truth.hits], abs=1e-6)
        assert truth.exact
        assert not found.exact


def test_a_graph_has_the_same_bytes_again(tmp_path: Path) -> None:
    pytest.importorskip("usearch")
    archive = make(tmp_path)
    files = {build_graph(archive, "object").read_bytes() for _ in range(4)}
    assert len(files) == 1, "rows that several threads add at once are linked by chance, and some are never found"


def test_scenes_that_are_newer_than_the_graph_are_searched_too(tmp_path: Path) -> None:
    pytest.importorskip("usearch")
    build_graph(make(tmp_path), "region")
    archive = make(tmp_path, 5, first=100)
    new = archive.segments[-1].embeddings("region")[3]
    found = find(archive, ArchiveQuery("region", np.array(new)), 3, way="graph")
    assert found.hits[0].score == pytest.approx(1.0, abs=1e-6)
    assert int(found.hits[0].scene.source[1:]) >= 100


def test_dropped_scenes_are_not_proposed(tmp_path: Path) -> None:
    pytest.importorskip("usearch")
    archive = make(tmp_path)
    query = ArchiveQuery("scene", np.array(archive.segments[0].embeddings("scene")[2]))
    build_graph(archive, "scene")
    assert find(archive, query, 1, way="graph").hits[0].scene.source == "/2"
    changed = filled(tmp_path, [(scene("2", content="new"), [view(np.random.default_rng(99))])])
    assert find(changed, query, 1, way="graph").hits[0].scene.content_hash != scene("2").content_hash


def test_auto_takes_the_graph_only_where_it_pays_and_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("usearch")
    archive = make(tmp_path)
    build_graph(archive, "region")
    text = unit(np.random.default_rng(1), WIDTH)
    assert find(archive, ArchiveQuery("region", text), 3).exact, "few rows"
    monkeypatch.setattr(graph, "GRAPH_FROM_ROWS", 200)
    assert not find(archive, ArchiveQuery("region", text), 3).exact
    assert find(archive, ArchiveQuery("region", text), 3, way="exact").exact
    with caplog.at_level(logging.INFO):
        assert find(archive, ArchiveQuery("region", text), 3, Filters(gsd_m=(0, 1))).exact
        assert find(archive, ArchiveQuery("object", text), 3).exact
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["searching exactly"] * 2


def test_what_a_graph_cannot_do_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make(tmp_path)
    generator = np.random.default_rng(1)
    text = unit(generator, WIDTH)
    with pytest.raises(
        InputError, match=r'way "graph" cannot be used: the archive has no graph of level region; build it with'
    ):
        find(archive, ArchiveQuery("region", text), 3, way="graph")
    with pytest.raises(InputError, match="combines three levels"):
        find(archive, ArchiveQuery("all", text), 3, way="graph")
    with pytest.raises(InputError, match="several embeddings"):
        find(archive, ArchiveQuery("object", None, unit(generator, 2, WIDTH)), 3, way="graph")
    with pytest.raises(InputError, match="a filter may leave no row"):
        find(archive, ArchiveQuery("region", text), 3, Filters(after=1.0), way="graph")
    with pytest.raises(InputError, match="way must be one of"):
        find(archive, ArchiveQuery("region", text), 3, way="fast")  # type: ignore[arg-type]
    with pytest.raises(InputError, match='a graph needs level "object", "region" or "scene", got "all"'):
        build_graph(archive, "all")
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    with pytest.raises(MissingDependencyError, match=r"rsvlm-infer\[index\]"):
        build_graph(archive, "region")


def test_a_graph_of_another_archive_is_not_used(tmp_path: Path) -> None:
    pytest.importorskip("usearch")
    build_graph(make(tmp_path / "a"), "region")
    other = make(tmp_path / "b", 9)
    shutil.copytree(tmp_path / "a" / GRAPHS, tmp_path / "b" / GRAPHS)
    query = ArchiveQuery("region", unit(np.random.default_rng(1), WIDTH))
    assert "has no graph of level region" in str(why_no_graph(other, query, None))
