"""The ways of the scenes benchmark read what they say: every pixel, each block once, nothing of a file twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rasterio")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells memory and bytes")

from benchmarks import scenes  # noqa: E402

SIDE = 700


@pytest.fixture(scope="module", params=["tiled", "striped"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenes") / f"{request.param}.tif"
    scenes.generate(path, SIDE, request.param, overviews=False)
    return path


def test_the_scene_is_what_the_table_says(scene: Path) -> None:
    import rasterio

    with rasterio.open(scene) as dataset:
        values = dataset.read()
        assert (dataset.count, dataset.dtypes[0], dataset.shape) == (4, "uint16", (SIDE, SIDE))
        assert dataset.block_shapes[0] == ((512, 512) if scene.stem == "tiled" else (16, SIDE))
    assert (values == 0).mean() == pytest.approx(scenes.NODATA_SHARE, abs=0.01)


@pytest.mark.parametrize("compress", ["deflate", "zstd"])
def test_compressed_scenes_hold_the_same_pixels(compress: str, tmp_path: Path) -> None:
    import rasterio

    found = []
    for kind in ("none", compress):
        path = tmp_path / f"{kind}.tif"
        scenes.generate(path, 300, "tiled", overviews=False, compress=kind)
        with rasterio.open(path) as dataset:
            found.append(dataset.read())
            assert dataset.profile.get("compress", "none") == kind
            assert dataset.tags(ns="IMAGE_STRUCTURE").get("PREDICTOR", "1") == ("1" if kind == "none" else "2")
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize("way", ["windows", "lean", "coarse"])
def test_a_way_reads_the_file_once(way: str, scene: Path) -> None:
    found = scenes.measure(way, scene, None)
    assert 0.99 < found["read_mib"] / (scene.stat().st_size / 2**20) < 1.3  # the beginning of the file several times
    assert found["seconds"] > 0


@pytest.mark.parametrize("way", ["windows", "lean"])
def test_bare_passes_take_every_pixel_once(way: str, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rasterio

    seen = np.zeros((SIDE, SIDE), np.uint8)
    opening = rasterio.open

    class Watched:
        def __init__(self, dataset: Any) -> None:
            self._dataset = dataset

        def __getattr__(self, name: str) -> Any:
            return getattr(self._dataset, name)

        def __enter__(self) -> Watched:
            return self

        def __exit__(self, *_: object) -> None:
            self._dataset.close()

        def read(self, *, window: Any, **options: Any) -> Any:
            rows, cols = window.toslices()
            seen[rows, cols] += 1
            return self._dataset.read(window=window, **options)

    monkeypatch.setattr(rasterio, "open", lambda *given, **options: Watched(opening(*given, **options)))
    monkeypatch.setattr(scenes, "LEAN_BYTES", 1 << 16)
    scenes.measure(way, scene, None)
    assert (seen == 1).all()


def test_the_first_bare_pass_is_what_others_stand_against(scene: Path) -> None:
    rows = scenes.compare(scene, ["coarse", "windows", "lean"], 1, None)
    assert [row["against"] for row in rows] == ["lean"] * 3
    assert rows[-1]["seconds_ratio"] == 1.0
    rows = scenes.compare(scene, ["coarse", "windows"], 1, None)
    assert [row["against"] for row in rows] == ["windows"] * 2


def test_a_scene_is_warmed_before_the_clock_starts(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(scenes, "warm", lambda path: events.append("warm"))
    monkeypatch.setattr(scenes, "_lean", lambda path, checkpoint: ({}, lambda: events.append("run") or {}))
    scenes.measure("lean", scene, None)
    assert events == ["warm", "run"]


def test_the_command_prints_one_row_for_each_way(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.scenes", "--folder", str(tmp_path), "--side", "600", "--layouts", "tiled"]
    done = subprocess.run([*command, "--ways", "lean", "whole", "--repeats", "1"], capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["way"] for row in rows] == ["lean", "whole"]
    assert rows[1]["peak_mib"] > rows[0]["peak_mib"]
