"""Plain images, bytes and arrays become scenes; bad ones become one clear line."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rsvlm_infer.errors import ImageReadError, InputError, MissingDependencyError
from rsvlm_infer.imagery.source import ArrayScene, open_scene

RNG = np.random.default_rng(3)
RGB = RNG.integers(0, 256, (37, 53, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def read_all(source: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    with open_scene(source, **options) as scene:
        return scene.read(0, 0, scene.height, scene.width)


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    image = Image.fromarray(RGB)
    path = tmp_path / "scene.png"
    image.save(path)
    for source in (path, str(path), path.read_bytes(), bytearray(path.read_bytes()), image, RGB):
        rgb, mask = read_all(source)
        assert (rgb == RGB).all()
        assert mask.all()
        assert mask.shape == (37, 53)
    with open_scene(path) as scene:
        assert (scene.name, scene.height, scene.width, scene.count, scene.dtype) == (str(path), 37, 53, 3, "uint8")
        assert (scene.gsd_native_m, scene.crs, scene.transform, scene.bounds) == (None, None, None, None)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "GIF"])
def test_formats_decode_as_pillow_does(kind: str) -> None:
    content = encoded(Image.fromarray(RGB), kind)
    assert (read_all(content)[0] == np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))).all()


def test_windows_and_their_contract() -> None:
    scene = open_scene(RGB)
    rgb, mask = scene.read(5, 7, 11, 13)
    assert (rgb == RGB[5:16, 7:20]).all()
    assert mask.shape == (11, 13)
    for window in ((-1, 0, 1, 1), (0, -1, 1, 1), (30, 0, 8, 1), (0, 50, 1, 4), (0, 0, 0, 1)):
        with pytest.raises(InputError, match="window must lie inside the scene"):
            scene.read(*window)
    with pytest.raises(InputError, match="out_height and out_width must be in"):
        scene.read(0, 0, 5, 5, 6, 5)
    with pytest.raises(InputError, match="max_side_px must be at least 1"):
        scene.overview(0)


def test_reduced_reads_are_area_means() -> None:
    rgb, _ = open_scene(RGB[:36, :52]).read(4, 8, 32, 40, 8, 10)
    expected = RGB[4:36, 8:48].reshape(8, 4, 10, 4, 3).mean(axis=(1, 3))
    assert np.abs(rgb - expected).max() <= 0.5


def test_overview_keeps_small_scenes_and_shrinks_large_ones() -> None:
    assert (open_scene(RGB).overview()[0] == RGB).all()
    rgb, mask = open_scene(RGB).overview(20)
    assert rgb.shape == (14, 20, 3)
    assert mask.shape == (14, 20)
    wide = np.full((3, 5000), 7, np.uint8)
    rgb, mask = open_scene(wide).overview()
    assert rgb.shape == (1, 1024, 3)
    assert set(np.unique(rgb)) == {7}


def test_strips_equal_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    values = RNG.normal(50, 20, (301, 83)).astype(np.float32)
    values[10:40, 20:60] = np.nan
    whole, whole_mask = open_scene(values, stretch=(0, 100)).read(3, 1, 290, 80, 77, 31)
    monkeypatch.setattr("rsvlm_infer.imagery.source._STRIP_PX", 1000)
    strips, strips_mask = open_scene(values, stretch=(0, 100)).read(3, 1, 290, 80, 77, 31)
    assert (whole_mask == strips_mask).all()
    assert np.abs(whole.astype(int) - strips).max() <= 1


def test_exif_orientation_is_respected() -> None:
    for orientation, turned in ((3, RGB[::-1, ::-1]), (6, np.rot90(RGB, -1)), (8, np.rot90(RGB, 1)), (2, RGB[:, ::-1])):
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert (read_all(encoded(Image.fromarray(RGB), exif=exif))[0] == turned).all()


def test_damaged_exif_does_not_cost_the_image() -> None:
    assert (read_all(encoded(Image.fromarray(RGB), exif=b"Exif\0\0MM\0\x2a\0\0"))[0] == RGB).all()


def test_alpha_becomes_the_mask() -> None:
    alpha = np.full((37, 53), 255, np.uint8)
    alpha[:10], alpha[10:12] = 0, 1
    for channels in (np.dstack([RGB, alpha]), np.dstack([RGB[..., 0], alpha])):
        rgb, mask = read_all(encoded(Image.fromarray(channels)))
        assert (mask == (alpha > 0)).all()
        assert (rgb == (RGB if channels.shape[2] == 4 else RGB[..., :1])).all()  # colours stay, as image processors keep them


def test_palettes_are_expanded_and_their_transparent_entry_masked() -> None:
    palette = Image.fromarray(RNG.integers(0, 4, (6, 8), dtype=np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    rgb, mask = read_all(encoded(palette, transparency=2))
    indices = np.asarray(palette)
    assert (rgb == np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]])[indices]).all()
    assert (mask == (indices != 2)).all()


def test_other_modes_decode() -> None:
    grey = RGB[..., 0]
    assert (read_all(encoded(Image.fromarray(grey)))[0] == grey[..., None]).all()
    bits = Image.fromarray(grey > 99)
    assert (read_all(encoded(bits))[0][..., 0] == (grey > 99) * 255).all()
    cmyk = Image.fromarray(RGB).convert("CMYK")
    content = encoded(cmyk, "JPEG", quality=95)
    assert (read_all(content)[0] == np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))).all()


def test_16_bit_grey_is_stretched_by_its_percentiles() -> None:
    values = np.arange(2000, 12000, dtype=np.uint16).reshape(100, 100)
    for source in (Image.fromarray(values), encoded(Image.fromarray(values)), values):
        scene = open_scene(source)
        rgb, _ = scene.read(0, 0, 100, 100)
        assert scene.dtype == "uint16"
        assert scene.stretch is not None
        assert scene.stretch.low == pytest.approx((2199.98,))
        assert scene.stretch.high == pytest.approx((11799.02,))
        assert (rgb[0, 0, 0], rgb[50, 0, 0], rgb[99, 99, 0]) == (0, 128, 255)


def test_16_bit_png_keeps_its_transparent_value_as_mask() -> None:
    values = np.full((4, 4), 300, np.uint16)
    values[0, 0] = 7
    _, mask = read_all(encoded(Image.fromarray(values), transparency=7))
    assert mask.sum() == 15
    assert not mask[0, 0]


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "int32", "float16", "float64", ">u2", ">f4"])
def test_arrays_of_any_real_dtype(dtype: str) -> None:
    values = (np.arange(120).reshape(10, 12) % 100).astype(dtype)
    rgb, mask = read_all(values)
    assert rgb.shape == (10, 12, 3)
    assert mask.all()
    assert int(rgb.max()) == 255
    assert int(rgb.min()) == 0


def test_nan_and_inf_are_masked() -> None:
    values = RNG.normal(size=(20, 20, 3))
    values[:5, :, 0] = np.nan  # one band only: still something to see
    values[10:] = np.inf
    rgb, mask = read_all(values)
    assert mask[:10].all()
    assert not mask[10:].any()
    assert not rgb[:5, :, 0].any()
    assert not rgb[10:].any()


def test_band_choice_is_1_based() -> None:
    values = RNG.integers(0, 256, (9, 9, 6), dtype=np.uint8)
    assert (read_all(values, bands=(6, 1, 3), stretch="none")[0] == values[..., [5, 0, 2]]).all()
    assert (read_all(values, bands=[2], stretch="none")[0] == values[..., 1:2]).all()
    assert (read_all(values, stretch="none")[0] == values[..., :3]).all()
    for bands in ((0,), (7,), (1, 2), (), (1.0,), (-1, 1, 2)):
        with pytest.raises(InputError, match=r"bands must be 1 or 3 numbers in 1\.\.6"):
            open_scene(values, bands=bands)  # type: ignore[arg-type]


def test_stretch_choices() -> None:
    values = np.array([[0, 50], [100, 200]], np.uint8)
    assert read_all(values)[0][..., 0].tolist() == [[0, 50], [100, 200]]
    assert read_all(values, stretch=(50, 100))[0][..., 0].tolist() == [[0, 0], [255, 255]]
    assert read_all(values, stretch="percentile")[0][..., 0].tolist() == [[0, 63], [130, 255]]  # 3..194
    for stretch in ("linear", (3, 3), (1,), 5):
        with pytest.raises(InputError, match="stretch must be"):
            open_scene(values, stretch=stretch)  # type: ignore[arg-type]
    with pytest.raises(InputError, match='for uint8 values "none"'):
        open_scene(values.astype(np.uint16), stretch="none")


def test_an_array_of_many_bands_is_stretched_even_when_8_bit() -> None:
    assert open_scene(np.zeros((4, 4, 8), np.uint8)).stretch is not None
    assert open_scene(np.zeros((4, 4, 4), np.uint8)).stretch is None


def test_native_reads_of_an_8_bit_array_are_views() -> None:
    scene = open_scene(RGB)
    assert isinstance(scene, ArrayScene)
    assert np.shares_memory(scene.read(0, 0, 37, 53)[0], RGB)


def test_max_pixels_is_a_limit_that_can_be_raised(tmp_path: Path) -> None:
    image = Image.fromarray(RGB)
    for source in (image, encoded(image)):
        with pytest.raises(ImageReadError, match=r"1,961 pixels, more than max_pixels=1,960.*raise max_pixels"):
            open_scene(source, max_pixels=1960)
        assert open_scene(source, max_pixels=1961).height == 37


def test_a_bomb_is_refused_before_it_is_decoded_and_can_be_allowed() -> None:
    content = encoded(Image.new("1", (20000, 10000)))  # 200 Mpx in 25 kB: beyond Pillow's own error limit
    with pytest.raises(ImageReadError, match="200,000,000 pixels"):
        open_scene(content)
    limit = Image.MAX_IMAGE_PIXELS
    with open_scene(content, max_pixels=200_000_000) as scene:
        assert (scene.height, scene.width) == (10000, 20000)
        assert not scene.read(9000, 19000, 5, 5)[0].any()
    assert limit == Image.MAX_IMAGE_PIXELS  # Pillow's limit is as before for everyone else


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_files_give_one_clear_error(kind: str, share: float, tmp_path: Path) -> None:
    noise = Image.fromarray(RNG.integers(0, 256, (200, 200, 3), dtype=np.uint8))
    content = encoded(noise, kind)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ImageReadError, match="cannot be read as") as caught:
        read_all(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_is_no_image_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    for path, message in (
        (tmp_path / "none.png", "does not exist"),
        (tmp_path, "is a folder"),
        (tmp_path / "empty.png", r"is empty \(0 bytes\)"),
        (tmp_path / "text.jpg", "not a JPEG, PNG, WebP, TIFF, GIF or BMP image"),
    ):
        with pytest.raises(ImageReadError, match=message):
            open_scene(path)
    with pytest.raises(ImageReadError, match=r"is empty \(0 bytes\)"):
        open_scene(b"")


def test_postscript_never_reaches_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(Image.fromarray(RGB), "EPS")
    path = tmp_path / "renamed.png"
    path.write_bytes(content)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    for source, name in ((path, str(path)), (content, "bytes")):
        with pytest.raises(ImageReadError) as caught:
            open_scene(source)
        assert str(caught.value) == (
            f"{name} cannot be read as an image (not a JPEG, PNG, WebP, TIFF, GIF or BMP image); restore the file or convert it "
            "to PNG or GeoTIFF"
        )


@pytest.mark.parametrize("kind", ["PPM", "TGA", "ICO", "PCX", "SGI"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(ImageReadError, match="not a JPEG, PNG, WebP, TIFF, GIF or BMP image"):
        open_scene(encoded(Image.fromarray(RGB), kind))


def test_of_several_frames_the_first_is_read() -> None:
    first, second = Image.fromarray(RGB), Image.new("RGB", (53, 37), "blue")
    for kind in ("MPO", "GIF"):
        content = encoded(first, kind, save_all=True, append_images=[second])
        with Image.open(io.BytesIO(content)) as image:
            assert (image.format, image.n_frames) == (kind, 2)  # type: ignore[attr-defined]
            expected = np.asarray(image.convert("RGB"))
        assert (read_all(content)[0] == expected).all()


def test_a_path_that_the_system_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("a" * 300 + ".png")
    with pytest.raises(ImageReadError, match=r"/a{300}\.png cannot be opened \(File name too long\); check the path"):
        open_scene(long)

    def refuse(*_: Any, **__: Any) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(
        ImageReadError, match=r"b\.png cannot be opened \(Permission denied\); check the path and its permissions"
    ):
        open_scene(tmp_path / "b.png")


@pytest.mark.parametrize("step", ["PIL.Image.open", "rsvlm_infer.imagery.plain._decode"])
def test_running_out_of_memory_is_an_error_of_that_image(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scene.png"
    Image.fromarray(RGB).save(path)

    def exhausted(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(step, exhausted)
    with pytest.raises(ImageReadError) as caught:
        open_scene(path)
    assert str(caught.value) == (
        f"{path} needs more memory than is free; lower max_pixels to refuse images of this size, choose one band with "
        "bands=(1,), or save it as a tiled GeoTIFF, which is read by windows"
    )


def test_scenes_know_when_nothing_can_be_invalid() -> None:
    assert open_scene(RGB).all_valid
    assert open_scene(encoded(Image.fromarray(RGB))).all_valid
    assert not open_scene(encoded(Image.fromarray(RGB).convert("RGBA"))).all_valid
    assert not open_scene(RGB.astype(np.float32)).all_valid


@pytest.mark.parametrize(
    "address",
    [
        "http://example.org/a.tif",
        "https://example.org/a.png",
        "s3://b/a.tif",
        "/vsicurl/http://e.org/a.tif",
        "zip+https://e/a",
        "file:/a",
    ],
)
def test_addresses_are_refused(address: str) -> None:
    for source in (address, Path(address)):
        with pytest.raises(ImageReadError, match="source must be a local file"):
            open_scene(source)


def test_wrong_types_and_shapes() -> None:
    for source in (None, 5, [RGB], {"path": "a"}):
        with pytest.raises(InputError, match="source must be a path, bytes"):
            open_scene(source)
    for array in (np.zeros(5), np.zeros((0, 5)), np.zeros((2, 2, 2, 3)), np.zeros((4, 4), complex), np.array([["a"]])):
        with pytest.raises(InputError, match="source array must be a non-empty real array"):
            open_scene(array)
    with pytest.raises(InputError, match="channels last"):
        open_scene(np.zeros((3, 100, 100)))


def test_tiff_without_rasterio_falls_back_to_pillow(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "rsvlm_infer.imagery.geo", None)  # `import` of it raises ImportError
    caplog.set_level("INFO", logger="rsvlm_infer.imagery")
    assert (read_all(encoded(Image.fromarray(RGB), "TIFF"))[0] == RGB).all()
    georeferenced = encoded(Image.fromarray(RGB), "TIFF", tiffinfo={33550: (10.0, 10.0, 0.0)})
    assert (read_all(georeferenced)[0] == RGB).all()
    assert "rasterio is not installed" in caplog.text
    assert "its georeference is not read" in caplog.text
    assert open_scene(encoded(Image.fromarray(RGB[..., 0]), "TIFF")).stretch is not None  # as with rasterio
    with pytest.raises(MissingDependencyError, match=r"needs rasterio.*rsvlm-infer\[geo\]"):
        open_scene(b"II*\0" + bytes(60))


def test_opening_plain_images_imports_no_rasterio() -> None:
    code = (
        "import sys, numpy; from rsvlm_infer.imagery.source import open_scene; import rsvlm_infer.imagery.pack; "
        "open_scene(numpy.zeros((4, 4, 3), 'uint8')).read(0, 0, 4, 4); "
        "print([name for name in ('rasterio', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
