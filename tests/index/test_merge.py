"""Merging changes neither what is found nor its order, reclaims what was dropped, survives a kill at any step, and lets readers be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsvlm_infer.errors import CheckpointError, InputError
from rsvlm_infer.index import archive as archive_module
from rsvlm_infer.index import writer as writer_module
from rsvlm_infer.index.archive import MANIFEST, SEGMENTS, Archive
from rsvlm_infer.index.graph import build_graph, find, held_segments
from rsvlm_infer.index.search import ArchiveQuery, search
from rsvlm_infer.index.writer import MERGED, ArchiveUnwritableError, worth_merging
from tests.index.archives import ENCODING, FEATURES, WIDTH, filled, scene, unit, view, writer

KEPT = {**ENCODING, "features": FEATURES}


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of small segments: flushing each to the disk takes a minute and shows nothing but in the test that kills."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def grown(folder: Path, count: int = 12, changed: tuple[int, ...] = (1, 5), encoding: dict[str, Any] = KEPT) -> Archive:
    """One segment a scene of one to three views; then some scenes change, so that what they were is dropped."""
    with writer(folder, encoding=encoding) as open_writer:
        for number, index in enumerate([*range(count), *changed]):
            generator = np.random.default_rng(number)
            patches = 3 + index if encoding is KEPT else 0
            views = []
            for part in range(1 + index % 3):
                tiles = 1 + (index + part) % 4
                place = [(10.0 + tile, 20.0, 11.0 + index, 21.0) for tile in range(tiles + 1)] if index % 2 else None
                views.append(view(generator, tiles, bboxes=place, patches=patches))
            content = f"{index} changed" if number >= count else None
            given = scene(str(index), content=content, gsd_native_m=float(index), acquired="2020-01-02T00:00:00+00:00")
            open_writer.add(given, views)
            open_writer.close_segment()
    return Archive.open(folder)


def everything(archive: Archive) -> list[Any]:
    """All that counts, in its order, without names of segments."""
    found: list[Any] = []
    for segment in archive.segments:
        for index in np.flatnonzero(archive.counting(segment)).tolist():
            found.append((segment.scene(index), segment.scenes[index].item()[2:]))
            for number in np.flatnonzero(segment.views["scene"] == index).tolist():
                row = segment.views[number].item()
                rows: list[Any] = [row[1:7]]
                for level in ("scene", "region", "object"):
                    part = segment.rows_of_view(level, number)
                    rows += [
                        segment.embeddings(level)[part].tobytes(),
                        [each.item()[1:6] for each in segment.places(level)[part]],
                    ]
                    assert (segment.view_of(level, np.arange(part.start, part.stop)) == number).all()
                if archive.manifest.features is not None:
                    features = segment.features(number)
                    rows += [features.taps.tobytes(), features.taps.shape, features.plan, features.warnings]
                found.append(rows)
    return [repr(each) for each in found]


@pytest.mark.parametrize("encoding", [KEPT, ENCODING], ids=["features", "embeddings"])
def test_many_small_segments_become_one_with_the_same_content(encoding: dict[str, Any], tmp_path: Path) -> None:
    before = grown(tmp_path, encoding=encoding)
    assert len(before.segments) == 14
    assert len(before.manifest.dropped) == 2
    content = everything(before)
    query = ArchiveQuery("all", unit(np.random.default_rng(0), WIDTH), weights=(0.5, 0.3, 0.2), salient=2)
    hits = search(before, query, 1000).hits
    with writer(tmp_path, encoding=encoding) as open_writer:
        assert open_writer.merge() == 14
        assert open_writer.source_of(scene("0").content_hash) == "/0"
        open_writer.add(scene("new"), [view(np.random.default_rng(5), patches=7)])
        open_writer.add(scene("3", content="3 changed"), [view(np.random.default_rng(6), patches=7)])
    after = Archive.open(tmp_path)
    assert [each.counts.name for each in after.segments] == ["000015", "000016"]
    assert after.manifest.dropped == ("000015/2",), "what is dropped later is named by the merged segment"
    assert sorted(path.name for path in (tmp_path / SEGMENTS).iterdir()) == ["000015", "000016"]
    with writer(tmp_path, encoding=encoding) as open_writer:
        assert open_writer.merge() == 0, "two segments are few"
    merged = grown(tmp_path / "again", encoding=encoding)
    with writer(merged.folder, encoding=encoding) as open_writer:
        open_writer.merge()
    merged = Archive.open(merged.folder)
    assert everything(merged) == content
    assert merged.manifest.dropped == ()
    again = search(merged, query, 1000).hits
    assert [(hit.scene, hit.window, hit.view) for hit in again] == [(hit.scene, hit.window, hit.view) for hit in hits]
    assert [hit.score for hit in again] == pytest.approx([hit.score for hit in hits], abs=1e-6)


def test_few_or_large_or_held_segments_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grown(tmp_path / "few", MERGED - 1, ())
    with writer(tmp_path / "few", encoding=KEPT) as open_writer:
        assert open_writer.merge() == 0
    grown(tmp_path / "enough", MERGED, ())
    with writer(tmp_path / "enough", encoding=KEPT) as open_writer:
        assert open_writer.merge(["000003"]) == 0, "one that must stay parts its neighbours"
        monkeypatch.setattr(writer_module, "SMALL_BYTES", 100)
        assert open_writer.merge() == 0, "all are larger"
        monkeypatch.setattr(writer_module, "SMALL_BYTES", 1 << 20)
        assert open_writer.merge() == MERGED


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], (0, 0)),
        ([1] * 7, (0, 0)),
        ([1] * 8, (0, 8)),
        ([1] * 30, (0, 30)),
        ([8] + [1] * 7, (0, 0)),  # the largest would not double
        ([7] + [1] * 7, (0, 8)),
        ([8] + [1] * 8, (0, 9)),
        ([100] + [1] * 8, (1, 9)),
        ([100, *[1] * 8, 50, 50], (0, 11)),
        ([1, 1, 1, 1, 1, 1, 1, 1, 100], (0, 8)),
    ],
)
def test_neighbours_are_worth_merging_when_the_largest_doubles(sizes: list[int], expected: tuple[int, int]) -> None:
    assert worth_merging(sizes) == expected


@pytest.mark.parametrize("seed", range(5))
def test_many_runs_copy_a_row_few_times_and_leave_few_segments(seed: int) -> None:
    """Ten thousand runs of random sizes: sizes alone, as the writer would merge them."""
    generator = np.random.default_rng(seed)
    segments: list[tuple[int, int]] = []  # size, copies of its oldest row
    most = 0
    for size in (1 + generator.pareto(1.5, 10_000) * 2).astype(int).tolist():
        segments.append((size, 0))
        while True:
            first, stop = worth_merging([each for each, _ in segments])
            if not stop:
                break
            merged = segments[first:stop]
            segments[first:stop] = [(sum(each for each, _ in merged), 1 + max(copies for _, copies in merged))]
        most = max(most, len(segments))
    total = sum(size for size, _ in segments)
    assert most <= 60
    assert max(copies for _, copies in segments) <= np.log2(total)


def test_one_scene_a_run_is_copied_a_few_times(tmp_path: Path) -> None:
    copied = most = 0
    for index in range(64):
        with writer(tmp_path / "many") as open_writer:
            open_writer.add(scene(str(index)), [view(np.random.default_rng(index))])
            before = {each.name for each in open_writer.manifest.segments}
            open_writer.merge()
            copied += sum(each.views for each in open_writer.manifest.segments if each.name not in before and each.views > 1)
            most = max(most, len(open_writer.manifest.segments))
    assert most <= 2 * MERGED
    assert copied < 4 * 64
    assert [each.source for _, each in Archive.open(tmp_path / "many").scenes()] == [f"/{index}" for index in range(64)]


def test_what_was_mostly_dropped_is_reclaimed(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    filled(tmp_path, [(scene(str(index)), [view(generator)]) for index in range(4)])
    size = Archive.open(tmp_path).segments[0].nbytes
    filled(tmp_path, [(scene("0", content="0 new"), [view(generator)])])
    with writer(tmp_path) as open_writer:
        assert open_writer.merge() == 0, "three of four views still count"
    filled(tmp_path, [(scene("1", content="1 new"), [view(generator)])])
    with writer(tmp_path) as open_writer:
        assert open_writer.merge() == 1
    archive = Archive.open(tmp_path)
    assert archive.segments[0].nbytes < 0.6 * size
    assert [each.source for _, each in archive.scenes()] == ["/2", "/3", "/0", "/1"]
    filled(tmp_path, [(scene(str(index), content=f"{index} new"), [view(generator)]) for index in (2, 3)])
    with writer(tmp_path) as open_writer:
        assert open_writer.merge() == 1
    archive = Archive.open(tmp_path)
    assert len(archive.segments) == 3, "a segment of which nothing counts is gone"
    assert [each.source for _, each in archive.scenes()] == ["/0", "/1", "/2", "/3"]
    assert archive.manifest.dropped == ()
    assert len(list((tmp_path / SEGMENTS).iterdir())) == 3


def test_a_reader_keeps_what_it_opened(tmp_path: Path) -> None:
    old = grown(tmp_path)
    content = everything(grown(tmp_path / "same"))
    with writer(tmp_path, encoding=KEPT) as open_writer:
        open_writer.merge()
    assert not (tmp_path / SEGMENTS / "000001").exists()
    assert everything(old) == content == everything(Archive.open(tmp_path))


def test_merging_between_manifest_and_segments_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = everything(grown(tmp_path))
    read, calls = archive_module.read_manifest, []

    def merged_meanwhile(folder: Path) -> Any:
        found = read(folder)
        calls.append(found)
        if len(calls) == 1:
            with writer(tmp_path, encoding=KEPT) as open_writer:
                open_writer.merge()
        return found

    monkeypatch.setattr(archive_module, "read_manifest", merged_meanwhile)
    assert everything(Archive.open(tmp_path)) == content
    assert len(calls) >= 2
    monkeypatch.undo()
    shutil.rmtree(tmp_path / SEGMENTS / "000015")
    with pytest.raises(CheckpointError, match=r"scenes\.bin must be a readable part of an archive"):
        Archive.open(tmp_path)


def test_an_archive_that_never_rests_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = grown(tmp_path, 2, ())
    names = iter(range(100))

    def other(folder: Path) -> Any:
        from dataclasses import replace

        return replace(archive.manifest, segments=(replace(archive.manifest.segments[0], name=f"gone {next(names)}"),))

    monkeypatch.setattr(archive_module, "read_manifest", other)
    with pytest.raises(InputError, match="changed each of 20 times it was opened; wait for its writer"):
        Archive.open(tmp_path)


def test_a_full_disk_leaves_the_archive_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = everything(grown(tmp_path))
    manifest = (tmp_path / MANIFEST).read_bytes()
    with writer(tmp_path, encoding=KEPT) as open_writer:
        monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(ArchiveUnwritableError, match=r"cannot be written .No space left on device.; make room"):
            open_writer.merge()
        monkeypatch.undo()
    assert (tmp_path / MANIFEST).read_bytes() == manifest
    assert everything(Archive.open(tmp_path)) == content
    assert len(list((tmp_path / SEGMENTS).iterdir())) == 14


def test_a_graph_holds_its_segments(tmp_path: Path) -> None:
    pytest.importorskip("usearch")
    generator = np.random.default_rng(0)
    archive = filled(tmp_path, [(scene(str(index)), [view(generator, 5)]) for index in range(MERGED)], per_segment=1)
    assert held_segments(tmp_path) == set()
    build_graph(archive, "region")
    assert held_segments(tmp_path) == {each.counts.name for each in archive.segments}
    assert held_segments(tmp_path, except_levels=["region"]) == set()
    filled(tmp_path, [(scene(str(100 + index)), [view(generator, 5)]) for index in range(MERGED)], per_segment=1)
    with writer(tmp_path) as open_writer:
        assert open_writer.merge(held_segments(tmp_path)) == MERGED
    archive = Archive.open(tmp_path)
    assert len(archive.segments) == MERGED + 1
    query = ArchiveQuery("region", unit(generator, WIDTH))
    found, truth = find(archive, query, 5, way="graph"), search(archive, query, 5)
    assert [hit.scene.source for hit in found.hits] == [hit.scene.source for hit in truth.hits]


@pytest.mark.slow
def test_killed_at_any_step_of_merging_nothing_is_lost(tmp_path: Path, repository: Path) -> None:
    """At each rename, flush and removal: what is there opens with the same content, and merging again ends in the same bytes."""
    environment = {**os.environ, "PYTHONPATH": f"{repository}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    content = everything(grown(tmp_path / "start"))

    def run(folder: Path, steps: int) -> int:
        command = [sys.executable, "-m", "tests.index.killed_writer", str(folder), str(steps), "merge"]
        return subprocess.run(command, cwd=repository, env=environment, capture_output=True, check=False).returncode

    shutil.copytree(tmp_path / "start", tmp_path / "whole")
    assert run(tmp_path / "whole", 10_000) == 0
    whole = files(tmp_path / "whole")
    assert len(whole) < len(files(tmp_path / "start")) / 5
    states = set()
    for steps in [*range(20), 60, 150]:
        folder = tmp_path / str(steps)
        shutil.copytree(tmp_path / "start", folder)
        assert run(folder, steps) == -9
        assert everything(Archive.open(folder)) == content
        states.add(len(Archive.open(folder).segments))
        with writer(folder, encoding=KEPT) as open_writer:
            open_writer.merge()
        assert files(folder) == whole
    assert states == {14, 1}, "kills before and behind the new manifest"


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
