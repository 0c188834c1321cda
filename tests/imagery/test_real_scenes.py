"""Real files of the shared data folder: right values, one clear line for each bad file, bounded memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsvlm_infer.errors import ImageReadError
from rsvlm_infer.imagery.complexity import ComplexityMap
from rsvlm_infer.imagery.pack import pack_scene
from rsvlm_infer.imagery.plan import count_tokens, plan_scene
from rsvlm_infer.imagery.source import open_scene
from tests.imagery.configs import imagery_config
from tests.imagery.memory import peak_mib

rasterio = pytest.importorskip("rasterio")
pytestmark = [pytest.mark.data, pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")]

# name -> size, shown bands, ground metres, share of valid pixels in the overview
READABLE: dict[str, tuple[tuple[int, int], tuple[int, ...], float | None, float]] = {
    "4band_test.tif": ((1024, 1024), (1, 2, 3), 8.269, 1.0),
    "5b90f92da0d7280005fab355_4310.tif": ((2048, 2048), (1, 2, 3), 0.0968, 1.0),
    "RGBA.uint16.tif": ((411, 634), (3, 2, 1), 1.3797, 0.489),
    "above_cog.tif": ((1800, 1800), (1, 2, 3), 100.0, 0.207),
    "alpha.tif": ((1223, 1223), (1, 2, 3), 3.0855, 0.016),
    "cog.tif": ((2667, 2658), (1,), 100.011, 1.0),
    "cog_cmap.tif": ((8704, 7168), (1,), 0.917, 0.557),
    "cog_dateline.tif": ((2355, 2325), (1,), 100.013, 1.0),
    "cog_gcps.tif": ((837, 1280), (1,), 201.8, 1.0),
    "cog_nodata.tif": ((2667, 2658), (1,), 100.011, 0.52),
    "cog_world.tif": ((18000, 36000), (1,), 1109.5, 0.35),
    "float_nan.tif": ((2, 3), (1,), None, 5 / 6),
    "image_webp.tif": ((512, 512), (1, 2, 3), 1.1467, 1.0),
    "landsat8_tokyo_rgb_uint16.tif": ((1578, 1550), (1, 2, 3), 150.019, 0.682),
    "m_4709963_se_14_1_20090818.tif": ((724, 934), (1, 2, 3), 5.0, 1.0),
    "m_4709963_se_14_1_20200831.tif": ((723, 934), (1, 2, 3), 5.0, 1.0),
    "nocog.tif": ((2667, 2658), (1,), 100.011, 1.0),
    "sentinel2_8band_2629x2201.tif": ((2201, 2629), (4, 3, 2), 8.218, 1.0),
    "umbra_mount_yasur.tiff": ((2000, 2000), (1,), 0.5942, 1.0),
}
DAMAGED = {
    "corrupt.TIF": "not a JPEG, PNG, WebP, TIFF, GIF or BMP image",  # 18 bytes
    "corrupt.tif": "IReadBlock failed",
    "invalid.tif": r"is empty \(0 bytes\)",
    "slc.tif": r"complex values \(complex_int16\)",
    "zero_gi.tif": "zero number of strips",
}


@pytest.fixture(scope="module")
def geotiff(data_root: Path) -> Path:
    folder = data_root / "geotiff"
    if not folder.is_dir():
        pytest.skip("the shared data folder has no geotiff/")
    return folder


def test_every_file_is_listed_here(geotiff: Path) -> None:
    assert {path.name for path in geotiff.iterdir()} == READABLE.keys() | DAMAGED.keys()


@pytest.mark.parametrize("name", READABLE)
def test_readable_files_give_the_right_scene(name: str, geotiff: Path) -> None:
    shape, bands, gsd, valid = READABLE[name]
    if name == "image_webp.tif" and not _has_codec(geotiff / name):
        pytest.skip("this GDAL has no WEBP codec")
    with open_scene(geotiff / name) as scene:
        assert (scene.height, scene.width) == shape
        assert scene._bands == bands  # type: ignore[attr-defined]
        assert scene.gsd_native_m == (None if gsd is None else pytest.approx(gsd, rel=1e-3))
        rgb, mask = scene.overview()
        assert max(rgb.shape[:2]) == min(1024, max(shape))
        assert mask.mean() == pytest.approx(valid, abs=2e-3)
        config = imagery_config("dris", tile_px=224)
        plan = plan_scene(*shape, config, complexity=ComplexityMap(rgb, mask, config.dris))
        packed = pack_scene(scene, plan, config)
    assert np.isfinite(packed.patches).all()
    assert packed.num_tokens == count_tokens(plan, config) <= config.dris.max_visual_tokens


def _has_codec(path: Path) -> bool:
    try:
        with rasterio.open(path):
            return True
    except rasterio.errors.RasterioIOError:
        return False


@pytest.mark.parametrize("name", DAMAGED)
def test_bad_files_give_one_clear_line(name: str, geotiff: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = imagery_config("fixed", tile_px=224)

    def read() -> None:
        with open_scene(geotiff / name) as scene:
            pack_scene(scene, plan_scene(scene.height, scene.width, config), config)

    with pytest.raises(ImageReadError, match=DAMAGED[name]) as caught:
        read()
    assert str(geotiff / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # GDAL keeps quiet


def test_known_windows_have_the_files_values(geotiff: Path) -> None:
    for name in ("5b90f92da0d7280005fab355_4310.tif", "image_webp.tif"):  # 8-bit RGB: as it is
        with rasterio.open(geotiff / name) as dataset, open_scene(geotiff / name) as scene:
            expected = dataset.read(window=((100, 180), (60, 190))).transpose(1, 2, 0)
            assert (scene.read(100, 60, 80, 130)[0] == expected).all()
    for name, bands in (("landsat8_tokyo_rgb_uint16.tif", [1, 2, 3]), ("sentinel2_8band_2629x2201.tif", [4, 3, 2])):
        with rasterio.open(geotiff / name) as dataset, open_scene(geotiff / name) as scene:
            raw = dataset.read(bands, window=((700, 800), (900, 1000))).transpose(1, 2, 0).astype(float)
            assert scene.stretch is not None
            low, high = np.array(scene.stretch.low), np.array(scene.stretch.high)
            rgb, mask = scene.read(700, 900, 100, 100)
            expected = np.clip(np.floor((raw - low) / (high - low) * 255 + 0.5), 0, 255)
            assert np.abs(rgb[mask] - expected[mask]).max() <= 1  # a .5 may fall to either side
            assert mask.mean() > 0.99


def test_a_palette_shows_its_colours(geotiff: Path) -> None:
    with rasterio.open(geotiff / "cog_cmap.tif") as dataset, open_scene(geotiff / "cog_cmap.tif") as scene:
        colours = dataset.colormap(1)
        classes = dataset.read(1, window=((4000, 4100), (3000, 3100)))
        rgb, mask = scene.read(4000, 3000, 100, 100)
    assert (rgb == np.array([colours[value][:3] for value in classes.ravel()]).reshape(100, 100, 3)).all()
    assert (mask == (classes != 0)).all()


def test_landsats_slanted_collar_does_not_move_the_stretch(geotiff: Path) -> None:
    path = geotiff / "landsat8_tokyo_rgb_uint16.tif"
    with rasterio.open(path) as dataset, open_scene(path) as scene:
        values = dataset.read()
        assert scene.stretch is not None
        for band, low, high in zip(values, scene.stretch.low, scene.stretch.high, strict=True):
            expected_low, expected_high = np.percentile(band[band > 0], (2, 98))
            assert low == pytest.approx(expected_low, rel=0.05)  # of the overview, which is a little smoother
            assert high == pytest.approx(expected_high, rel=0.05)
            assert np.percentile(band, 2) == 0  # an unmasked stretch would start here
        overview, mask = scene.overview()
        assert not overview[~mask].any()


def test_a_change_pair_reads_alike(geotiff: Path) -> None:
    scenes = [geotiff / f"m_4709963_se_14_1_{day}.tif" for day in ("20090818", "20200831")]
    distances = []
    for path in scenes:
        with open_scene(path, stretch="none") as scene, rasterio.open(path) as dataset:
            assert (scene.read(0, 0, 700, 900)[0] == dataset.read([1, 2, 3])[:, :700, :900].transpose(1, 2, 0)).all()
            distances.append(scene.gsd_native_m)
    assert distances[0] == pytest.approx(distances[1])


def test_the_large_photo_equals_the_clip_processor(data_root: Path) -> None:
    processing = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = processing.CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    path = data_root / "floodnet_7292_4592x3072.jpg"
    expected = processor(Image.open(path), return_tensors="np")["pixel_values"][0]
    config = imagery_config("fixed", fit="crop")
    scene = open_scene(path)
    packed = pack_scene(scene, plan_scene(scene.height, scene.width, config), config)
    pixels = packed.patches.reshape(24, 24, 3, 14, 14).transpose(2, 0, 3, 1, 4).reshape(3, 336, 336)
    np.testing.assert_allclose(pixels, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["cog_world.tif", "sentinel2_8band_2629x2201.tif", "cog_cmap.tif"])
@pytest.mark.parametrize("longest_plan", [False, True])
def test_memory_stays_bounded(name: str, longest_plan: bool, geotiff: Path, repository: Path) -> None:
    assert max(peak_mib(geotiff / name, repository, longest_plan).values()) < 512
