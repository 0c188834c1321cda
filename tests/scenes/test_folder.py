"""The output folder: names, stamps, whole files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rsvlm_infer.errors import InputError
from rsvlm_infer.scenes.folder import folder_names, holds, stamp_of, write_report, write_scene
from rsvlm_infer.scenes.record import WindowRecord
from tests.scenes.fake_scenes import FakeOpener, write_fake


def test_scenes_of_one_name_get_folders_apart() -> None:
    names = folder_names(["a/scene.tif", "b/scene.tif", "b/Other.tif", "/vsizip/x.zip/in side.tif", "c/..", "d/SCENE.jp2"])
    assert names["b/Other.tif"] == "Other"
    assert names["/vsizip/x.zip/in side.tif"] == "in side"
    assert names["c/.."] == "scene" or names["c/.."].startswith("scene-")
    assert len({name.casefold() for name in names.values()}) == 6
    assert folder_names(["a/scene.tif"]) == {"a/scene.tif": "scene"}
    twice = folder_names(["b/scene.tif", "a/scene.tif"])
    assert twice["a/scene.tif"] == names["a/scene.tif"]  # the order of the scenes names nothing


def test_a_stamp_changes_with_the_file_and_what_lies_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "scene.tif"
    assert stamp_of(str(file)) == ""
    assert stamp_of("https://example.com/scene.tif") == ""
    assert stamp_of("scene\0.tif") == ""
    file.write_bytes(b"abc")
    stamps = [stamp_of(str(file))]
    file.write_bytes(b"abcd")
    stamps.append(stamp_of(str(file)))
    os.utime(file, ns=(1, 1))
    stamps.append(stamp_of(str(file)))
    for beside in ("scene.tif.ovr", "scene.tfw", "scene_RPC.TXT"):
        (tmp_path / beside).write_bytes(b"1")
        stamps.append(stamp_of(str(file)))
    assert len(set(stamps)) == len(stamps)
    (tmp_path / "another.tif").write_bytes(b"1")
    assert stamp_of(str(file)) == stamps[-1]


def test_a_scene_is_written_with_the_same_bytes_and_without_timings(tmp_path: Path) -> None:
    run = FakeOpener(tmp_path / "log").open(write_fake(tmp_path / "s.json", 3), None)
    first, second = run.answer(run.windows), run.answer(run.windows)
    assert first[0].timings != second[0].timings
    for folder, records in (("a", first), ("b", second)):
        written = write_scene(tmp_path / folder, run.header, records)
        assert sorted(path.name for path in written) == ["header.json", "records.jsonl"]
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["header.json", "records.jsonl"]
    for name in ("header.json", "records.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "a" / "records.jsonl").read_text().splitlines()]
    assert [WindowRecord.from_dict(line).text for line in lines] == [record.text for record in first]
    assert json.loads((tmp_path / "a" / "header.json").read_text())["content_hash"] == run.header.content_hash


def test_files_are_missed_when_one_is_gone_or_of_another_length(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.txt").write_text("abc")
    assert holds(tmp_path, {"x/a.txt": 3})
    assert not holds(tmp_path, {"x/a.txt": 4})
    assert not holds(tmp_path, {"x/a.txt": 3, "b.txt": 1})


def test_names_that_are_no_utf8_are_escaped_and_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    write_report(tmp_path, {"source": "größe \udcff.tif"})
    assert (tmp_path / "job.json").read_bytes() == '{\n "source": "größe \\udcff.tif"\n}\n'.encode()
    assert json.loads((tmp_path / "job.json").read_text()) == {"source": "größe \udcff.tif"}
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"job\.json cannot be written"):
        write_report(tmp_path / "file", {})
