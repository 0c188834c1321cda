"""The STAC item is valid by the schemas that pystac brings (no network), and its extensions by their rules."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rasterio")

from rsvlm_infer.errors import InputError
from rsvlm_infer.scenes.outputs import write_outputs
from rsvlm_infer.scenes.outputs.stac import EXTENSIONS, UNKNOWN_TIME
from tests.scenes.outputs.cases import ANTIMERIDIAN, LABELS, header, overview, records, text_of

ALL = ["geojson", "geoparquet", "quicklook", "html", "stac"]


def item(folder: Path, scene: Any, formats: list[str] | None = None, **options: Any) -> dict[str, Any]:
    paths = write_outputs(scene, records(scene.mode), folder, formats or ["stac"], name="x", read_overview=overview, **options)
    values: dict[str, Any] = json.loads(text_of(paths[-1]))
    return values


@pytest.mark.parametrize("mode", ["describe", "ask", "classify", "find"])
@pytest.mark.parametrize(
    "place", [{}, dict(zip(("crs", "transform"), ANTIMERIDIAN, strict=True)), {"crs": None, "transform": None}]
)
@pytest.mark.parametrize("acquired", [None, "2020-08-31T17:04:05Z"])
def test_the_item_meets_the_core_schema(mode: Any, place: dict[str, Any], acquired: str | None, tmp_path: Path) -> None:
    pystac = pytest.importorskip("pystac")
    pytest.importorskip("jsonschema")
    for module in ("pyarrow", "jinja2", "matplotlib"):
        pytest.importorskip(module)
    values = item(tmp_path, header(mode, **place), ALL + (["relevance"] if mode == "find" else []), acquired=acquired)
    from pystac.validation.local_validator import get_local_schema_cache

    jsonschema = pytest.importorskip("jsonschema")
    referencing = pytest.importorskip("referencing")
    schemas = get_local_schema_cache()
    registry = referencing.Registry().with_resources(
        (name, referencing.Resource.from_contents(schema)) for name, schema in schemas.items()
    )
    core = next(schema for name, schema in schemas.items() if name.endswith("item-spec/json-schema/item.json"))
    jsonschema.Draft7Validator(core, registry=registry).validate(values)
    read = pystac.Item.from_dict(values)
    assert read.to_dict()["properties"] == values["properties"]
    assert len(read.assets) == len(ALL) - 1 + (mode == "find") + 1
    for asset in (asset for name, asset in values["assets"].items() if name != "model"):
        assert (tmp_path / asset["href"]).is_file()


@pytest.mark.parametrize(
    ("mode", "task"),
    [
        ("describe", "image-captioning"),
        ("ask", "generative"),
        ("classify", "scene-classification"),
        ("find", "similarity-search"),
    ],
)
def test_the_model_extension_has_what_it_requires(mode: Any, task: str, tmp_path: Path) -> None:
    """The rules of the MLM schema 1.4.0 for items, which pystac does not bring."""
    values = item(tmp_path, header(mode))
    properties = values["properties"]
    assert values["stac_extensions"] == list(EXTENSIONS.values())
    assert re.match(r"^[a-zA-Z][a-zA-Z0-9_.\-\s]+[a-zA-Z0-9]$", properties["mlm:name"])
    assert properties["mlm:tasks"] == [task]
    for part, structure in (("mlm:input", "input"), ("mlm:output", "result")):
        for each in properties[part]:
            shape, order = each[structure]["shape"], each[structure]["dim_order"]
            assert len(shape) == len(order) == len(set(order))
            assert all(isinstance(length, int) and length >= -1 for length in shape)
            assert each[structure]["data_type"] in ("uint8", "float32", "other")
            assert "bands" not in order
    known = {"name", "architecture", "tasks", "input", "output", "hyperparameters"}
    assert {name for name in properties if name.startswith("mlm:")} == {f"mlm:{name}" for name in known}
    models = [asset for asset in values["assets"].values() if "mlm:model" in asset["roles"]]
    assert len(models) == 1
    assert models[0]["mlm:artifact_type"]
    assert models[0]["href"] == "urn:sha256:" + "a" * 64
    assert not any("mlm:artifact_type" in asset for asset in values["assets"].values() if asset is not models[0])
    parameters = properties["mlm:hyperparameters"]
    assert all(re.match(r"^[0-9a-zA-Z_.-]+$", name) for name in parameters)
    assert parameters.get("labels") == (sorted(LABELS) if mode == "classify" else None)


def test_pystac_reads_the_model_extension(tmp_path: Path) -> None:
    pystac = pytest.importorskip("pystac")
    mlm = pytest.importorskip("pystac.extensions.mlm")
    read = pystac.Item.from_dict(item(tmp_path, header("find"), model_href="https://example.org/model"))
    assert mlm.MLMExtension.has_extension(read)
    assert mlm.MLMExtension.ext(read).mlm_name == "RSVLM"
    assert read.assets["model"].href == "https://example.org/model"


def test_processing_projection_and_source(tmp_path: Path) -> None:
    from rsvlm_infer import __version__

    values = item(tmp_path, header("find"))
    properties = values["properties"]
    assert properties["processing:software"] == {"rsvlm-infer": __version__}
    assert properties["processing:lineage"].startswith("RSVLM in mode find on 11 windows; 10000 empty and 0 uniform pixels")
    assert properties["proj:code"] == "EPSG:32633"
    assert properties["proj:shape"] == [300, 400]
    assert properties["proj:transform"] == [10.0, 0.0, 500_000.0, 0.0, -10.0, 5_500_000.0]
    assert properties["gsd"] == 10.0
    (link,) = values["links"]
    assert link["rel"] == "derived_from"
    assert link["href"].endswith("scenes/Kiel%20F%C3%B6rde.tif")
    own = header("find", source="https://example.org/a.tif", crs="+proj=laea +lat_0=52 +lon_0=10 +ellps=GRS80")
    told = item(tmp_path, own)
    assert told["links"][0]["href"] == "https://example.org/a.tif"
    assert told["properties"]["proj:code"] is None
    assert told["properties"]["proj:projjson"]["type"] == "ProjectedCRS"


def test_time_is_the_acquisition_or_an_interval_that_holds_it(tmp_path: Path) -> None:
    unknown = item(tmp_path, header("find"))["properties"]
    assert unknown["datetime"] is None
    assert (unknown["start_datetime"], unknown["end_datetime"]) == UNKNOWN_TIME
    known = item(tmp_path, header("find"), acquired="2020-08-31T19:04:05+02:00")["properties"]
    assert known["datetime"] == "2020-08-31T17:04:05Z"
    assert "start_datetime" not in known
    own = header("find", acquired="2019-01-02T03:04:05+00:00")
    assert item(tmp_path, own)["properties"]["datetime"] == "2019-01-02T03:04:05Z"
    assert (
        item(tmp_path, own, acquired="2020-08-31")["properties"]["datetime"] == "2020-08-31T00:00:00Z"
    )  # who says it knows better
    with pytest.raises(InputError, match="acquired must be an ISO 8601 time, got 'last summer'"):
        item(tmp_path, header("find"), acquired="last summer")
