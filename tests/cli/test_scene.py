"""`rsvlm scene`: one scene, asked as a whole or window by window; lines, JSON, files, notes and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rsvlm_infer.cli.scene import parse_stretch
from rsvlm_infer.errors import InputError
from tests.cli.running import objects, run
from tests.scenes.telling_scenes import SIDE, fields, write_scene

pytest.importorskip("rasterio")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(write_scene(tmp_path / "map.tif", fields([["red", "green"], ["none", "blue"]]), nodata=0))


def test_the_whole_scene_is_one_text(capsys: pytest.CaptureFixture[str], path: str) -> None:
    code, out, err = run(capsys, "scene", path)
    assert (code, out) == (0, "A red scene.\n") or out.startswith("A ")
    assert "scaled down" in err


def test_a_grid_is_one_line_for_each_window_with_its_place(capsys: pytest.CaptureFixture[str], path: str) -> None:
    code, out, err = run(capsys, "scene", path, "describe", "--window", str(SIDE))
    assert code == 0
    assert [line.split("\t") for line in out.splitlines()] == [
        ["0", "0", "56", "56", "A red scene."],
        ["0", "56", "56", "56", "A green scene."],
        ["56", "56", "56", "56", "A blue scene."],
    ]
    assert err == f"rsvlm: {path}: 25.0% of its area is left out, in empty windows (3,136 px)\n"


def test_json_begins_with_the_scene(capsys: pytest.CaptureFixture[str], path: str) -> None:
    code, out, _ = run(capsys, "scene", path, "ask", "Which colour?", "--window", str(SIDE), "--format", "json")
    header, *records = objects(out)
    assert code == 0
    assert header["scene"]["query"] == "Which colour?"
    assert header["scene"]["empty_px"] == SIDE * SIDE
    assert [record["text"] for record in records] == ["A red scene.", "A green scene.", "A blue scene."]
    assert records[2]["place"]["window"] == {"row_off": 56, "col_off": 56, "height": 56, "width": 56}


def test_classify_and_find_show_their_score(capsys: pytest.CaptureFixture[str], path: str, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\nc\n")
    code, out, _ = run(capsys, "scene", path, "classify", "--labels-file", str(labels), "--window", str(SIDE))
    assert code == 0
    for line in out.splitlines():
        label, share = line.split("\t")[4:]
        assert label in "abc"
        assert 1 / 3 < float(share) <= 1
    code, out, _ = run(capsys, "scene", path, "find", "boats", "--window", str(SIDE), "--overlap", "8")
    assert code == 0
    assert all(-1 <= float(line.split("\t")[4]) <= 1 for line in out.splitlines())


def test_files_are_written_beside_the_lines(capsys: pytest.CaptureFixture[str], path: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    arguments = ("--window", str(SIDE), "-o", str(folder), "--write", "geojson,quicklook")
    code, _, err = run(capsys, "scene", path, "describe", *arguments)
    assert code == 0
    assert sorted(file.name for file in folder.iterdir()) == ["map.geojson", "map.png"]
    assert f"wrote {folder / 'map.geojson'}" in err
    features = json.loads((folder / "map.geojson").read_text())["features"]
    assert len(features) == 3
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    run(capsys, "scene", path, "describe", *arguments, "--batch-size", "1")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == first


def test_what_is_lost_is_said(capsys: pytest.CaptureFixture[str], files: dict[str, str]) -> None:
    code, out, err = run(capsys, "scene", files["red"])
    assert (code, out) == (0, "A red scene.\n")
    assert err == f"rsvlm: warning: {files['red']}: there is no georeference: places are in pixels only\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ask",), 'query must hold the question in mode "ask"'),
        (("find", " "), "query must hold what to look for"),
        (("classify",), "give the labels by either --labels or --labels-file"),
        (("classify", "--labels", "a"), "labels must hold at least two texts"),
        (("describe", "--labels", "a,b"), 'labels belong to mode "classify"'),
        (("find", "boats", "--choice", "a", "--choice", "b"), 'choices belong to mode "ask"'),
        (("describe", "--overlap", "5"), "overlap_px needs window_px"),
        (("describe", "--window", "40", "--overlap", "30"), "overlap_px must be in 0..20"),
        (("describe", "--stretch", "9"), "--stretch must be auto, percentile, none or LOW:HIGH, got '9'"),
        (("describe", "--stretch", "9:3"), r"stretch must be \"auto\""),
        (("describe", "-o", "out", "--write", "shapefile"), "formats must be a list of"),
        (("describe", "-o", "out", "--write", "relevance"), 'format "relevance" needs mode "find"'),
    ],
)
def test_wrong_usage_is_one_line(
    capsys: pytest.CaptureFixture[str], path: str, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run(capsys, "scene", path, *arguments)
    assert (code, out) == (2, "")
    assert message.replace("\\", "") in err
    assert err.count("\n") == 1


def test_a_file_that_cannot_be_read_is_one_line(capsys: pytest.CaptureFixture[str], files: dict[str, str]) -> None:
    code, out, err = run(capsys, "scene", files["bad"])
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    code, _, err = run(capsys, "scene", "/vsicurl/http://127.0.0.1/a.tif")
    assert code == 1
    assert "--allow-vsi" in err


def test_deterministic_and_reading_options_reach_the_scene(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(100, 900, (1, 64, 64), dtype=np.uint16)
    path = str(write_scene(tmp_path / "a.tif", values))
    code, _, err = run(capsys, "scene", path, "--deterministic")
    assert code == 2
    assert "--stretch " in err
    code, out, _ = run(capsys, "scene", path, "--deterministic", "--stretch", "100:900", "-f", "json", "--bands", "1")
    assert code == 0
    assert objects(out)[0]["scene"]["stretch_high"] == [900.0]
    vrt = tmp_path / "a.vrt"
    vrt.write_text(
        '<VRTDataset rasterXSize="64" rasterYSize="64"><VRTRasterBand dataType="UInt16" band="1"><SimpleSource>'
        '<SourceFilename relativeToVRT="1">a.tif</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>'
    )
    assert run(capsys, "scene", str(vrt))[0] == 1
    assert run(capsys, "scene", str(vrt), "--allow-driver", "VRT")[0] == 0


def test_stretches_by_hand() -> None:
    assert parse_stretch("percentile") == "percentile"
    assert parse_stretch("2:30.5") == (2.0, 30.5)
    assert parse_stretch("1,2,3:10,20,30") == ((1.0, 2.0, 3.0), (10.0, 20.0, 30.0))
    for text in ("", "1", "a:b", "1:2:3"):
        with pytest.raises(InputError, match="--stretch must be"):
            parse_stretch(text)
