"""Exact search over an archive of generated region embeddings against a bare numpy scan of the same rows, and other ways to search.

    python -m benchmarks.index_search --rows 100000 --rounds 31 --csv index_search.csv

One archive is written to a temporary folder and mapped. Interleaved rounds in one process, each with a new query; medians, and ratios
of medians to the baseline `numpy scan`: a matrix product with the rows in memory and `argpartition`. The last column tells
how many of the baseline's rows a way found: all, unless it is filtered or approximate. With OMP_NUM_THREADS=1, `--clock cpu` counts the
thread's own time. `--graph` builds usearch's graph too; it takes minutes above 100,000 rows.
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.rows import append_rows
from rsvlm_infer.hardware import probe
from rsvlm_infer.index.archive import Archive, IndexedScene
from rsvlm_infer.index.graph import Way, build_graph, find
from rsvlm_infer.index.search import ArchiveQuery, Filters
from rsvlm_infer.index.segment import EncodedView
from rsvlm_infer.index.writer import ArchiveWriter
from rsvlm_infer.ops.registry import resolve

BASELINE = "numpy scan"
TOP = 10
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
CENTRES, SPREAD = 1000, 0.8  # of clustered rows: a row's cosine with its centre is about 0.78
TILES = 20  # regions of one view
F32 = npt.NDArray[np.float32]


def unit(generator: np.random.Generator, rows: int, width: int) -> F32:
    """Random directions [rows, width]. Their cosines are all small: the worst case for a graph, the same as any for a scan."""
    vectors = generator.standard_normal((rows, width), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def clustered(generator: np.random.Generator, rows: int, width: int, centres: F32) -> F32:
    """Directions [rows, width] around random centres, as embeddings of like scenes lie."""
    vectors = centres[generator.integers(0, len(centres), rows)] + unit(generator, rows, width) * np.float32(SPREAD)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def make_archive(folder: Path, rows: F32) -> Archive:
    """An archive whose regions are these rows; every view has a place, every scene a date."""
    width = rows.shape[1]
    empty = np.zeros((0, 0, width), np.float32)
    with ArchiveWriter(folder, "0" * 64, width, {}) as writer:
        for number, first in enumerate(range(0, len(rows), TILES)):
            part = rows[first : first + TILES]
            lon, lat = number * 7 % 360 - 180.0, number * 11 % 160 - 80.0
            boxes = ((lon, lat, lon + 0.5, lat + 0.5),) * (len(part) + 1)
            window = (0, 0, 512, 512)
            tiles = tuple((tile, 0, 512, 512) for tile in range(len(part)))  # a tile's row tells which one it is
            view = EncodedView(window, tiles, boxes, 10.0, empty, part, part[0])
            scene = IndexedScene(
                source=f"/{number}.tif",
                content_hash=f"{number:064x}",
                height=512,
                width=512,
                crs=None,
                transform=None,
                gsd_native_m=10.0,
                acquired=f"{2000 + number % 24}-06-01T00:00:00+00:00",
                num_views=0,
            )
            writer.add(scene, [view])
    return Archive.open(folder)


def ways(archive: Archive, rows: F32, graph: bool) -> Iterator[tuple[str, Callable[[F32], npt.NDArray[np.int64]]]]:
    """Each way: a query -> places of the best rows."""
    half = rows.astype(np.float16)
    cue_search = resolve("cue_search")
    place = {}  # of a scene and tile in the archive: its row
    for number in range(-(-len(rows) // TILES)):
        place[f"/{number}.tif"] = number * TILES

    def scan(query: F32) -> npt.NDArray[np.int64]:
        scores = rows @ query
        best = np.argpartition(-scores, TOP)[:TOP]
        return np.asarray(best[np.argsort(-scores[best])], dtype=np.int64)

    def through(filters: Filters | None, way: Way) -> Callable[[F32], npt.NDArray[np.int64]]:
        def found(query: F32) -> npt.NDArray[np.int64]:
            hits = find(archive, ArchiveQuery("region", query), TOP, filters, way).hits
            return np.array([place[hit.scene.source] + hit.window[0] for hit in hits], dtype=np.int64)

        return found

    yield BASELINE, scan
    yield "archive, exact", through(None, "exact")
    yield "archive, exact, box and dates", through(Filters(bbox=(-60.0, -40.0, 60.0, 40.0), after=1e9), "exact")
    yield "op cue_search, float16", lambda query: cue_search(query[None], None, half, TOP, 0.0)[1]
    if graph:
        yield "archive, graph", through(None, "graph")


def main() -> None:
    """Measures and prints one line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="cpu counts this thread: other work disturbs less"
    )
    parser.add_argument("--clustered", action="store_true", help="rows and queries around 1000 centres instead of anywhere")
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    centres = unit(generator, CENTRES, options.width)
    draw = functools.partial(clustered, centres=centres) if options.clustered else unit
    rows = draw(generator, options.rows, options.width)
    with tempfile.TemporaryDirectory() as folder:
        archive = make_archive(Path(folder) / "archive", rows)
        if options.graph:
            started, busy = time.perf_counter(), time.process_time()
            build_graph(archive, "region")
            busy, taken = time.process_time() - busy, time.perf_counter() - started
            print(f"graph of {len(rows)} rows built in {taken:.1f} s, {busy:.1f} s of all threads")
        tried = dict(ways(archive, rows, options.graph))
        measured = measure(tried, lambda: draw(generator, 1, options.width)[0], options.rounds, CLOCKS[options.clock])
    base = statistics.median(measured[BASELINE][0])
    lines = []
    for name, (seconds, recall) in measured.items():
        median = statistics.median(seconds)
        low, high = np.quantile(seconds, [0.2, 0.8]) * 1e3
        lines.append(
            {
                "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
                "way": name,
                "rows": options.rows,
                "width": options.width,
                "clock": options.clock,
                "threads": os.environ.get("OMP_NUM_THREADS", "all"),
                "clustered": options.clustered,
                "median_ms": round(median * 1e3, 3),
                "p20_ms": round(float(low), 3),
                "p80_ms": round(float(high), 3),
                "ratio_to_scan": round(median / base, 3),
                "recall_at_10": round(recall, 4),
                "rounds": options.rounds,
                "cpu": probe().cpu,
            }
        )
        print(
            f"{name:32s} {median * 1e3:9.2f} ms  p20 {low:.2f} p80 {high:.2f}  {median / base:6.2f} x  same rows {recall:.3f}"
        )
    if options.csv is not None:
        append_rows(options.csv, lines)


def measure(
    tried: dict[str, Callable[[F32], npt.NDArray[np.int64]]], draw: Callable[[], F32], rounds: int, clock: Callable[[], float]
) -> dict[str, tuple[list[float], float]]:
    """Seconds of each way, and the share of the baseline's rows that it found (of a filtered search: told too)."""
    seconds: dict[str, list[float]] = {name: [] for name in tried}
    same: dict[str, list[float]] = {name: [] for name in tried}
    for round_number in range(rounds + 1):
        query = draw()
        truth: set[int] = set()
        for name, way in tried.items():
            started = clock()
            found = way(query)
            taken = clock() - started
            if name == BASELINE:
                truth = set(found.tolist())
            if round_number:  # the first round maps and warms
                seconds[name].append(taken)
                same[name].append(len(truth & set(found.tolist())) / TOP)
    return {name: (seconds[name], statistics.fmean(same[name])) for name in tried}


if __name__ == "__main__":
    main()
