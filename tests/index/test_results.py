"""Finds as lines, GeoJSON and a contact sheet."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rsvlm_infer.errors import InputError
from rsvlm_infer.index.results import (
    CARD_PX,
    GROUND,
    MARGIN_PX,
    contact_sheet,
    hit_line,
    hit_values,
    results_geojson,
    write_results,
)
from rsvlm_infer.index.search import Hit, SearchResult
from tests.index.archives import scene

UTM = {"crs": "EPSG:32660", "transform": (1000.0, 0.0, 700_000.0, 0.0, -1000.0, 5_500_000.0)}


def hit(
    source: Path | str = "gone.png", score: float = 0.5, window: Any = (10, 20, 30, 60), bbox: Any = None, **changes: Any
) -> Hit:
    record = scene("x", **{"source": str(source), "num_views": 1, **changes})
    return Hit(score, "region", record, window, (0, 0, 100, 200), bbox, "000001/0")


def test_lines_and_values() -> None:
    found = hit("/a/b.tif", 0.123456789, bbox=(179.0, 10.0, -178.0, 12.0), acquired="2020-05-06T07:08:09+00:00")
    assert hit_line(found) == "0.1235\t/a/b.tif\trow 10 column 20 30 x 60\t2020-05-06\t11.00000 -179.50000"
    assert hit_line(hit()) == "0.5000\tgone.png\trow 10 column 20 30 x 60\t-\t-"
    values = hit_values(found)
    assert values["score"] == 0.123457
    assert (values["row_off"], values["col_off"], values["height"], values["width"]) == (10, 20, 30, 60)
    assert values["bbox"] == [179.0, 10.0, -178.0, 12.0]
    json.dumps(values)


def test_geojson_has_true_places_and_nulls() -> None:
    pytest.importorskip("rasterio")
    result = SearchResult([hit(**UTM, score=0.75, window=(10, 0, 30, 60)), hit(window=(0, 0, 5, 5))], 2, 0)
    collection = json.loads(results_geojson(result, 'a "city"'))
    assert collection["query"] == 'a "city"'
    first, second = collection["features"]
    assert first["geometry"]["type"] == "MultiPolygon", "it crosses the antimeridian"
    assert first["bbox"][0] > first["bbox"][2]
    assert first["properties"]["rank"] == 1
    assert first["properties"]["score"] == 0.75
    assert second["geometry"] is None
    assert "bbox" not in second


@pytest.mark.parametrize("place", [{}, UTM])
def test_geojson_meets_its_schema(place: dict[str, Any]) -> None:
    pytest.importorskip("rasterio")
    pytest.importorskip("pystac")
    jsonschema = pytest.importorskip("jsonschema")
    from pystac.validation.local_validator import get_local_schema_cache

    schema = next(
        schema for name, schema in get_local_schema_cache().items() if name.endswith("geojson.org/schema/Feature.json")
    )
    for feature in json.loads(results_geojson(SearchResult([hit(**place)], 1, 0), "x"))["features"]:
        jsonschema.Draft7Validator(schema).validate(feature)


def test_the_contact_sheet_shows_what_was_found(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[10:40, 20:80] = (200, 20, 20)
    pixels[60:90, 100:130] = (20, 20, 200)
    file = tmp_path / "a.png"
    Image.fromarray(pixels).save(file)
    changed = tmp_path / "changed.png"
    Image.fromarray(pixels[:50]).save(changed)
    hits = [hit(file), hit(file, window=(60, 100, 30, 30)), hit(), hit(changed), hit(file), hit(file, gsd_native_m=40.0)]
    with Image.open(io.BytesIO(contact_sheet(SearchResult(hits, 6, 0), "ships"))) as sheet:
        page = sheet.convert("RGB")
    top = next(row for row in range(page.height) if page.getpixel((MARGIN_PX + 5, row)) == (200, 200, 194)) + 1

    def middle(card: int, row: float = 0.5) -> Any:
        return page.getpixel((MARGIN_PX + card * (CARD_PX + MARGIN_PX) + CARD_PX // 2, top + round(CARD_PX * row)))

    assert middle(0) == (200, 20, 20)
    assert middle(0, 0.1) == GROUND, "a wide window leaves room above and below"
    assert middle(1) == (20, 20, 200)
    assert middle(1, 0.05) == (20, 20, 200)
    assert middle(2, 0.2) == middle(3, 0.2) == GROUND, "a file that is gone or has changed shows nothing"
    assert page.height > top + 2 * CARD_PX


def test_files_are_written_by_their_suffix(tmp_path: Path) -> None:
    pytest.importorskip("rasterio")
    result = SearchResult([hit()], 1, 0)
    write_results(tmp_path / "new" / "hits.geojson", result, "x")
    assert json.loads((tmp_path / "new" / "hits.geojson").read_text())["features"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["hits.geojson"]
    with pytest.raises(InputError, match=r"--output .*hits\.csv must end in one of"):
        write_results(tmp_path / "hits.csv", result, "x")
    with pytest.raises(InputError, match=r"--output .* cannot be written"):
        write_results(tmp_path / "new" / "hits.geojson" / "x.geojson", result, "x")


def test_an_empty_result_is_an_empty_sheet_and_an_empty_collection() -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("rasterio")
    nothing = SearchResult([], 0, 0)
    assert json.loads(results_geojson(nothing, "x"))["features"] == []
    with Image.open(io.BytesIO(contact_sheet(nothing, "x"))) as sheet:
        assert sheet.width > 600
