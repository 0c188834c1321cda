"""GeoParquet 1.1: native crs as PROJJSON, WKB rings, a covering bbox; read back by pyarrow and geopandas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rasterio")
parquet = pytest.importorskip("pyarrow.parquet")

from rsvlm_infer.scenes.outputs import write_outputs  # noqa: E402
from tests.scenes.outputs.cases import ANTIMERIDIAN, header, records  # noqa: E402


def geo(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(parquet.read_schema(path).metadata[b"geo"])
    return values


def test_metadata_are_those_of_version_1_1(tmp_path: Path) -> None:
    (path,) = write_outputs(header("find"), records("find"), tmp_path, ["geoparquet"])
    metadata = geo(path)
    assert metadata["version"] == "1.1.0"
    assert metadata["primary_column"] == "geometry"
    column = metadata["columns"]["geometry"]
    assert column["encoding"] == "WKB"
    assert column["geometry_types"] == ["Polygon"]
    assert column["crs"]["id"] == {"authority": "EPSG", "code": 32633}
    assert column["crs"]["$schema"].startswith("https://proj.org/schemas/")
    assert column["orientation"] == "counterclockwise"
    assert column["bbox"] == [500_000, 5_497_000, 504_000, 5_500_000]
    assert column["covering"]["bbox"]["xmin"] == ["bbox", "xmin"]
    scene = json.loads(parquet.read_schema(path).metadata[b"rsvlm:scene"])
    assert scene["model_hash"] == "a" * 64


def test_geopandas_reads_native_places_and_every_column(tmp_path: Path) -> None:
    geopandas = pytest.importorskip("geopandas")
    shapely = pytest.importorskip("shapely")
    (path,) = write_outputs(header("classify"), records("classify"), tmp_path, ["geoparquet"])
    frame = geopandas.read_parquet(path)
    assert frame.crs.to_epsg() == 32633
    assert len(frame) == 11
    assert frame.geometry.is_valid.all()
    assert frame.geometry.iloc[6].equals(shapely.box(503_000, 5_498_000, 504_000, 5_499_000))
    assert frame["record"].iloc[6] == 7
    assert dict(frame["scores"].iloc[6]) == {"farmland": 0.25, "forest": 0.5, "port & <harbour>": 0.25}
    assert list(frame["window"].iloc[0]) == [0, 0, 110, 110]
    assert list(frame["warnings"].iloc[3]) == ["scaled down"]
    assert parquet.read_table(path)["bbox"][6].as_py() == {
        "xmin": 503_000.0,
        "ymin": 5_498_000.0,
        "xmax": 504_000.0,
        "ymax": 5_499_000.0,
    }
    part = geopandas.read_parquet(path, bbox=(503_100, 5_498_100, 503_200, 5_498_200))
    assert list(part["record"]) == [7]


def test_native_places_are_not_cut_at_the_antimeridian(tmp_path: Path) -> None:
    crs, transform = ANTIMERIDIAN
    (path,) = write_outputs(header("find", crs=crs, transform=transform), records("find"), tmp_path, ["geoparquet"])
    assert geo(path)["columns"]["geometry"]["geometry_types"] == ["Polygon"]


@pytest.mark.parametrize("transform", [None, (2.0, 0.0, 100.0, 0.0, -2.0, 50.0)])
def test_an_unknown_crs_is_null(transform: Any, tmp_path: Path) -> None:
    (path,) = write_outputs(header("find", crs=None, transform=transform), records("find"), tmp_path, ["geoparquet"])
    column = geo(path)["columns"]["geometry"]
    assert column["crs"] is None
    assert column["bbox"] == ([0, -300, 400, 0] if transform is None else [100, -550, 900, 50])


def test_a_scene_whose_windows_were_all_skipped_is_an_empty_table(tmp_path: Path) -> None:
    (path,) = write_outputs(header("find"), [], tmp_path, ["geoparquet"])
    assert parquet.read_table(path).num_rows == 0
    assert geo(path)["columns"]["geometry"]["geometry_types"] == []
