"""The coarse copy equals means by a loop, every block is decoded once, and what is made of it shows the right ground."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
    Chunk,
    Coarse,
    apart,
    chunks,
    coarse_factor,
    grey_of,
    make_coarse,
    overview_of,
    pass_threads,
)
from rsvlm_infer.imagery.complexity import ComplexityMap
from rsvlm_infer.imagery.pack import pack_scene
from rsvlm_infer.imagery.plan import plan_scene
from rsvlm_infer.imagery.radiometry import Stretch
from rsvlm_infer.imagery.source import _shown, open_scene
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


@given(
    st.integers(1, 600),
    st.integers(1, 600),
    st.sampled_from([(1, None), (3, None), (16, None), (64, 64), (16, 256), (48, 80)]),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([1 << 12, 1 << 16, 1 << 22]),
)
def test_runs_of_steps_have_no_block_in_common(
    height: int, width: int, block: tuple[int, int | None], factor: int, cache: int
) -> None:
    blocks = Blocks(min(block[0], height), block[1] or width, 6, 8, cache)
    spans = list(apart(chunks(height, width, blocks, factor), blocks))
    assert list(itertools.chain(*spans)) == list(chunks(height, width, blocks, factor))
    touched: set[tuple[int, int]] = set()
    for span in spans:
        own = {
            (row, col)
            for step in span
            for row in range(step.row_off // blocks.height, -(-(step.row_off + step.height) // blocks.height))
            for col in range(step.col_off // blocks.width, -(-(step.col_off + step.width) // blocks.width))
        }
        assert not own & touched
        touched |= own


@given(st.integers(1, 200), st.integers(1 << 10, 1 << 24), st.integers(1 << 20, 1 << 30))
def test_threads_share_the_memory_and_the_cores(cores: int, cache_bytes: int, most_bytes: int) -> None:
    blocks = Blocks(512, 512, 6, 8, 1 << 26)
    spans = [[Chunk(512 * row, 0, 512, 1024)] for row in range(40)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rsvlm_infer.imagery.coarse.num_threads", lambda: cores)
        threads = pass_threads(spans, blocks, cache_bytes, most_bytes)
    held = cache_bytes + 512 * 1024 * 6
    assert 1 <= threads <= min(cores, 40)
    assert threads == 1 or threads * held <= most_bytes
    assert threads == min(cores, 40) or (threads + 1) * held > most_bytes


def test_a_reader_that_fails_stops_the_others() -> None:
    """None of them goes through the rest of a large raster first."""
    read: list[int] = []
    gone = threading.Event()

    def take(step: Chunk, cells: Any) -> None:
        read.append(step.row_off)
        if step.row_off == 2:
            gone.set()
            raise ImageReadError("a.tif ends here")
        assert gone.wait(10)
        cells[:] = 1

    @contextmanager
    def reader() -> Iterator[Any]:
        yield take

    spans = [[Chunk(row, 0, 2, 8)] for row in range(0, 2000, 2)]
    with pytest.raises(ImageReadError, match="ends here"):
        make_coarse(2000, 8, 1, np.dtype(np.uint8), 2, spans, [reader, reader, reader])
    assert len(read) < 100


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("bands", [1, 3])
def test_grey_levels_of_a_copy_are_those_of_any_pixels(dtype: str, bands: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsvlm_infer.imagery.coarse.PART_BYTES", 1000)
    values = numbers(dtype, 250, (bands, 90, 70))
    valid = RNG.random((bands, 90, 70)) < 0.8

    @contextmanager
    def reader() -> Iterator[Any]:
        def take(step: Chunk, cells: Any) -> Any:
            cells[:] = values[:, step.row_off : step.row_off + step.height]
            return np.ascontiguousarray(valid[:, step.row_off : step.row_off + step.height])

        yield take

    for stretch in (Stretch((20.0,) * bands, (200.0,) * bands), None):
        if stretch is None and dtype != "uint8":
            continue
        for readers in (1, 3):
            spans = [[Chunk(row, 0, 10, 70)] for row in range(0, 90, 10)]
            copy = make_coarse(90, 70, bands, values.dtype, 2, spans, [reader] * readers)
            expected, _ = _shown(copy.values, copy.valid, stretch)
            grey = grey_of(copy, stretch)
            assert grey.flags.c_contiguous
            assert (grey == expected).all()
            assert np.shares_memory(grey, copy.valid) == (bands == 3)


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

        def counted(self: Any, dataset: Any, guard: Any, turn: Any, step: Any, cells: Any) -> Any:
            pixels_read.append(step.height * step.width)
            return reading(self, dataset, guard, turn, step, cells)

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


def everything(source: Any, max_ram_bytes: int = 1 << 26) -> list[np.ndarray]:
    """What a scene makes of its one pass."""
    with open_scene(source, max_ram_bytes=max_ram_bytes) as scene:
        copy = scene._read_coarse()
        shown, factor = scene.coarse or (np.empty(0), 0)
        stretch = scene.stretch or Stretch((0.0,), (1.0,))
        return [copy.values, copy.valid, shown, np.array(factor), *scene.overview(), np.array([stretch.low, stretch.high])]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", ["nodata", "band", "none"])
def test_neither_threads_nor_memory_change_a_bit(
    layout: str, mask: str, tmp_path: Path, small_is_large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rasterio = pytest.importorskip("rasterio")
    values = RNG.integers(1, 3000, (4, 500, 420), dtype=np.uint16)
    values[:, 100:260, :150] = 0
    path = write(tmp_path / "a.tif", values, nodata=0 if mask == "nodata" else None, compress="deflate", **LAYOUTS[layout])
    if mask == "band":
        with rasterio.open(path, "r+") as file:
            file.write_mask((values[0] > 0).astype(np.uint8) * 255)
    found = []
    for threads, max_ram_bytes in ((1, 1 << 26), (2, 1 << 26), (5, 1 << 26), (5, 1 << 20), (64, 1 << 22)):
        monkeypatch.setattr("rsvlm_infer.imagery.coarse.num_threads", lambda threads=threads: threads)
        found.append(everything(path, max_ram_bytes))
    with rasterio.open(path) as dataset:  # its handle is the only one: threads take turns
        found.append(everything(dataset))
    with rasterio.MemoryFile(path.read_bytes()) as memory, memory.open() as dataset:
        found.append(everything(dataset))
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert np.array_equal(one, same)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc counts the bytes")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_read_no_block_twice(
    layout: str, tmp_path: Path, small_is_large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.tif", RNG.integers(1, 3000, (3, 1200, 1100), dtype=np.uint16), nodata=0, **LAYOUTS[layout])
    monkeypatch.setattr("rsvlm_infer.imagery.coarse.num_threads", lambda: 4)

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])

    with open_scene(path) as scene:
        before = bytes_read()
        assert scene.coarse is not None
        assert (
            bytes_read() - before < 1.1 * path.stat().st_size
        )  # a twentieth is the beginning of the file, once for each handle


@pytest.mark.parametrize("threads", [1, 3])
def test_a_damaged_block_is_one_clear_error(
    threads: int, tmp_path: Path, small_is_large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(
        tmp_path / "a.tif", RNG.integers(1, 3000, (3, 500, 420), dtype=np.uint16), compress="deflate", **LAYOUTS["tiled"]
    )
    whole = bytearray(path.read_bytes())
    middle = len(whole) // 2
    whole[middle : middle + 5000] = bytes(5000)
    path.write_bytes(whole)
    monkeypatch.setattr("rsvlm_infer.imagery.coarse.num_threads", lambda: threads)
    with (
        open_scene(path) as scene,
        pytest.raises(ImageReadError, match=r"a\.tif cannot be read as a raster .* restore the file"),
    ):
        scene.overview()


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
