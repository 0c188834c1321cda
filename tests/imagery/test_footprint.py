"""Windows come back where they are: planted targets, both sides of the antimeridian, poles, and scenes that have no place."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

rasterio = pytest.importorskip("rasterio")

from rasterio.warp import transform as warp_transform  # noqa: E402

from rsvlm_infer.errors import InputError, MissingDependencyError  # noqa: E402
from rsvlm_infer.imagery.footprint import DECIMALS, NO_CRS, NO_GEOREFERENCE, OUT_OF_CRS, Footprint, footprint, footprints  # noqa: E402
from rsvlm_infer.imagery.plan import Window  # noqa: E402

UTM_33 = "EPSG:32633"
HEIGHT, WIDTH, SIDE = 240, 320, 6


def turned(x: float, y: float, pixel: float, degrees: float, south_up: bool = False) -> tuple[float, ...]:
    angle = math.radians(degrees)
    down = 1.0 if south_up else -1.0
    return (
        pixel * math.cos(angle),
        -down * pixel * math.sin(angle),
        x,
        pixel * math.sin(angle),
        down * pixel * math.cos(angle),
        y,
    )


SCENES = {
    "north-up": (UTM_33, turned(500_000, 5_500_000, 10, 0)),
    "rotated": (UTM_33, turned(420_000, 5_500_000, 10, 31)),
    "upside down": (UTM_33, turned(420_000, 5_500_000, 10, 180)),
    "south-up": (UTM_33, turned(600_000, 7_000_000, 10, 0, south_up=True)),
    "south-up and rotated": (UTM_33, turned(600_000, 7_000_000, 10, -63, south_up=True)),
    "antimeridian": ("EPSG:32660", turned(709_000, 5_500_000, 10, 0)),
    "antimeridian, rotated": ("EPSG:32601", turned(290_500, 5_500_000, 10, 40)),
    "coarse pixels": (UTM_33, turned(100_000, 8_000_000, 2000, 12)),
    "polar": ("EPSG:3031", turned(-700_000, 400_000, 10, 5)),
}


def inside(lon: float, lat: float, place: Footprint) -> bool:
    """Even-odd rule over all rings."""
    odd = False
    for ring in place.polygons:
        for (x0, y0), (x1, y1) in itertools.pairwise(ring):
            if (y0 > lat) != (y1 > lat) and lon < x0 + (lat - y0) / (y1 - y0) * (x1 - x0):
                odd = not odd
    return odd


def ground_distance(lon0: float, lat0: float, lon1: float, lat1: float) -> float:
    """Metres between near points on a sphere."""
    east = (lon1 - lon0 + 180) % 360 - 180
    return 6_371_000 * math.radians(math.hypot(east * math.cos(math.radians(lat0)), lat1 - lat0))


def area(ring: tuple[tuple[float, float], ...]) -> float:
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in itertools.pairwise(ring)) / 2


def check_rfc_7946(place: Footprint) -> None:
    for ring in place.polygons:
        assert ring[0] == ring[-1]
        assert len(ring) >= 4
        assert area(ring) > 0, "exterior rings run counter-clockwise"
        assert all(-180 <= lon <= 180 and -90 <= lat <= 90 for lon, lat in ring)
        assert max(abs(x1 - x0) for (x0, _), (x1, _) in itertools.pairwise(ring)) <= 360


@pytest.mark.parametrize("name", SCENES)
def test_a_planted_target_comes_back_within_half_a_pixel(name: str, tmp_path: Path) -> None:
    crs, transform = SCENES[name]
    affine = rasterio.Affine(*transform)
    # the target is planted by longitude and latitude: where a map says that it is
    (lon,), (lat,) = warp_transform(crs, "EPSG:4326", *([value] for value in affine @ (WIDTH * 0.37, HEIGHT * 0.61)))
    (x,), (y,) = warp_transform("EPSG:4326", crs, [lon], [lat])
    col, row = ~affine @ (x, y)
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    top, left = round(row - SIDE / 2), round(col - SIDE / 2)
    values[top : top + SIDE, left : left + SIDE] = 255
    file = tmp_path / "scene.tif"
    with rasterio.open(
        file, "w", driver="GTiff", height=HEIGHT, width=WIDTH, count=1, dtype="uint8", crs=crs, transform=affine
    ) as made:
        made.write(values, 1)

    with rasterio.open(file) as dataset:
        rows, cols = np.nonzero(dataset.read(1))
        found = Window(int(rows.min()), int(cols.min()), int(np.ptp(rows)) + 1, int(np.ptp(cols)) + 1)
        place = footprint(found, tuple(dataset.transform)[:6], dataset.crs.to_wkt())

    check_rfc_7946(place)
    assert place.lost == ""
    assert inside(lon, lat, place)
    ring = place.polygons[0][:-1]
    assert len(place.polygons) == 1
    assert len(ring) == 4
    centre_lon = sum(point[0] for point in ring) / 4
    centre_lat = sum(point[1] for point in ring) / 4
    pixel_m = math.hypot(transform[0], transform[3])
    # planting rounds the target's corner to whole pixels: at most half a pixel along each axis
    off = ground_distance(lon, lat, centre_lon, centre_lat)
    assert off <= pixel_m * math.hypot(0.5, 0.5) * 1.01
    (exact_lon,), (exact_lat,) = warp_transform(
        crs, "EPSG:4326", *([value] for value in affine @ (left + SIDE / 2, top + SIDE / 2))
    )
    assert ground_distance(exact_lon, exact_lat, centre_lon, centre_lat) < pixel_m / 2


def test_a_degree_raster_needs_no_reprojection() -> None:
    place = footprint(Window(10, 20, 2, 4), (0.5, 0, -100, 0, -0.25, 60), "EPSG:4326")
    assert place.bbox == (-90.0, 57.0, -88.0, 57.5)
    assert place.geometry == {
        "type": "Polygon",
        "coordinates": [[[-90.0, 57.5], [-90.0, 57.0], [-88.0, 57.0], [-88.0, 57.5], [-90.0, 57.5]]],
    }
    assert place.native == ((-90.0, 57.5), (-90.0, 57.0), (-88.0, 57.0), (-88.0, 57.5), (-90.0, 57.5))


def test_long_edges_follow_the_true_edge() -> None:
    """The drawn edge of a 200 km window stays within a tenth of a pixel of the true one; the straight one leaves it by 80 pixels."""
    transform = turned(500_000, 7_200_000, 10, 0)
    place = footprint(Window(0, 0, 20_000, 20_000), transform, UTM_33)
    check_rfc_7946(place)
    ring = np.array(place.polygons[0])
    share = np.linspace(0, 1, 997)
    lons, lats = warp_transform(UTM_33, "EPSG:4326", list(500_000 + 200_000 * share), [7_200_000.0] * len(share))

    def stray(points: np.ndarray) -> float:
        """Largest distance in pixels from the true upper edge to the drawn one, both as latitude over longitude."""
        return float(np.abs(np.interp(lons, points[:, 0], points[:, 1]) - lats).max() * 111_320 / 10)

    northing = np.array(warp_transform("EPSG:4326", UTM_33, list(ring[:, 0]), list(ring[:, 1]))[1])
    upper = ring[np.abs(northing - 7_200_000) < 1]
    upper = upper[np.argsort(upper[:, 0])]
    assert stray(upper) < 0.11
    assert stray(upper[[0, -1]]) > 50
    assert len(ring) < 150


def test_small_windows_get_no_extra_points() -> None:
    assert len(footprint(Window(0, 0, 100, 100), SCENES["north-up"][1], UTM_33).polygons[0]) == 5


def test_the_antimeridian_splits_a_window_without_losing_ground() -> None:
    transform = turned(709_000, 5_500_000, 100, 0)
    place = footprint(Window(0, 0, 100, 100), transform, "EPSG:32660")
    check_rfc_7946(place)
    assert place.geometry is not None
    assert place.geometry["type"] == "MultiPolygon"
    assert len(place.polygons) == 2
    west, south, east, north = place.bbox or pytest.fail("it has a place")
    assert 179 < west < 180
    assert -180 < east < -179
    # the same window, one UTM zone's width to the west, lies in one piece and covers as many square degrees
    whole = footprint(Window(0, 0, 100, 100), transform, "EPSG:32659")
    assert len(whole.polygons) == 1
    assert sum(area(ring) for ring in place.polygons) == pytest.approx(area(whole.polygons[0]), rel=1e-6)
    assert (south, north) == pytest.approx(whole.bbox[1::2] if whole.bbox else ())


def test_longitudes_beyond_180_are_brought_home() -> None:
    inner = footprint(Window(0, 0, 10, 10), (1, 0, 190, 0, -1, 10), "EPSG:4326")
    assert inner.bbox == (-170.0, 0.0, -160.0, 10.0)
    assert footprint(Window(0, 0, 10, 10), (1, 0, 170, 0, -1, 10), "EPSG:4326").bbox == (170.0, 0.0, 180.0, 10.0)
    assert footprint(Window(0, 0, 10, 10), (1, 0, -190, 0, -1, 10), "EPSG:4326").bbox == (170.0, 0.0, 180.0, 10.0)
    across = footprint(Window(0, 0, 10, 10), (1, 0, 175, 0, -1, 10), "EPSG:4326")
    assert across.bbox == (175.0, 0.0, -175.0, 10.0)
    assert [area(ring) for ring in across.polygons] == [50.0, 50.0]


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ("EPSG:4326", (1, 0, -180, 0, -1, 90)),
        ("EPSG:4326", (1, 0, 0, 0, -1, 90)),
        ("EPSG:4326", (1.01, 0, -181, 0, -1.01, 91)),
        ("EPSG:3857", (111_319.490793, 0, -20_037_508.342789, 0, -111_319.490793, 20_037_508.342789)),
    ],
)
def test_a_raster_of_the_whole_world(crs: str, transform: Any) -> None:
    place = footprint(Window(0, 0, 360 if crs == "EPSG:3857" else 180, 360), transform, crs)
    check_rfc_7946(place)
    assert place.bbox is not None
    assert place.bbox[0::2] == pytest.approx((-180.0, 180.0), abs=1e-6)
    height = place.bbox[3] - place.bbox[1]
    assert sum(area(ring) for ring in place.polygons) == pytest.approx(360 * height, rel=1e-6)


@pytest.mark.parametrize(("crs", "pole"), [("EPSG:3995", 90.0), ("EPSG:3031", -90.0)])
@pytest.mark.parametrize("south_up", [False, True])
def test_a_window_with_a_pole_inside_reaches_it(crs: str, pole: float, south_up: bool) -> None:
    half = 1_280_000
    down = 1 if south_up else -1
    transform = (10_000, 0, -half, 0, down * 10_000, -down * half)
    place = footprint(Window(0, 0, 256, 256), transform, crs)
    check_rfc_7946(place)
    assert place.bbox is not None
    assert place.bbox[0::2] == (-180.0, 180.0)
    assert pole in place.bbox
    for lon in (-179.0, -90.0, 0.5, 100.0, 179.0):
        assert inside(lon, pole * 0.999, place)
        assert not inside(lon, pole * 0.7, place)


def test_four_quarters_around_a_pole_meet_there_and_nowhere_else() -> None:
    half = 1_280_000
    transform = (10_000, 0, -half, 0, -10_000, half)
    quarters = footprints([Window(128 * i, 128 * j, 128, 128) for i in (0, 1) for j in (0, 1)], transform, "EPSG:3995")
    for place in quarters:
        check_rfc_7946(place)
    for lon in range(-175, 180, 10):
        assert sum(inside(lon + 0.3, 88.0, place) for place in quarters) == 1


@pytest.mark.parametrize(("crs", "transform"), SCENES.values(), ids=SCENES)
def test_windows_of_one_grid_share_their_edges(crs: str, transform: Any) -> None:
    """What is true of the batch is true of each window alone, and neighbours leave no gap."""
    windows = [Window(0, 80 * j, 240, 80) for j in range(4)]
    batch = footprints(windows, transform, crs)
    assert batch == [footprint(window, transform, crs) for window in windows]
    for left, right in itertools.pairwise(batch):
        shared = {point for ring in left.polygons for point in ring} & {point for ring in right.polygons for point in ring}
        assert len(shared) >= 2


def test_a_scene_without_a_place_says_what_is_lost() -> None:
    pixels = footprint(Window(5, 10, 20, 30), None, None)
    assert pixels == Footprint(
        ((10.0, -5.0), (10.0, -25.0), (40.0, -25.0), (40.0, -5.0), (10.0, -5.0)), (), None, NO_GEOREFERENCE
    )
    assert pixels.geometry is None
    local = footprint(Window(0, 0, 10, 10), (2, 0, 100, 0, -2, 50), None)
    assert local.native[0] == (100.0, 50.0)
    assert local.lost == NO_CRS
    assert footprints([], None, None) == []


def test_ground_beyond_the_crs_is_not_made_up() -> None:
    """An orthographic map has corners in space: the windows there have no place, the inner ones do."""
    ortho = "+proj=ortho +lat_0=30 +lon_0=20 +ellps=sphere"
    transform = (100_000, 0, -6_400_000, 0, -100_000, 6_400_000)
    space, ground = footprints([Window(0, 0, 8, 8), Window(60, 60, 8, 8)], transform, ortho)
    assert space == Footprint(space.native, (), None, OUT_OF_CRS)
    assert inside(20.0, 30.0, ground)
    assert footprint(Window(0, 0, 8, 8), transform, 'LOCAL_CS["plan",UNIT["metre",1]]').lost == OUT_OF_CRS


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="transform must be six finite numbers that map pixels to an area"):
        footprint(Window(0, 0, 1, 1), (1, 1, 0, 1, 1, 0), None)
    with pytest.raises(InputError, match="crs must be a coordinate reference system, got 'EPSG:0'"):
        footprint(Window(0, 0, 1, 1), (1, 0, 0, 0, -1, 0), "EPSG:0")


def test_rasterio_is_asked_for_only_when_there_is_a_crs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rasterio.crs", None)
    assert footprint(Window(0, 0, 1, 1), (1, 0, 0, 0, -1, 0), None).lost == NO_CRS
    with pytest.raises(MissingDependencyError, match=r"rsvlm-infer\[geo\]"):
        footprint(Window(0, 0, 1, 1), (1, 0, 0, 0, -1, 0), UTM_33)


@pytest.mark.data
def test_real_scenes_that_cross_the_antimeridian(data_root: Path) -> None:
    with rasterio.open(data_root / "geotiff" / "cog_dateline.tif") as dataset:
        place = footprint(Window(0, 0, dataset.height, dataset.width), tuple(dataset.transform)[:6], dataset.crs.to_wkt())
        (lon,), (lat,) = warp_transform(
            dataset.crs, "EPSG:4326", *([value] for value in dataset.transform @ (dataset.width / 2, dataset.height / 2))
        )
    check_rfc_7946(place)
    assert len(place.polygons) == 2
    assert place.bbox is not None
    assert place.bbox[0] > place.bbox[2]
    assert inside((lon + 180) % 360 - 180, lat, place)
    assert round(lon, DECIMALS) != 0
