"""Owns approximate search: a usearch graph over one level of an archive, and the choice between it and the exact search.

The graph proposes rows; their scores are computed exactly from the archive. usearch is the extra `[index]`. Knows no model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..config import LEVELS
from ..errors import InputError, MissingDependencyError
from .archive import F32, Archive, Segment
from .search import (
    ArchiveQuery,
    Best,
    Filters,
    SearchLevel,
    SearchResult,
    best_of,
    check_query,
    result_of,
    row_scores_of,
    search,
)

Way = Literal["auto", "exact", "graph"]
WAYS: tuple[Way, ...] = ("auto", "exact", "graph")

# An exact search reads every row: 6 ms of one thread of an AMD EPYC for 100,000 rows of 256, so 0.3 s here, and 5 GB, which the memory of
# a small machine no longer keeps at hand. Below, the graph saves less than a person notices, may miss finds, and its building costs as
# much as thousands of searches.
GRAPH_FROM_ROWS = 5_000_000
GRAPHS = "graphs"
CONNECTIVITY, EXPANSION_ADD, EXPANSION_SEARCH = 32, 128, 256  # edges of a node, candidates while building and while searching
PROPOSED = 8  # rows asked of the graph for each find wanted: its order by float16 is not quite the true one
_ADDED_ROWS = 1 << 16  # at once

_log = logging.getLogger(__name__)


def build_graph(archive: Archive, level: SearchLevel) -> Path:
    """Builds the graph of a level over all segments, replaces the old one, and gives its file.

    Raises:
        InputError: level "all", which has no rows of its own, or it cannot be written. MissingDependencyError: usearch is absent.
    """
    if level == "all":
        raise InputError('a graph needs level "object", "region" or "scene", got "all"; choose one of them')
    graph = _usearch().Index(
        ndim=archive.manifest.embed_size,
        metric="ip",
        dtype="f16",
        connectivity=CONNECTIVITY,
        expansion_add=EXPANSION_ADD,
        expansion_search=EXPANSION_SEARCH,
    )
    archive.graphs.pop(level, None)
    first = 0
    for segment in archive.segments:
        rows = segment.embeddings(level)
        for start in range(0, len(rows), _ADDED_ROWS):
            part = rows[start : start + _ADDED_ROWS]
            # one thread: of nodes that several threads add at once some are never found again (USearch issue 735)
            graph.add(np.arange(first + start, first + start + len(part)), part, threads=1)
        first += len(rows)
    file = _graph_file(archive, level)
    about = {"segments": [segment.counts.name for segment in archive.segments], "rows": first}
    try:
        file.parent.mkdir(exist_ok=True)
        # the list goes first: a graph without the list of what it holds is never used
        _list_file(file).unlink(missing_ok=True)
        scratch = file.with_name(f".{file.name}.part")
        graph.save(str(scratch))
        scratch.replace(file)
        scratch = file.with_name(f".{file.stem}.json.part")
        scratch.write_text(json.dumps(about) + "\n", encoding="utf-8")
        scratch.replace(_list_file(file))
    except OSError as error:
        raise InputError(f"graph {file} cannot be written ({error.strerror}); make room") from None
    return file


def held_segments(folder: Path, except_levels: Collection[str] = ()) -> set[str]:
    """Segments that a graph of the archive counts rows through, so that they must stay; levels apart that are built anew."""
    held: set[str] = set()
    for level in LEVELS:
        about = None if level in except_levels else _read_list(folder / GRAPHS / f"{level}.json")
        held |= set() if about is None else set(about[0])
    return held


def why_no_graph(archive: Archive, query: ArchiveQuery, filters: Filters | None) -> str | None:
    """Why a search cannot go through a graph, None when it can."""
    if query.level == "all":
        return 'level "all" combines three levels'
    if filters is not None and filters != Filters():
        return "a filter may leave no row that the graph proposes"
    if query.visual is not None and len(query.visual) != 1:
        return "the image has several embeddings on this level"
    if _covered(archive, query.level) is None:
        return f"the archive has no graph of level {query.level}; build it with rsvlm index --graph {query.level}"
    try:
        _usearch()
    except MissingDependencyError as error:
        return str(error)
    return None


def find(archive: Archive, query: ArchiveQuery, top: int, filters: Filters | None = None, way: Way = "auto") -> SearchResult:
    """The best rows: exactly, or through a graph. "auto" takes the graph from GRAPH_FROM_ROWS rows on, where there is one that can.

    Raises:
        InputError: way "graph" and it cannot be; see `search` for the rest.
    """
    if way not in WAYS:
        raise InputError(f"way must be one of {list(WAYS)}, got {way!r}; choose one of them")
    many = query.level != "all" and archive.rows(query.level) >= GRAPH_FROM_ROWS
    if way == "exact" or (way == "auto" and not many):
        return search(archive, query, top, filters)
    reason = why_no_graph(archive, query, filters)
    if reason is None:
        return _through_graph(archive, query, top)
    if way == "graph":
        raise InputError(f'way "graph" cannot be used: {reason}; use "exact"')
    _log.info("searching exactly: %s", reason)
    return search(archive, query, top, filters)


def _through_graph(archive: Archive, query: ArchiveQuery, top: int) -> SearchResult:
    """What the graph proposes, scored exactly; segments that are newer than the graph are searched whole."""
    if top < 1:
        raise InputError(f"top must be at least 1, got {top}; ask for one find or more")
    check_query(archive, query)
    covered = _covered(archive, query.level)
    assert covered is not None
    wanted = _direction(query)
    if query.level not in archive.graphs:  # opening reads every node
        archive.graphs[query.level] = _usearch().Index.restore(str(_graph_file(archive, query.level)), view=True)
    graph = archive.graphs[query.level]
    proposed = np.sort(np.asarray(graph.search(wanted, top * PROPOSED).keys, dtype=np.int64))
    parts = []
    first = 0
    for segment in archive.segments:
        if segment.counts.name not in covered:
            parts.append(best_of(archive, segment, query, top, Filters()))
            continue
        stop = first + segment.counts.rows(query.level)
        rows = proposed[(proposed >= first) & (proposed < stop)] - first
        parts.append(_scored(archive, segment, query, rows))
        first = stop
    result = result_of(query.level, parts, top)
    return SearchResult(result.hits, archive.rows(query.level), 0, exact=False)


def _scored(archive: Archive, segment: Segment, query: ArchiveQuery, rows: NDArray[np.int64]) -> Best:
    counting = archive.counting(segment)
    rows = rows[counting[segment.views["scene"][segment.view_of(query.level, rows)]]]
    scores = row_scores_of(segment.embeddings(query.level)[rows], query)
    order = np.argsort(-scores, kind="stable")
    return Best(segment, scores[order], rows[order], len(rows))


def _direction(query: ArchiveQuery) -> F32:
    """The one vector whose dot product is the query's score."""
    if query.visual is None:
        assert query.text is not None
        return query.text
    if query.text is None:
        return np.asarray(query.visual[0], dtype=np.float32)
    return np.asarray(query.visual[0] + np.float32(query.text_weight) * query.text, dtype=np.float32)


def _covered(archive: Archive, level: str) -> set[str] | None:
    """The segments that a level's graph holds; None without a graph, or with one that does not fit the archive."""
    file = _graph_file(archive, level)
    about = _read_list(_list_file(file))
    if about is None:
        return None
    names, rows = about
    held = [segment for segment in archive.segments if segment.counts.name in names]
    # it must hold the archive's first segments, in their order: keys are rows counted through them
    fits = names == [segment.counts.name for segment in archive.segments[: len(names)]]
    if not fits or rows != sum(segment.counts.rows(level) for segment in held) or not file.is_file():
        return None
    return set(names)


def _read_list(file: Path) -> tuple[list[str], int] | None:
    """Segments of a graph and their rows; None without a readable list, without which no graph is used."""
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        return list(about["segments"]), int(about["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _graph_file(archive: Archive, level: str) -> Path:
    return archive.folder / GRAPHS / f"{level}.usearch"


def _list_file(file: Path) -> Path:
    return file.with_suffix(".json")


def _usearch() -> Any:
    with suppress(ImportError):
        import usearch.index

        return usearch.index
    raise MissingDependencyError("a graph needs usearch, which is not installed; pip install 'rsvlm-infer[index]'")
