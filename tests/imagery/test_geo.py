"""Rasters through rasterio: bands, masks, stretch, ground metres, overviews; generated files, so no data folder is needed."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsvlm_infer.errors import ImageReadError, InputError
from rsvlm_infer.imagery.source import open_scene

rasterio = pytest.importorskip("rasterio")
from rasterio.crs import CRS  # noqa: E402
from rasterio.enums import ColorInterp, Resampling  # noqa: E402
from rasterio.transform import Affine  # noqa: E402

from rsvlm_infer.imagery.geo import default_bands, ground_sampling_distance  # noqa: E402
from tests.imagery.memory import peak_mib  # noqa: E402

RNG = np.random.default_rng(11)
UTM = {"crs": "EPSG:32631", "transform": Affine(10, 0, 500_000, 0, -10, 5_000_000)}


def write(path: Path, values: np.ndarray, *, colors: Any = None, names: Any = None, mask: Any = None, **profile: Any) -> Path:
    """values: [C, H, W]."""
    profile = {"driver": "GTiff", "dtype": values.dtype, "count": len(values), **UTM, **profile}
    with rasterio.open(path, "w", height=values.shape[1], width=values.shape[2], **profile) as dataset:
        dataset.write(values)
        if colors is not None:
            dataset.colorinterp = colors
        for index, text in enumerate(names or ()):
            dataset.set_band_description(index + 1, text)
        if mask is not None:
            dataset.write_mask(mask)
    return path


def read_all(source: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    with open_scene(source, **options) as scene:
        return scene.read(0, 0, scene.height, scene.width)


# --- bands and values --------------------------------------------------------------------------------------------------------


def test_8_bit_rgb_passes_through_unchanged_by_every_door(tmp_path: Path) -> None:
    values = RNG.integers(0, 256, (3, 40, 50), dtype=np.uint8)
    path = write(tmp_path / "a.tif", values)
    for source in (path, str(path), path.read_bytes()):
        rgb, mask = read_all(source)
        assert (rgb == values.transpose(1, 2, 0)).all()
        assert mask.all()
    with rasterio.open(path) as dataset:
        assert (read_all(dataset)[0] == values.transpose(1, 2, 0)).all()
        assert not dataset.closed  # the caller's dataset stays the caller's
        scene = open_scene(dataset)
    with pytest.raises(InputError, match="is closed"):
        scene.read(0, 0, 1, 1)
    with pytest.raises(InputError, match="is closed"):
        open_scene(dataset)
    with rasterio.MemoryFile() as memory, pytest.raises(InputError, match="must be an open rasterio dataset"):
        open_scene(memory)


def test_reading_a_closed_scene_is_an_error(tmp_path: Path) -> None:
    with open_scene(write(tmp_path / "a.tif", np.zeros((3, 4, 4), np.uint8))) as scene:
        pass
    with pytest.raises(InputError, match="is closed"):
        scene.read(0, 0, 1, 1)


def test_rgb_by_colour_interpretation(tmp_path: Path) -> None:
    values = RNG.integers(0, 256, (4, 8, 9), dtype=np.uint8)
    path = write(
        tmp_path / "a.tif", values, colors=[ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.undefined]
    )
    assert (read_all(path)[0] == values[[2, 1, 0]].transpose(1, 2, 0)).all()
    assert (read_all(path, bands=(4,), stretch="none")[0] == values[3][..., None]).all()
    with pytest.raises(InputError, match=r"bands must be 1 or 3 numbers in 1\.\.4"):
        open_scene(path, bands=(0, 1, 2))


@pytest.mark.parametrize(
    ("count", "names", "expected"),
    [
        (1, (), (1,)),
        (2, (), (1,)),
        (3, (), (1, 2, 3)),
        (4, (), (1, 2, 3)),
        (8, ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08"), (4, 3, 2)),
        (4, ("Blue", "Green", "Red", "NIR"), (3, 2, 1)),
        (5, ("nir", "SR_B2", "SR_B3", "SR_B4", "x"), (4, 3, 2)),
        (6, (), (3, 2, 1)),
        (7, (), (4, 3, 2)),
        (10, (), (3, 2, 1)),
        (12, (), (4, 3, 2)),
        (13, (), (4, 3, 2)),
        (31, (), (1, 2, 3)),
        (4, ("red", "green", "infrared", "x"), (1, 2, 3)),  # no blue: the names do not decide
    ],
)
def test_default_bands(count: int, names: tuple[str, ...], expected: tuple[int, ...]) -> None:
    descriptions = [*names, *(None for _ in range(count - len(names)))]
    assert default_bands([ColorInterp.gray] + [ColorInterp.undefined] * (count - 1), descriptions) == expected


def test_alpha_is_never_shown_by_default() -> None:
    grey, alpha, undefined = ColorInterp.gray, ColorInterp.alpha, ColorInterp.undefined
    assert default_bands([grey, alpha], [None] * 2) == (1,)
    assert default_bands([alpha, grey, undefined, undefined], [None] * 4) == (2, 3, 4)


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"]
)
def test_any_real_dtype_is_stretched_to_the_full_range(dtype: str, tmp_path: Path) -> None:
    values = np.arange(100).reshape(1, 10, 10).astype(dtype)
    rgb, mask = read_all(write(tmp_path / "a.tif", values))
    assert mask.all()
    assert (int(rgb[0, 0, 0]), int(rgb[5, 0, 0]), int(rgb[9, 9, 0])) == (0, 129, 255)  # (50 - 1.98) / 95.04 * 255 = 128.8


@pytest.mark.parametrize("dtype", ["complex64", "complex_int16"])
def test_complex_values_are_refused(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "slc.tif"
    with rasterio.open(path, "w", driver="GTiff", dtype=dtype, count=1, height=4, width=4, **UTM):
        pass
    with pytest.raises(ImageReadError, match=rf"complex values \({dtype}\), expected real ones"):
        open_scene(path)


def test_palettes_are_expanded_and_reduced_by_the_most_frequent_class(tmp_path: Path) -> None:
    values = np.zeros((1, 8, 8), np.uint8)
    values[0, :4, :4], values[0, 0, 0] = 2, 1
    path = write(tmp_path / "a.tif", values, photometric="palette", nodata=0)
    with rasterio.open(path, "r+") as dataset:
        dataset.write_colormap(1, {0: (9, 8, 7, 255), 1: (255, 0, 0, 255), 2: (0, 200, 0, 255)})
    with open_scene(path) as scene:
        assert scene.dtype == "uint8"
        rgb, mask = scene.read(0, 0, 8, 8)
        assert rgb[0, 0].tolist() == [255, 0, 0]
        assert rgb[1, 1].tolist() == [0, 200, 0]
        assert rgb[7, 7].tolist() == [9, 8, 7]
        assert mask.sum() == 16
        rgb, mask = scene.read(0, 0, 8, 8, 2, 2)
        assert rgb[0, 0].tolist() == [0, 200, 0]
        assert mask.tolist() == [[True, False], [False, False]]


# --- masks and stretch -------------------------------------------------------------------------------------------------------


def test_nodata_alpha_and_dataset_masks_give_the_same_scene(tmp_path: Path) -> None:
    values = RNG.integers(500, 4000, (3, 60, 60)).astype(np.uint16)
    valid = np.ones((60, 60), bool)
    valid[:, :12] = False  # 20 %
    collar = np.where(valid, values, 0).astype(np.uint16)
    alpha = np.concatenate([values, (valid * 65535)[None].astype(np.uint16)])
    rgba = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    scenes = [
        write(tmp_path / "nodata.tif", collar, nodata=0),
        write(tmp_path / "alpha.tif", alpha, colors=rgba),
        write(tmp_path / "mask.tif", values, mask=valid),
    ]
    with open_scene(write(tmp_path / "cut.tif", values[:, :, 12:])) as scene:
        expected, stretch = scene.read(0, 0, 60, 48)[0], scene.stretch
    for path in scenes:
        with open_scene(path) as scene:
            assert scene.stretch == stretch  # the collar moves nothing
            rgb, mask = scene.read(0, 0, 60, 60)
        assert (mask == valid).all()
        assert (rgb[:, 12:] == expected).all()
        assert not rgb[:, :12].any()
    with open_scene(write(tmp_path / "unmasked.tif", collar)) as scene:
        assert scene.stretch is not None
        assert scene.stretch.low == (0.0, 0.0, 0.0)  # what happens without a mask


def test_nan_is_masked_with_and_without_nodata(tmp_path: Path) -> None:
    values = np.arange(16.0, dtype=np.float32).reshape(1, 4, 4)
    values[0, 0, :2] = np.nan
    for nodata in (None, np.nan):
        rgb, mask = read_all(write(tmp_path / f"{nodata}.tif", values, nodata=nodata))
        assert mask.sum() == 14
        assert not mask[0, :2].any()
        assert not rgb[0, :2].any()


def test_a_pixel_is_valid_when_any_shown_band_is(tmp_path: Path) -> None:
    values = np.full((3, 10, 10), 100, np.int16)
    values[0, 0, 0] = -9999
    values[:, 5, 5] = -9999
    with open_scene(write(tmp_path / "a.tif", values, nodata=-9999)) as scene:
        mask = scene.read(0, 0, 10, 10)[1]
        assert mask[0, 0]
        assert not mask[5, 5]
        assert scene.stretch is not None
        assert scene.stretch.low[0] == 99.0  # -9999 is not among the values


def test_one_stretch_for_every_window(tmp_path: Path) -> None:
    values = np.add.outer(np.arange(400), np.arange(500)).astype(np.uint16)[None] * 9
    with open_scene(write(tmp_path / "a.tif", values)) as scene:
        whole, _ = scene.read(0, 0, 400, 500)
        for window in ((0, 0, 100, 100), (300, 400, 100, 100), (123, 45, 67, 89)):
            row, col, height, width = window
            assert (scene.read(*window)[0] == whole[row : row + height, col : col + width]).all()


def test_explicit_stretch_and_display_ready_8_bit(tmp_path: Path) -> None:
    values = np.array([[[0, 100], [200, 50]]], np.uint8)
    path = write(tmp_path / "a.tif", values)
    assert read_all(path, stretch="none")[0][..., 0].tolist() == [[0, 100], [200, 50]]
    assert read_all(path, stretch=(50, 100))[0][..., 0].tolist() == [[0, 255], [255, 0]]
    assert open_scene(path).stretch is not None  # a single 8-bit band is stretched: often a few classes or dark SAR
    assert open_scene(write(tmp_path / "b.tif", np.zeros((4, 2, 2), np.uint8), photometric="minisblack")).stretch is not None
    assert open_scene(write(tmp_path / "c.tif", np.zeros((3, 2, 2), np.uint8))).stretch is None


# --- reduced reads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [{"tiled": True, "blockxsize": 64, "blockysize": 64}, {"tiled": False}])
def test_reduced_reads_are_means_in_any_layout_and_by_strips(
    layout: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = RNG.integers(0, 256, (3, 240, 320), dtype=np.uint8)
    path = write(tmp_path / "a.tif", values, compress="deflate", **layout)
    expected = values.reshape(3, 60, 4, 80, 4).mean(axis=(2, 4)).transpose(1, 2, 0)
    with open_scene(path) as scene:
        whole, mask = scene.read(0, 0, 240, 320, 60, 80)
        monkeypatch.setattr("rsvlm_infer.imagery.source._STRIP_PX", 7000)
        strips, _ = scene.read(0, 0, 240, 320, 60, 80)
    assert mask.all()
    assert np.abs(whole - expected).max() <= 0.51
    assert np.abs(strips.astype(int) - whole).max() <= 1


def test_overviews_are_used(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", np.full((3, 512, 512), 10, np.uint8), tiled=True, blockxsize=128, blockysize=128)
    with rasterio.open(path, "r+") as dataset:
        dataset.build_overviews([4], Resampling.nearest)
        dataset.write(np.full((3, 512, 512), 200, np.uint8))  # now only native reads see 200
    with rasterio.open(path) as dataset:
        assert dataset.overviews(1) == [4]
    with open_scene(path) as scene:
        assert (scene.read(0, 0, 512, 512)[0] == 200).all()
        assert (scene.overview(128)[0] == 10).all()


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_memory_stays_bounded_without_overviews(tmp_path: Path, repository: Path) -> None:
    """A 16000 x 16000 uint16 scene, striped, no overviews: 512 MB of values."""
    path = tmp_path / "striped.tif"
    rows = (np.arange(16000) // 7 % 4000 + 500).astype(np.uint16)
    with rasterio.open(
        path, "w", driver="GTiff", dtype="uint16", count=1, height=16000, width=16000, compress="deflate", zlevel=1
    ) as dataset:
        for start in range(0, 16000, 2000):
            dataset.write(np.broadcast_to(rows, (1, 2000, 16000)), window=((start, start + 2000), (0, 16000)))
    assert max(peak_mib(path, repository).values()) < 640


# --- ground metres -----------------------------------------------------------------------------------------------------------


def gsd(tmp_path: Path, height: int = 10, width: int = 10, **profile: Any) -> float | None:
    with open_scene(write(tmp_path / "gsd.tif", np.zeros((1, height, width), np.uint8), **profile)) as scene:
        return scene.gsd_native_m


def test_gsd_of_projected_systems(tmp_path: Path) -> None:
    assert gsd(tmp_path) == pytest.approx(10.0)
    feet = Affine(2, 0, 2_000_000, 0, -2, 500_000)
    assert gsd(tmp_path, crs="EPSG:2263", transform=feet) == pytest.approx(2 * 1200 / 3937)
    turned = Affine.translation(500_000, 5_000_000) @ Affine.rotation(30) @ Affine.scale(0.6, -0.6)
    assert gsd(tmp_path, crs="EPSG:32631", transform=turned) == pytest.approx(0.6)
    oblong = Affine(4, 0, 500_000, 0, -9, 5_000_000)
    assert gsd(tmp_path, crs="EPSG:32631", transform=oblong) == pytest.approx(6.0)


def test_gsd_on_mercator_is_on_the_ground(tmp_path: Path) -> None:
    y_at_60_north = 6_378_137 * math.log(math.tan(math.pi / 4 + math.radians(60) / 2))
    for latitude_y, expected in ((0.0, 10.0), (y_at_60_north, 5.0)):
        transform = Affine(10, 0, 0, 0, -10, latitude_y + 50)
        assert gsd(tmp_path, crs="EPSG:3857", transform=transform) == pytest.approx(expected, rel=1e-6)


def test_gsd_of_geographic_systems_is_taken_at_the_centre_latitude(tmp_path: Path) -> None:
    degrees = 1e-3
    equator = Affine(degrees, 0, 10, 0, -degrees, degrees * 5)
    # WGS 84: a degree is 111,319.5 m of longitude and 110,574.3 m of latitude at the equator
    assert gsd(tmp_path, crs="EPSG:4326", transform=equator) == pytest.approx(
        degrees * math.sqrt(111319.5 * 110574.3), rel=1e-5
    )
    north = Affine(degrees, 0, 10, 0, -degrees, 60 + degrees * 5)
    # 55,800 m and 111,412 m at 60 degrees
    assert gsd(tmp_path, crs="EPSG:4326", transform=north) == pytest.approx(degrees * math.sqrt(55800 * 111412), rel=1e-4)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_scenes_without_a_usable_reference_have_no_gsd(tmp_path: Path) -> None:
    assert gsd(tmp_path, crs=None) is None
    assert gsd(tmp_path, crs=None, transform=Affine.identity()) is None
    local = CRS.from_wkt('LOCAL_CS["site",UNIT["metre",1]]')
    dataset = type("Dataset", (), {"crs": local, "transform": Affine.scale(2), "width": 4, "height": 4})
    assert ground_sampling_distance(dataset) is None


def test_reference_and_bounds_of_a_rotated_scene(tmp_path: Path) -> None:
    turned = Affine.translation(1000, 2000) @ Affine.rotation(90) @ Affine.scale(2, -2)
    path = write(tmp_path / "a.tif", np.zeros((1, 10, 30), np.uint8), crs="EPSG:32631", transform=turned)
    with open_scene(path) as scene:
        assert scene.crs == "EPSG:32631"
        assert scene.transform == pytest.approx(tuple(turned)[:6])
        assert scene.bounds == pytest.approx((1000, 2000, 1020, 2060))


# --- damage ------------------------------------------------------------------------------------------------------------------


def test_damaged_rasters_give_one_line_and_nothing_on_stderr(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.tif", RNG.integers(0, 256, (3, 200, 200), dtype=np.uint8), compress="deflate").read_bytes()
    for share in (0.0005, 0.01, 0.3, 0.9):
        path = tmp_path / f"{share}.tif"
        path.write_bytes(whole[: int(len(whole) * share)])
        code = (
            "import sys; from rsvlm_infer.errors import ImageReadError; from rsvlm_infer.imagery.source import open_scene\n"
            "try:\n"
            "    with open_scene(sys.argv[1]) as scene: scene.read(0, 0, scene.height, scene.width)\n"
            "except ImageReadError as error: print(error)\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        assert done.stdout.count("\n") == 1
        assert done.stdout.startswith(f"{path} cannot be read as a")


def test_only_the_raster_drivers_open_files(tmp_path: Path) -> None:
    target = write(tmp_path / "a.tif", np.zeros((1, 4, 4), np.uint8))
    vrt = tmp_path / "link.vrt"
    vrt.write_text(
        '<VRTDataset rasterXSize="4" rasterYSize="4"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f"<SourceFilename>{target}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    with pytest.raises(ImageReadError, match="not a JPEG, PNG, WebP, TIFF, GIF or BMP image"):
        open_scene(vrt)


def test_jpeg_2000_is_read_by_windows(tmp_path: Path) -> None:
    if "JP2OpenJPEG" not in rasterio.drivers.raster_driver_extensions().values():
        pytest.skip("this rasterio has no JPEG 2000 driver")
    values = RNG.integers(0, 4000, (1, 64, 64)).astype(np.uint16)
    path = write(tmp_path / "a.jp2", values, driver="JP2OpenJPEG", QUALITY="100", REVERSIBLE="YES")
    with open_scene(path, stretch=(0, 255)) as scene:
        assert (scene.dtype, scene.gsd_native_m) == ("uint16", pytest.approx(10.0))
        assert (scene.read(3, 4, 20, 20)[0][..., 0] == np.minimum(values[0, 3:23, 4:24], 255)).all()
