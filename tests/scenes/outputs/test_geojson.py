"""GeoJSON is valid by its schema and by RFC 7946, and lies where the raster lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rasterio")

from rsvlm_infer.scenes.outputs import write_outputs
from rsvlm_infer.scenes.record import SceneHeader, WindowRecord
from tests.scenes.outputs.cases import ANTIMERIDIAN, SIDE, header, records, text_of


def written(folder: Path, scene: SceneHeader, made: list[WindowRecord]) -> dict[str, Any]:
    (path,) = write_outputs(scene, made, folder, ["geojson"], name="x")
    values: dict[str, Any] = json.loads(text_of(path))
    return values


@pytest.mark.parametrize("mode", ["describe", "ask", "classify", "find"])
@pytest.mark.parametrize(
    "place", [{}, dict(zip(("crs", "transform"), ANTIMERIDIAN, strict=True)), {"crs": None}, {"crs": None, "transform": None}]
)
def test_every_feature_meets_the_geojson_schema(mode: Any, place: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("pystac")
    jsonschema = pytest.importorskip("jsonschema")
    from pystac.validation.local_validator import get_local_schema_cache

    schemas = {name.rpartition("/")[2]: schema for name, schema in get_local_schema_cache().items() if "geojson.org" in name}
    collection = written(tmp_path, header(mode, **place), records(mode))
    assert collection["type"] == "FeatureCollection"
    assert collection["features"]
    assert "crs" not in collection, "RFC 7946 has one crs, and it is not named"
    check = jsonschema.Draft7Validator(schemas["Feature.json"])
    for feature in collection["features"]:
        check.validate(feature)
        assert (feature["geometry"] is None) == ("crs" in place and place["crs"] is None)
        for polygon in polygons(feature["geometry"]):
            for ring in polygon:
                assert ring[0] == ring[-1]
                assert len(ring) >= 4
        assert ("bbox" in feature) == (feature["geometry"] is not None)
    ids = [feature["id"] for feature in collection["features"]]
    assert len(ids) == len(set(ids))


def polygons(geometry: dict[str, Any] | None) -> list[Any]:
    if geometry is None:
        return []
    return [geometry["coordinates"]] if geometry["type"] == "Polygon" else list(geometry["coordinates"])


def test_values_and_places_by_hand(tmp_path: Path) -> None:
    collection = written(tmp_path, header("find"), records("find"))
    feature = next(feature for feature in collection["features"] if feature["id"] == "6")
    properties = feature["properties"]
    assert properties["score"] == round(6 / 64, 6)
    assert (properties["row_off"], properties["col_off"], properties["height"], properties["width"]) == (100, 200, SIDE, SIDE)
    assert properties["window"] == [90, 190, 120, 120]
    assert properties["role"] == "answer"
    assert properties["gsd_native_m"] == 10.0
    assert properties["model_hash"] == "a" * 64
    assert "timings" not in properties
    west, south, east, north = feature["bbox"]
    from rasterio.warp import transform

    (lon,), (lat,) = transform("EPSG:32633", "EPSG:4326", [500_000 + 250 * 10], [5_500_000 - 150 * 10])
    assert (west + east) / 2 == pytest.approx(lon, abs=1e-5)
    assert (south + north) / 2 == pytest.approx(lat, abs=1e-5)
    assert len(collection["features"]) == 11
    assert collection["scene"]["query"] == "harbour with many ships"


def test_cited_windows_are_features_of_their_own(tmp_path: Path) -> None:
    features = written(tmp_path, header("ask"), records("ask"))["features"]
    cited = [feature for feature in features if feature["properties"]["role"] == "cited"]
    assert len(cited) == 2 * 11
    assert cited[0]["id"] == "0-cited-0"
    assert cited[0]["properties"]["record"] == 0
    assert cited[0]["properties"]["text"] == ""
    assert (cited[0]["properties"]["height"], cited[0]["properties"]["width"]) == (30, 30)


def test_a_scene_without_a_place_says_so_once(tmp_path: Path) -> None:
    lost = written(tmp_path, header("find", crs=None, transform=None), records("find"))["scene"]["lost"]
    assert lost == [
        "the scene has no georeference, so its windows have no place on a map; coordinates are pixels (column, -row)"
    ]
    told = header("find", crs=None, transform=None, lost=("there is no georeference",))
    assert written(tmp_path, told, records("find"))["scene"]["lost"] == ["there is no georeference"]


def test_the_antimeridian_splits_features(tmp_path: Path) -> None:
    crs, transform = ANTIMERIDIAN
    collection = written(tmp_path, header("find", crs=crs, transform=transform), records("find"))
    kinds = {feature["geometry"]["type"] for feature in collection["features"]}
    assert kinds == {"Polygon", "MultiPolygon"}
    assert collection["bbox"][0] > collection["bbox"][2]


def test_geopandas_reads_it(tmp_path: Path) -> None:
    geopandas = pytest.importorskip("geopandas")
    (path,) = write_outputs(header("classify"), records("classify"), tmp_path, ["geojson"])
    frame = geopandas.read_file(path)
    assert frame.crs.to_epsg() == 4326
    assert len(frame) == 11
    assert frame.geometry.is_valid.all()
    assert set(frame["label"]) == {"farmland", "forest", "port & <harbour>"}
    # the cores of a grid touch and do not overlap
    projected = frame.to_crs(32633)
    assert projected.union_all().area == pytest.approx(11 * (SIDE * 10) ** 2, rel=1e-6)
    assert projected.area.sum() == pytest.approx(11 * (SIDE * 10) ** 2, rel=1e-6)
