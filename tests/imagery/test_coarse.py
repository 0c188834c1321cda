"""The coarse copy equals means by a loop, every block is decoded once, and what is made of it shows the right ground."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsvlm_infer.errors import ImageReadError
from rsvlm_infer.imagery.coarse import (
    COARSE_BYTES,
    COARSE_CELLS,
    Blocks,
    Coarse,
    chunks,
    coarse_factor,
    overview_of,
)
from rsvlm_infer.imagery.complexity import ComplexityMap
from rsvlm_infer.imagery.pack import pack_scene
from rsvlm_infer.imagery.plan import plan_scene
from rsvlm_infer.imagery.source import open_scene
from tests.imagery.configs import imagery_config
from tests.ops.test_cell_means import by_loop, numbers

RNG = np.random.default_rng(3)


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.sampled_from([(1, None), (3, None), (16, None), (64, 64), (16, 256), (512, 512), (48, 80)]),
    st.sampled_from([2, 4, 8]),
    st.integers(1, 200),
)
def test_steps_cover_every_pixel_once_on_whole_cells_within_the_cache(
    height: int, width: int, block: tuple[int, int | None], factor: int, bands: int
) -> None:
    block_height, block_width = min(block[0], height), block[1] or width
    cache = max(1 << 18, 2 * block_height * block_width * 2 * bands)
    blocks = Blocks(block_height, block_width, 6, 2 * bands, cache)
    seen = np.zeros((height, width), np.uint8)
    for step in chunks(height, width, blocks, factor):
        assert step.row_off % factor == 0
        assert step.col_off % factor == 0
        seen[step.row_off : step.row_off + step.height, step.col_off : step.col_off + step.width] += 1
    assert (seen == 1).all()


def test_the_copy_keeps_its_size_whatever_the_raster() -> None:
    for height, width in ((6_000, 6_000), (20_000, 20_000), (200_000, 3_000), (400_000, 400_000)):
        for bands, itemsize in ((1, 1), (3, 2), (3, 8)):
            factor = coarse_factor(height, width, bands, itemsize)
            cells = -(-height // factor) * -(-width // factor)
            assert cells <= COARSE_CELLS
            assert cells * (bands * (itemsize + 1) + 3) <= COARSE_BYTES
            assert factor >= 2
    assert coarse_factor(20_000, 20_000, 3, 2) == 4


def test_an_overview_of_the_copy_is_the_mean_of_its_cells() -> None:
    values = numbers("uint16", 4000, (96, 80))[..., None]
    valid = np.ones(values.shape, bool)
    shown, seen = overview_of(Coarse(2, values, valid), 12, 10)
    expected, _ = by_loop(values[..., 0], valid[..., 0], 8)
    assert seen.all()
    assert np.abs(shown[..., 0].astype(float) - expected).max() <= 1.0  # rounded twice
    missing, seen = overview_of(Coarse(2, values, np.zeros_like(valid)), 12, 10)
    assert not seen.any()
    assert missing.shape == (12, 10, 1)


# --- rasters -----------------------------------------------------------------------------------------------------------------


LAYOUTS = {"tiled": {"tiled": True, "blockxsize": 64, "blockysize": 64}, "striped": {"tiled": False, "blockysize": 3}}


def write(path: Path, values: np.ndarray, **profile: Any) -> Path:
    rasterio = pytest.importorskip("rasterio")
    count, height, width = values.shape
    place = {"crs": "EPSG:32631", "transform": rasterio.transform.Affine(10, 0, 0, 0, -10, 0)}
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype=values.dtype, **place, **profile
    ) as file:
        file.write(values)
    return path


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every raster takes the way of large ones, in many steps."""
    monkeypatch.setattr("rsvlm_infer.imagery.geo.COARSE_FROM_PX", 0)
    monkeypatch.setattr("rsvlm_infer.imagery.coarse.CHUNK_BYTES", 20_000)
    monkeypatch.setattr("rsvlm_infer.imagery.pack.EXACT_SCENE_PX", 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("nodata", [None, 0, 60_000])
def test_a_raster_is_read_once_for_overview_stretch_plan_and_tiles(
    layout: str, nodata: int | None, tmp_path: Path, small_is_large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = RNG.integers(500, 3000, (4, 300, 420), dtype=np.uint16)
    if nodata is not None:
        values[:, :100, :150] = nodata
    path = write(tmp_path / "a.tif", values, nodata=nodata, compress="deflate", **LAYOUTS[layout])
    pixels_read: list[int] = []
    config = imagery_config("dris", tile_px=28, patch=14)
    with open_scene(path) as scene:
        reading = type(scene)._read_step  # type: ignore[attr-defined]

        def counted(self: Any, guard: Any, step: Any, cells: Any) -> Any:
            pixels_read.append(step.height * step.width)
            return reading(self, guard, step, cells)

        monkeypatch.setattr(type(scene), "_read_step", counted)
        rgb, mask = scene.overview()
        copy, factor = scene.coarse or (np.empty(0), 0)
        plan = plan_scene(300, 420, config, complexity=ComplexityMap(rgb, mask, config.dris))
        pack_scene(scene, plan, config)
        assert sum(pixels_read) == 300 * 420
        assert len(pixels_read) > 5
        valid = np.ones((300, 420), bool) if nodata is None else values[0] != nodata
        assert scene.stretch is not None
        for band in range(3):
            expected, found = by_loop(values[band], valid, factor)
            grey = scene.stretch.apply(
                np.floor(expected + 0.5).astype(np.uint16)[..., None].repeat(3, 2), np.ones((*found.shape, 3), bool)
            )
            assert (copy[..., band] == np.where(found, grey[..., band], 0)).all()
            low, high = np.percentile(values[band][valid], (2, 98))
            assert low <= scene.stretch.low[band] < scene.stretch.high[band] <= high  # means spread less
        assert mask.mean() == pytest.approx(valid.mean(), abs=0.02)


@pytest.mark.parametrize("chunk_bytes", [2_000, 1 << 25])
def test_each_band_misses_its_own_pixels(chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsvlm_infer.imagery.geo.COARSE_FROM_PX", 0)
    monkeypatch.setattr("rsvlm_infer.imagery.coarse.CHUNK_BYTES", chunk_bytes)
    values = RNG.integers(1, 3000, (3, 70, 90), dtype=np.uint16)
    values[0, :20, :20] = values[1, 30:60, 10:40] = values[2, 50:, 70:] = 0
    with open_scene(write(tmp_path / "a.tif", values, nodata=0, **LAYOUTS["tiled"])) as scene:
        copy = scene._read_coarse()
    for band in range(3):
        expected, found = by_loop(values[band], values[band] > 0, copy.factor)
        assert (copy.valid[..., band] == found).all()
        assert (copy.values[..., band] == np.floor(expected + 0.5)).all()


def test_float_rasters_with_gaps_and_mask_bands_go_the_same_way(tmp_path: Path, small_is_large: None) -> None:
    rasterio = pytest.importorskip("rasterio")
    values = RNG.normal(size=(1, 90, 110)).astype(np.float32)
    values[:, :20, :30] = np.nan
    mask = np.full((90, 110), 255, np.uint8)
    mask[60:, 80:] = 0
    path = write(tmp_path / "a.tif", values)
    with rasterio.open(path, "r+") as file:
        file.write_mask(mask)
    valid = np.isfinite(values[0]) & (mask > 0)
    with open_scene(path) as scene:
        assert scene._costly
        copy = scene._read_coarse()
        expected, found = by_loop(np.nan_to_num(values[0]), valid, copy.factor)
        assert (copy.valid[..., 0] == found).all()
        np.testing.assert_allclose(copy.values[..., 0][found], expected[found], rtol=1e-5, atol=1e-6)


def test_deep_tiles_are_still_read_natively(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.zeros((1, 512, 512), np.uint8)
    values[0, :64, :64] = RNG.integers(0, 2, (64, 64), dtype=np.uint8) * 255  # all there is to see lies in one corner
    path = write(tmp_path / "a.tif", values)
    config = imagery_config("dris", tile_px=28, patch=14)
    with open_scene(path, stretch="none") as scene:
        plan = plan_scene(512, 512, config, complexity=ComplexityMap(*scene.overview(), config.dris))
        native = pack_scene(scene, plan, config)
    monkeypatch.setattr("rsvlm_infer.imagery.geo.COARSE_FROM_PX", 0)
    monkeypatch.setattr("rsvlm_infer.imagery.pack.EXACT_SCENE_PX", 0)
    with open_scene(path, stretch="none") as scene:
        assert scene.coarse is not None
        packed = pack_scene(scene, plan, config)
    deep = [index for index, tile in enumerate(plan.tiles) if tile.height < 2 * tile.canvas[0]]
    assert deep
    for index in deep:
        tile = np.s_[packed.cu_seqlens[index] : packed.cu_seqlens[index + 1]]
        assert (packed.patches[tile] == native.patches[tile]).all()
    assert (packed.patches != native.patches).any()  # the base tile comes from the copy


def test_a_file_with_overviews_has_no_copy(tmp_path: Path, small_is_large: None) -> None:
    rasterio = pytest.importorskip("rasterio")
    path = write(tmp_path / "a.tif", RNG.integers(0, 255, (3, 256, 256), dtype=np.uint8), **LAYOUTS["tiled"])
    with rasterio.open(path, "r+") as file:
        file.build_overviews([2, 4], rasterio.enums.Resampling.average)
    with open_scene(path) as scene:
        assert scene.coarse is None


def test_a_block_beyond_the_memory_is_refused(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tif", np.zeros((4, 512, 512), np.uint16), tiled=True, blockxsize=512, blockysize=512, interleave="pixel"
    )
    message = r"stores 512 x 512 pixels in one block, 2 MiB .* max_ram_bytes=1,048,576; raise it to 4,194,304 \(--max-ram\)"
    with pytest.raises(ImageReadError, match=message):
        open_scene(path, max_ram_bytes=1 << 20)
    with open_scene(path, max_ram_bytes=4 << 20) as scene:
        assert scene.height == 512
