"""One affine transform and a crs out of whatever a raster says about its place, or a sentence about what is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsvlm_infer.imagery.source import open_scene

rasterio = pytest.importorskip("rasterio")
from rasterio.control import GroundControlPoint  # noqa: E402
from rasterio.rpc import RPC  # noqa: E402
from rasterio.transform import Affine  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

NORTH_UP = Affine(10, 0, 500_000, 0, -10, 5_000_000)


def write(path: Path, **profile: Any) -> Path:
    with rasterio.open(path, "w", driver="GTiff", count=1, dtype="uint8", width=40, height=30, **profile) as dataset:
        dataset.write(np.full((1, 30, 40), 7, np.uint8))
    return path


def points(transform: Affine, bend: float = 0.0) -> list[GroundControlPoint]:
    """Control points of a transform; `bend` moves the last one by so many pixels."""
    places = [(0, 0), (0, 40), (30, 0), (30, 40), (15, 20)]
    found = []
    for index, (row, col) in enumerate(places):
        shifted = col + (bend if index == len(places) - 1 else 0.0)
        x = transform.a * shifted + transform.b * row + transform.c
        y = transform.d * shifted + transform.e * row + transform.f
        found.append(GroundControlPoint(row, col, x, y))
    return found


@pytest.mark.parametrize(
    "transform",
    [
        NORTH_UP,
        Affine(10, 0, 500_000, 0, 10, 5_000_000),  # south-up
        Affine(-10, 0, 500_000, 0, -10, 5_000_000),  # east to the left
        Affine(8, 6, 500_000, 6, -8, 5_000_000),  # turned
    ],
)
def test_every_affine_transform_is_kept_and_nothing_is_lost(tmp_path: Path, transform: Affine) -> None:
    with open_scene(write(tmp_path / "a.tif", crs="EPSG:32631", transform=transform)) as scene:
        assert scene.transform == pytest.approx(tuple(transform)[:6])
        assert scene.lost == ()
        assert scene.gsd_native_m == pytest.approx(10.0)
        assert scene.crs_wkt is not None
        assert scene.crs_wkt.startswith("PROJCRS[")
        left, bottom, right, top = scene.bounds or (0, 0, 0, 0)
        assert left < right
        assert bottom < top


def test_control_points_that_an_affine_transform_meets_lose_nothing(tmp_path: Path) -> None:
    turned = Affine(8, 6, 500_000, 6, -8, 5_000_000)
    with open_scene(write(tmp_path / "a.tif", crs="EPSG:32631", gcps=points(turned))) as scene:
        assert scene.transform == pytest.approx(tuple(turned)[:6], abs=1e-5)
        assert scene.lost == ()
        assert scene.gsd_native_m == pytest.approx(10.0)


def test_control_points_that_bend_say_how_far_they_lie_off(tmp_path: Path) -> None:
    with open_scene(write(tmp_path / "a.tif", crs="EPSG:32631", gcps=points(NORTH_UP, bend=5.0))) as scene:
        assert scene.transform is not None
        (sentence,) = scene.lost
        assert sentence.startswith("5 ground control points place the scene; one affine transform fits them within 4 pixels")


def test_control_points_on_a_line_place_nothing(tmp_path: Path) -> None:
    line = [GroundControlPoint(at, at, 500_000 + at, 5_000_000 + at) for at in (0, 10, 20)]
    with open_scene(write(tmp_path / "a.tif", crs="EPSG:32631", gcps=line)) as scene:
        assert scene.transform is None
        assert scene.lost == ("there is no georeference: places are in pixels only",)


def test_rpcs_alone_need_a_terrain_model(tmp_path: Path) -> None:
    numbers = [1.0] + [0.0] * 19
    rpcs = RPC(
        height_off=0,
        height_scale=100,
        lat_off=45,
        lat_scale=1,
        line_den_coeff=numbers,
        line_num_coeff=numbers,
        line_off=15,
        line_scale=15,
        long_off=5,
        long_scale=1,
        samp_den_coeff=numbers,
        samp_num_coeff=numbers,
        samp_off=20,
        samp_scale=20,
    )
    with open_scene(write(tmp_path / "a.tif", rpcs=rpcs)) as scene:
        assert (scene.transform, scene.crs, scene.gsd_native_m) == (None, None, None)
        (sentence,) = scene.lost
        assert "RPC" in sentence
        assert "gdalwarp -rpc" in sentence


def test_without_crs_or_without_anything(tmp_path: Path) -> None:
    with open_scene(write(tmp_path / "a.tif", transform=NORTH_UP)) as scene:
        assert scene.transform == tuple(NORTH_UP)[:6]
        assert scene.lost == ("there is no coordinate system: places are in the file's own units",)
    with open_scene(write(tmp_path / "b.tif")) as scene:
        assert scene.transform is None
        assert scene.lost == ("there is no georeference: places are in pixels only",)
    with open_scene(np.zeros((4, 4, 3), np.uint8)) as scene:
        assert scene.lost == ("there is no georeference: places are in pixels only",)


def test_ground_metres_are_those_of_the_place(tmp_path: Path) -> None:
    degrees = Affine(0.5, 0, 0, 0, -2, 60)
    with open_scene(write(tmp_path / "a.tif", crs="EPSG:4326", transform=degrees)) as scene:
        at_equator, at_60 = scene.gsd_at(30, 20), scene.gsd_at(0, 20)
        assert at_equator is not None
        assert at_60 is not None
        assert at_60 / at_equator == pytest.approx(0.5**0.5, rel=1e-2)  # of an area that is half as wide
        assert scene.gsd_native_m == scene.gsd_at(15, 20)
