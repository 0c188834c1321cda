"""Real rasters of many kinds: what can be opened gets every file, in the place where GDAL and PROJ put it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsvlm_infer.errors import ImageReadError
from rsvlm_infer.imagery.source import open_scene
from rsvlm_infer.scenes.outputs import FORMATS, Overview, write_outputs
from rsvlm_infer.scenes.record import GridWindow, PixelWindow, SceneHeader, WindowRecord
from tests.scenes.outputs.cases import header

UNREADABLE = {"corrupt.TIF", "invalid.tif", "slc.tif", "zero_gi.tif"}
DAMAGED = {"corrupt.tif"}  # in one block, which a coarse read need not meet
ACROSS = {"cog_dateline.tif"}  # geopandas does not cut at the antimeridian


def described(path: Path) -> tuple[SceneHeader, Overview]:
    with open_scene(path) as scene:
        return header(
            "find",
            source=str(path),
            height=scene.height,
            width=scene.width,
            count=scene.count,
            dtype=scene.dtype,
            crs=scene.crs,
            transform=scene.transform,
            gsd_native_m=scene.gsd_native_m,
            empty_px=0,
        ), Overview(*scene.overview(256))


def quarters(height: int, width: int) -> list[WindowRecord]:
    rows, cols = [0, max(1, height // 2), height], [0, max(1, width // 2), width]
    windows = [
        PixelWindow(rows[i], cols[j], rows[i + 1] - rows[i], cols[j + 1] - cols[j])
        for i in (0, 1)
        for j in (0, 1)
        if rows[i + 1] > rows[i] and cols[j + 1] > cols[j]
    ]
    return [WindowRecord(place=GridWindow(index, window, window), score=index / 8) for index, window in enumerate(windows)]


@pytest.mark.slow
@pytest.mark.data
def test_every_raster_gets_its_files_or_one_sentence(data_root: Path, tmp_path: Path) -> None:
    pytest.importorskip("rasterio")
    geopandas = pytest.importorskip("geopandas")
    shapely = pytest.importorskip("shapely")
    for module in ("pyarrow", "jinja2", "matplotlib"):
        pytest.importorskip(module)
    refused: dict[str, str] = {}
    placed = 0
    for path in sorted((data_root / "geotiff").iterdir()):
        try:
            scene, overview = described(path)
        except ImageReadError as error:
            refused[path.name] = str(error)
            continue
        files = write_outputs(
            scene,
            quarters(scene.height, scene.width),
            tmp_path,
            FORMATS,
            name=path.name,
            read_overview=lambda _, found=overview: found,
        )
        assert len(files) == len(FORMATS)
        own, world = geopandas.read_parquet(files[1]), geopandas.read_file(files[0])
        assert own.geometry.is_valid.all(), path.name
        if scene.crs is None:
            assert world.geometry.isna().all(), path.name
            continue
        assert world.geometry.is_valid.all(), path.name
        if path.name not in ACROSS:
            placed += 1
            west, south, east, north = own.total_bounds
            bent = own.geometry.segmentize(max(east - west, north - south) / 256).to_crs(4326)
            assert shapely.area(world.geometry.values) == pytest.approx(shapely.area(bent.values), rel=1e-3), path.name
    assert UNREADABLE <= set(refused) <= UNREADABLE | DAMAGED
    assert not any("\n" in words for words in refused.values())
    assert placed >= 14
