"""An archive holds what it was given, grows without repeating, survives a kill at any step, and refuses what does not fit."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rsvlm_infer.errors import CheckpointError, ImageReadError, InputError
from rsvlm_infer.index import writer as writer_module
from rsvlm_infer.index.archive import MANIFEST, SEGMENTS, Archive
from rsvlm_infer.index.segment import EncodedView
from rsvlm_infer.index.writer import ArchiveUnwritableError
from tests.index.archives import EMBEDDER, ENCODING, WIDTH, filled, scene, view, writer
from tests.index.killed_writer import SCENES

PLACE = (10.0, 20.0, 11.0, 21.0)


def test_rows_come_back_as_they_were_given(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    views = [[view(generator, 3, bboxes=[PLACE] * 4), view(generator, 1)], [view(generator, 5)]]
    given = [
        scene(
            "a",
            acquired="2020-05-01T00:00:00+00:00",
            gsd_native_m=0.5,
            crs="EPSG:32633",
            transform=(1.0, 0.0, 2.0, 0.0, -1.0, 3.0),
        ),
        scene("b"),
    ]
    archive = filled(tmp_path, list(zip(given, views, strict=True)))
    (segment,) = archive.segments
    assert (segment.counts.scenes, segment.counts.views, segment.counts.regions, segment.counts.objects) == (2, 3, 9, 18)
    flat = [each for group in views for each in group]
    np.testing.assert_array_equal(segment.embeddings("scene"), np.stack([each.scene for each in flat]))
    np.testing.assert_array_equal(segment.embeddings("region"), np.concatenate([each.region for each in flat]))
    np.testing.assert_array_equal(
        segment.embeddings("object"), np.concatenate([each.object.reshape(-1, WIDTH) for each in flat])
    )
    assert segment.views["scene"].tolist() == [0, 0, 1]
    assert segment.views["first_region"].tolist() == [0, 3, 4]
    assert segment.views["first_object"].tolist() == [0, 6, 8]
    assert segment.places("region")["view"].tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert segment.places("region")[1].item()[1:5] == (10, 5, 11, 21)
    assert segment.places("object")[2].item()[:5] == (0, 10, 5, 11, 21), "both objects of a tile lie in it"
    assert segment.places("region")["bbox"][0].tolist() == list(PLACE)
    assert np.isnan(segment.places("region")["bbox"][3]).all()
    found = [each for _, each in archive.scenes()]
    assert found == [
        dataclasses.replace(each, num_views=count, skipped_px=skipped)
        for each, count, skipped in zip(given, (2, 1), (-20_000, 0), strict=True)
    ]
    assert segment.scene(1) == found[1]
    assert segment.scenes["gsd_m"][0] == 0.5
    assert np.isnan(segment.scenes["acquired"][1])


def test_it_grows_by_segments_and_keeps_the_old_ones(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    filled(tmp_path, [(scene("a"), [view(generator)])])
    before = {path: path.read_bytes() for path in (tmp_path / SEGMENTS / "000001").iterdir()}
    archive = filled(tmp_path, [(scene("b"), [view(generator)])])
    assert [each.counts.name for each in archive.segments] == ["000001", "000002"]
    assert {path: path.read_bytes() for path in before} == before
    assert [each.source for _, each in archive.scenes()] == ["/a", "/b"]
    with writer(tmp_path):
        pass
    assert Archive.open(tmp_path).manifest == archive.manifest, "nothing added, nothing changed"


def test_a_content_is_there_once(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    with writer(tmp_path) as open_writer:
        open_writer.add(scene("a"), [view(generator)])
        assert open_writer.source_of(scene("a").content_hash) == "/a"
        with pytest.raises(InputError, match="scene /copy is in the archive already, as /a"):
            open_writer.add(scene("copy", content="a"), [view(generator)])
    with writer(tmp_path) as open_writer:
        assert open_writer.source_of(scene("a").content_hash) == "/a"
        assert open_writer.source_of(scene("b").content_hash) is None


@pytest.mark.parametrize("segments", [1, 2])
def test_a_file_that_changed_takes_the_place_of_what_it_was(segments: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    with writer(tmp_path) as open_writer:
        open_writer.add(scene("a", content="old"), [view(generator)])
        open_writer.add(scene("b"), [view(generator)])
        if segments == 2:
            open_writer.close_segment()
        open_writer.add(scene("a", content="new"), [view(generator)])
    archive = Archive.open(tmp_path)
    assert [each.content_hash for _, each in archive.scenes()] == [
        scene("b").content_hash,
        scene("a", content="new").content_hash,
    ]
    assert archive.manifest.dropped == ("000001/0",)
    # what came back counts once
    with writer(tmp_path) as open_writer:
        open_writer.add(scene("a", content="old"), [view(generator)])
    assert [each.source for _, each in Archive.open(tmp_path).scenes()] == ["/b", "/a"]


def failing(after: int, error: BaseException) -> Iterator[EncodedView]:
    generator = np.random.default_rng(9)
    for _ in range(after):
        yield view(generator)
    raise error


def test_a_scene_that_fails_midway_leaves_no_trace(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    first, last = view(generator), view(generator)
    with writer(tmp_path / "with") as open_writer:
        open_writer.add(scene("a"), [first])
        with pytest.raises(ImageReadError, match="damaged"):
            open_writer.add(scene("bad"), failing(2, ImageReadError("damaged")))
        open_writer.add(scene("b"), [last])
    plain = filled(tmp_path / "without", [(scene("a"), [first]), (scene("b"), [last])])
    assert (tmp_path / "with" / MANIFEST).read_bytes() == (tmp_path / "without" / MANIFEST).read_bytes()
    for path in (plain.folder / SEGMENTS / "000001").iterdir():
        assert (tmp_path / "with" / SEGMENTS / "000001" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug")])
def test_an_interrupted_run_keeps_the_scenes_that_are_whole(error: BaseException, tmp_path: Path) -> None:
    def run() -> None:
        with writer(tmp_path) as open_writer:
            open_writer.add(scene("a"), [view(np.random.default_rng(0))])
            open_writer.add(scene("b"), failing(1, error))

    with pytest.raises(type(error)):
        run()
    assert [each.source for _, each in Archive.open(tmp_path).scenes()] == ["/a"]


def test_segments_close_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "SEGMENT_VIEWS", 2)
    generator = np.random.default_rng(0)
    archive = filled(tmp_path, [(scene(str(i)), [view(generator)]) for i in range(5)])
    assert [each.counts.views for each in archive.segments] == [2, 2, 1]
    monkeypatch.setattr(writer_module, "SEGMENT_S", 0.0)
    archive = filled(tmp_path / "by time", [(scene(str(i)), [view(generator)]) for i in range(3)])
    assert [each.counts.views for each in archive.segments] == [1, 1, 1]


@pytest.mark.slow
def test_killed_at_any_step_it_goes_on_and_ends_the_same(tmp_path: Path, repository: Path) -> None:
    """At each rename and each flush of the first scenes; a scene that the manifest knew is never written again."""
    environment = {**os.environ, "PYTHONPATH": f"{repository}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

    def run(folder: Path, steps: int) -> int:
        command = [sys.executable, "-m", "tests.index.killed_writer", str(folder), str(steps)]
        return subprocess.run(command, cwd=repository, env=environment, capture_output=True, check=False).returncode

    assert run(tmp_path / "whole", 10_000) == 0
    whole = files(tmp_path / "whole")
    killed = 0
    for steps in range(0, 40, 3):
        folder = tmp_path / str(steps)
        code = run(folder, steps)
        killed += code != 0
        known = {each.source for _, each in Archive.open(folder).scenes()} if (folder / MANIFEST).exists() else set()
        times = {
            path: path.stat().st_mtime_ns for path in folder.glob(f"{SEGMENTS}/0*/*") if path.parent.name <= f"{len(known):06d}"
        }
        assert run(folder, 10_000) == 0
        assert files(folder) == whole
        assert {path: path.stat().st_mtime_ns for path in times} == times
    assert killed >= 12
    assert len(Archive.open(tmp_path / "0").segments) == SCENES


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_writer_at_a_time_and_readers_do_not_wait(tmp_path: Path) -> None:
    filled(tmp_path, [(scene("a"), [view(np.random.default_rng(0))])])
    with writer(tmp_path) as open_writer:
        with pytest.raises(InputError, match="is being written by another process"):
            writer(tmp_path)
        open_writer.add(scene("b"), [view(np.random.default_rng(1))])
        assert [each.source for _, each in Archive.open(tmp_path).scenes()] == ["/a"]
    assert len(list(Archive.open(tmp_path).scenes())) == 2


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    archive = filled(tmp_path / "a", [(scene("a"), [view(generator)])])
    archive.require_embedder(EMBEDDER)
    with pytest.raises(
        CheckpointError, match=r"archive .* was encoded by checkpoint eeeeeeeeeeee, it cannot be used with checkpoint ffff"
    ):
        archive.require_embedder("f" * 64)
    with pytest.raises(CheckpointError, match="was encoded by checkpoint"):
        writer(tmp_path / "a", embedder="f" * 64)
    with pytest.raises(InputError, match="was encoded in another way: window_px 1024 is now 512"):
        writer(tmp_path / "a", encoding={**ENCODING, "window_px": 512})
    with pytest.raises(InputError, match=r"has no manifest\.json; check the path"):
        Archive.open(tmp_path / "none")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x.jpg").touch()
    with pytest.raises(InputError, match=r"must be a new folder or an archive, it holds \['x\.jpg'\]"):
        writer(tmp_path / "photos")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        writer(tmp_path / "file")
    with writer(tmp_path / "a") as open_writer:
        wide = dataclasses.replace(view(generator), scene=np.ones(WIDTH + 1, np.float32))
        with pytest.raises(InputError, match=r"scene embeddings must be finite \[rows, 16\], got \[1, 17\]"):
            open_writer.add(scene("wide"), [wide])
        nan = dataclasses.replace(view(generator), region=np.full((3, WIDTH), np.nan, np.float32))
        with pytest.raises(InputError, match="region embeddings must be finite"):
            open_writer.add(scene("nan"), [nan])
    assert len(list(Archive.open(tmp_path / "a").scenes())) == 1


def test_a_full_disk_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with writer(tmp_path) as open_writer:
        open_writer.add(scene("a"), [view(np.random.default_rng(0))])
        monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(ArchiveUnwritableError, match=r"cannot be written .No space left on device.; make room"):
            open_writer.close_segment()
        monkeypatch.undo()
    assert not list(Archive.open(tmp_path).scenes())


@pytest.mark.parametrize("name", ["views.bin", "region.f32", "scenes.jsonl", MANIFEST])
def test_a_damaged_archive_names_the_file(name: str, tmp_path: Path) -> None:
    filled(tmp_path, [(scene("a"), [view(np.random.default_rng(0))])])
    file = tmp_path / MANIFEST if name == MANIFEST else tmp_path / SEGMENTS / "000001" / name
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=rf"{name} must be a readable part of an archive"):
        list(Archive.open(tmp_path).scenes())


def test_another_version_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, [])
    file = tmp_path / MANIFEST
    file.write_text(file.read_text().replace("rsvlm-archive/1", "rsvlm-archive/9"))
    with pytest.raises(InputError, match="has schema 'rsvlm-archive/9', expected 'rsvlm-archive/1'"):
        Archive.open(tmp_path)
