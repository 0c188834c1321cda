"""A scene file becomes embeddings with places: the whole as the model sees it, a large one in windows that cover it once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rsvlm_infer.errors import ImageReadError, InputError
from rsvlm_infer.index.encode import EncodeSettings, content_hash, grid, opened
from rsvlm_infer.index.segment import EncodedView
from rsvlm_infer.pipeline import RSVLM
from rsvlm_infer.tasks.scene import SceneSettings
from tests.tasks.telling_model import COLOURS, TellingBackend, load_tokenizer, picture

HEIGHT, WIDTH = 60, 90


@pytest.fixture
def model(tmp_path: Path) -> RSVLM:
    return RSVLM(TellingBackend(), load_tokenizer(tmp_path / "tokenizer"))


def encoded(file: Path, model: RSVLM, **settings: Any) -> tuple[Any, list[EncodedView]]:
    scene = settings.pop("scene", SceneSettings())
    with opened(file, content_hash(file), model, EncodeSettings(scene, **settings)) as found:
        return found.record, list(found.views())


def patchwork() -> np.ndarray:
    """Two by three blocks of 30 pixels in three colours."""
    colours = np.array(
        [[COLOURS["red"], COLOURS["green"], COLOURS["blue"]], [COLOURS["blue"], COLOURS["red"], COLOURS["green"]]], np.uint8
    )
    return colours.repeat(30, axis=0).repeat(30, axis=1)


def test_a_small_scene_is_one_view_with_the_embeddings_of_the_pipeline(model: RSVLM, tmp_path: Path) -> None:
    file = tmp_path / "red.png"
    Image.fromarray(picture("red", 40, 50)).save(file)
    for tiling in ("fixed", "dris"):
        scene = SceneSettings(tiling=tiling)
        record, (view,) = encoded(file, model, scene=scene)
        truth = model.embed_levels(str(file), tiling=tiling)
        for level in ("object", "region", "scene"):
            np.testing.assert_array_equal(getattr(view, level), getattr(truth, level))
        assert view.window == (0, 0, 40, 50)
        assert view.tiles[0] == (0, 0, 40, 50)
        assert len(view.tiles) == len(view.region) == len(view.bboxes) - 1
        assert (record.height, record.width, record.source) == (40, 50, str(file))


def test_a_large_scene_is_cut_into_windows_that_cover_it_once(model: RSVLM, tmp_path: Path) -> None:
    file = tmp_path / "patchwork.png"
    Image.fromarray(patchwork()).save(file)
    _, views = encoded(file, model, window_px=30, batch_size=4)
    assert [view.window for view in views] == [(row, col, 30, 30) for row in (0, 30) for col in (0, 30, 60)]
    assert [int(view.scene.argmax()) for view in views] == [0, 1, 2, 2, 0, 1]
    assert [view.tiles[0] for view in views] == [view.window for view in views]


def test_a_tile_lies_where_its_plan_says(model: RSVLM, tmp_path: Path) -> None:
    file = tmp_path / "patchwork.png"
    Image.fromarray(np.kron(patchwork(), np.ones((4, 4, 1), np.uint8))).save(file)
    _, views = encoded(file, model, window_px=240, scene=SceneSettings(tiling="dris"))
    assert len(views) == 2
    plan = model.plan(str(file), tiling="dris").plan
    _, (whole,) = encoded(file, model, window_px=1000, scene=SceneSettings(tiling="dris"))
    assert whole.tiles[1:] == tuple((tile.row_off, tile.col_off, tile.height, tile.width) for tile in plan.tiles[1:])
    for view in views:
        row, col, height, width = view.window
        for top, left, tall, wide in view.tiles:
            assert row <= top < top + tall <= row + height
            assert col <= left < left + wide <= col + width


@pytest.mark.parametrize(
    ("height", "width", "window_px"), [(1, 1, 1), (100, 200, 1024), (1025, 10, 1024), (997, 1009, 64), (5, 7, 3)]
)
def test_windows_cover_a_scene_once_and_are_alike(height: int, width: int, window_px: int) -> None:
    covered = np.zeros((height, width), np.int32)
    windows = grid(height, width, window_px)
    for window in windows:
        covered[window.row_off : window.row_off + window.height, window.col_off : window.col_off + window.width] += 1
    assert (covered == 1).all()
    for sides in ([window.height for window in windows], [window.width for window in windows]):
        assert max(sides) <= window_px
        assert max(sides) - min(sides) <= 1


def raster(file: Path, values: np.ndarray, **profile: Any) -> Path:
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(
        file,
        "w",
        driver="GTiff",
        height=values.shape[0],
        width=values.shape[1],
        count=3,
        dtype="uint8",
        photometric="RGB",
        **profile,
    ) as made:
        made.write(values.transpose(2, 0, 1))
        made.update_tags(TIFFTAG_DATETIME="2019:07:08 09:10:11")
    return file


def test_places_dates_and_ground_distance_come_from_the_raster(model: RSVLM, tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    from rasterio.warp import transform

    file = raster(
        tmp_path / "utm.tif", patchwork(), crs="EPSG:32633", transform=rasterio.Affine(10, 0, 500_000, 0, -10, 5_500_000)
    )
    record, views = encoded(file, model, window_px=30)
    assert record.acquired == "2019-07-08T09:10:11+00:00"
    assert record.gsd_native_m == 10.0
    (lon,), (lat,) = transform("EPSG:32633", "EPSG:4326", [500_000 + 75 * 10], [5_500_000 - 45 * 10])
    west, south, east, north = views[5].bboxes[0] or pytest.fail("it has a place")
    assert (west + east) / 2 == pytest.approx(lon, abs=1e-6)
    assert (south + north) / 2 == pytest.approx(lat, abs=1e-6)
    assert views[5].bboxes[1] == views[5].bboxes[0], "the base tile is the window"
    assert views[5].gsd_effective_m == pytest.approx(10 * 30 / 28)


def test_windows_without_anything_valid_are_left_out(model: RSVLM, tmp_path: Path) -> None:
    values = patchwork()
    values[:, 30:60] = 0
    values[:15, 60:] = 0
    file = raster(tmp_path / "holes.tif", values, nodata=0)
    _, views = encoded(file, model, window_px=30)
    assert [view.window[:2] for view in views] == [(0, 0), (0, 60), (30, 0), (30, 60)]
    assert int(views[1].scene.argmax()) == 2, "the masked half does not darken the other"
    empty = raster(tmp_path / "empty.tif", np.zeros_like(values), nodata=0)
    with pytest.raises(ImageReadError, match="no valid pixel"):
        encoded(empty, model, window_px=30)
    with pytest.raises(ImageReadError, match="no valid pixel"):
        encoded(empty, model)


def test_the_content_hash_sees_pixels_and_what_lies_beside(tmp_path: Path) -> None:
    file = tmp_path / "a.tif"
    file.write_bytes(b"pixels")
    first = content_hash(file)
    assert len(first) == 64
    copy = tmp_path / "copy.tif"
    copy.write_bytes(b"pixels")
    assert content_hash(copy) == first
    (tmp_path / "a.tfw").write_text("1\n0\n0\n-1\n0\n0\n")
    beside = content_hash(file)
    assert beside != first
    (tmp_path / "a.tif.aux.xml").write_text("<x/>")
    assert content_hash(file) not in (first, beside)
    copy.write_bytes(b"pixelz")
    assert content_hash(copy) != first
    with pytest.raises(ImageReadError, match=r"none\.tif cannot be read .No such file"):
        content_hash(tmp_path / "none.tif")


def test_settings_are_checked_and_told() -> None:
    with pytest.raises(InputError, match="window_px must be at least 1, got 0"):
        EncodeSettings(SceneSettings(), window_px=0)
    with pytest.raises(InputError, match="batch_size must be at least 1, got -1"):
        EncodeSettings(SceneSettings(), batch_size=-1)
    one = EncodeSettings(SceneSettings(bands=(3, 2, 1), max_pixels=5), batch_size=2).encoding
    assert one == EncodeSettings(SceneSettings(bands=(3, 2, 1)), batch_size=9).encoding
    assert one["bands"] == [3, 2, 1]
    assert one != EncodeSettings(SceneSettings(bands=(3, 2, 1)), window_px=9).encoding
