"""Packed patches against the published image processors, the plan, and across implementations; memory stays bounded."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rsvlm_infer.config import DrisConfig, RsvlmConfig
from rsvlm_infer.errors import InputError
from rsvlm_infer.imagery import pack
from rsvlm_infer.imagery.complexity import ComplexityMap
from rsvlm_infer.imagery.pack import PackedScene, pack_scene, without_patches
from rsvlm_infer.imagery.plan import TilePlan, count_tokens, plan_scene
from rsvlm_infer.imagery.source import Scene, open_scene
from tests.imagery.configs import CLIP_MEAN, CLIP_STD, imagery_config

SIZES = [(336, 336), (224, 224), (64, 64), (600, 1000), (1000, 601), (333, 777), (13, 29), (1, 5), (899, 900), (337, 335)]
TOLERANCE = 1e-6  # both sides are float32; the processors divide and subtract in another order


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth and noisy parts, so that both filters and borders matter."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[0:height, 0:width]
    smooth = 127 + 120 * np.sin(rows / 17 + cols / 31)
    rgb = (
        np.stack([smooth, smooth[::-1], 255 - smooth], axis=-1)
        + rng.normal(0, 30, (height, width, 3)) * (cols > width / 2)[..., None]
    )
    return np.clip(rgb, 0, 255).astype(np.uint8)


def packed(rgb: Any, config: RsvlmConfig, implementation: str = "auto", **plan_options: Any) -> PackedScene:
    scene = open_scene(rgb)
    return pack_scene(scene, plan_scene(scene.height, scene.width, config, **plan_options), config, implementation)


def tiles_of(scene: PackedScene, patch: int = 14) -> list[np.ndarray]:
    """Undoes the patch cutting: float32 [3, gh * p, gw * p] per tile."""
    tiles = []
    for (gh, gw), start, stop in zip(scene.grids, scene.cu_seqlens, scene.cu_seqlens[1:], strict=False):
        cut = scene.patches[start:stop].reshape(gh, gw, 3, patch, patch)
        tiles.append(cut.transpose(2, 0, 3, 1, 4).reshape(3, gh * patch, gw * patch))
    return tiles


# --- equality with the published processors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_fixed_crop_equals_the_clip_processor(height: int, width: int) -> None:
    processing = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = processing.CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    rgb = picture(height, width)
    expected = processor(Image.fromarray(rgb), return_tensors="np")["pixel_values"][0]
    (tile,) = tiles_of(packed(rgb, imagery_config("fixed", fit="crop")))
    np.testing.assert_allclose(tile, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_fixed_pad_equals_llavas_processor(height: int, width: int) -> None:
    processing = pytest.importorskip("transformers.models.llava.image_processing_pil_llava")
    processor = processing.LlavaImageProcessorPil(
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        do_pad=True,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    rgb = picture(height, width)
    expected = np.asarray(processor(Image.fromarray(rgb), return_tensors="np")["pixel_values"][0])
    background = tuple(int(value * 255) for value in CLIP_MEAN)
    (tile,) = tiles_of(packed(rgb, imagery_config("fixed", fit="pad", pad_value=background)))
    np.testing.assert_allclose(tile, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_fixed_pad_equals_original_llavas_expand2square(height: int, width: int) -> None:
    rgb, side = picture(height, width), max(height, width)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(Image.fromarray(rgb), ((side - width) // 2, (side - height) // 2))
    expected = np.asarray(square.resize((336, 336), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    expected = ((expected - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)).transpose(2, 0, 1)
    (tile,) = tiles_of(packed(rgb, imagery_config("fixed", fit="pad", pad_value=(122, 116, 104))))
    np.testing.assert_allclose(tile, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_fixed_stretch_equals_the_siglip_processor_cut_as_a_valid_conv_does(height: int, width: int) -> None:
    processing = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    processor = processing.SiglipImageProcessorPil(size={"height": 384, "width": 384})
    rgb = picture(height, width)
    expected = processor(Image.fromarray(rgb), return_tensors="np")["pixel_values"][0]
    half = (0.5, 0.5, 0.5)
    config = imagery_config("fixed", tile_px=384, family="siglip", mean=half, std=half)
    assert {"bicubic": 3, "bilinear": 2}[config.preprocess.resample] == int(processor.resample)
    scene = packed(rgb, config)
    assert scene.grids.tolist() == [[27, 27]]
    np.testing.assert_allclose(tiles_of(scene)[0], expected[:, :378, :378], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_anyres_equals_the_llava_next_processor(height: int, width: int) -> None:
    processing = pytest.importorskip("transformers.models.llava_next.image_processing_pil_llava_next")
    processor = processing.LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    config = imagery_config("anyres", pad_value=(9, 9, 9))  # anyres pads with raw zeros whatever the config says
    rgb = picture(height, width)
    expected = processor(Image.fromarray(rgb), return_tensors="np")["pixel_values"][0]
    tiles = tiles_of(packed(rgb, config))
    assert len(tiles) == len(expected)
    np.testing.assert_allclose(np.stack(tiles), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "CMYK", "1"])
def test_other_modes_equal_the_clip_processor(mode: str) -> None:
    processing = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = processing.CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    image = Image.fromarray(picture(100, 150)).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(picture(100, 150, 1)).convert("L"))
    # transparent pixels keep their colour, as in original LLaVA and transformers 4; transformers 5 paints them white
    expected = processor(image.convert("RGB"), return_tensors="np")["pixel_values"][0]
    (tile,) = tiles_of(packed(image, imagery_config("fixed", fit="crop")))
    np.testing.assert_allclose(tile, expected, atol=TOLERANCE, rtol=0)


# --- dris --------------------------------------------------------------------------------------------------------------------


def test_dris_tiles_are_their_windows_resized_by_pillow() -> None:
    rgb = picture(700, 900)
    rgb[:350] = 90
    rgb[:350, :450] += (np.arange(450) % 90 < 20).astype(np.uint8)[:, None] * 60
    scene = open_scene(rgb)
    config = imagery_config("dris", tile_px=224, resample="bilinear")
    plan = plan_scene(700, 900, config, complexity=ComplexityMap(*scene.overview(), config=config.dris))
    result = pack_scene(scene, plan, config)
    assert len(plan.tiles) > 4
    assert len({tile.grid for tile in plan.tiles}) > 1
    for tile, pixels in zip(plan.tiles, tiles_of(result), strict=True):
        part = rgb[tile.row_off : tile.row_off + tile.height, tile.col_off : tile.col_off + tile.width]
        shown = Image.fromarray(part).resize((tile.canvas[1], tile.canvas[0]), Image.Resampling.BILINEAR)
        expected = (np.asarray(shown, dtype=np.float32) / 255 - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
        np.testing.assert_allclose(pixels, expected.transpose(2, 0, 1), atol=TOLERANCE, rtol=0)


def test_packed_scene_carries_the_plan_and_its_numbers() -> None:
    config = imagery_config("dris", tile_px=224)
    scene = open_scene(picture(500, 800))
    scene.gsd_native_m = 0.3
    plan = plan_scene(500, 800, config)
    result = pack_scene(scene, plan, config)
    assert result.plan is plan
    assert result.num_tokens == count_tokens(plan, config)
    assert (result.patches.dtype, result.patches.shape) == (np.float32, (plan.num_patches, 588))
    assert (result.cu_seqlens.dtype, result.grids.dtype, result.boxes.dtype) == (np.int32, np.int32, np.float32)
    assert (result.cu_seqlens[-1], len(result.grids), result.boxes.shape) == (
        plan.num_patches,
        len(plan.tiles),
        (len(plan.tiles), 4),
    )
    assert result.scene["name"] == "array"
    assert (result.scene["height"], result.scene["width"], result.scene["gsd_native_m"]) == (500, 800, 0.3)
    # half the scene in four leaves of 250 x 200 px, half in one of 500 x 400 px, each on 224 x 224
    assert result.scene["gsd_effective_m"] == pytest.approx(0.3 * (250 / 224 + 500 / 224) / 2)
    assert packed(picture(50, 50), config).scene["gsd_effective_m"] is None


@pytest.mark.parametrize("tiling", ["fixed", "anyres", "dris"])
def test_a_plan_comes_back_from_json_and_says_all_but_the_patches(tiling: Any) -> None:
    config = imagery_config(tiling)
    whole = packed(picture(300, 200), config)
    plan = TilePlan.from_dict(json.loads(json.dumps(whole.plan.to_dict())))
    assert plan == whole.plan
    again = without_patches(plan, config, whole.scene["name"], whole.scene["gsd_native_m"])
    assert again.patches.shape == (0, whole.patches.shape[1])
    for name in ("cu_seqlens", "grids", "boxes"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
    assert (again.num_tokens, again.scene) == (whole.num_tokens, whole.scene)


def test_enlarging_a_small_scene_gives_no_finer_ground_distance() -> None:
    config = imagery_config("fixed")
    scene = open_scene(picture(100, 100))
    scene.gsd_native_m = 10.0
    assert pack_scene(scene, plan_scene(100, 100, config), config).scene["gsd_effective_m"] == 10.0


@pytest.mark.parametrize("tiling", ["fixed", "anyres", "dris"])
def test_chunks_and_implementations_change_nothing(tiling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rgb = picture(611, 833)
    config = imagery_config(tiling, dris=DrisConfig(max_visual_tokens=4000), fit="pad", pad_value=(1, 2, 3))
    whole = packed(rgb, config).patches
    monkeypatch.setattr(pack, "_CHUNK_BYTES", 1)
    assert (packed(rgb, config).patches == whole).all()
    np.testing.assert_allclose(packed(rgb, config, "eager").patches, whole, atol=TOLERANCE, rtol=0)


# --- large scenes ------------------------------------------------------------------------------------------------------------


class LargeScene(Scene):
    """A raster of one smooth surface, computed where it is read; remembers how much was read."""

    def __init__(self, height: int, width: int) -> None:
        self.name, self.height, self.width, self.count, self.dtype = "large", height, width, 3, "uint8"
        self._display_ready = True
        self.pixels_read: list[int] = []

    def _read_raw(
        self, row_off: float, col_off: float, height: float, width: float, out_height: int, out_width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        self.pixels_read.append(out_height * out_width)
        rows = (row_off + (np.arange(out_height) + 0.5) * height / out_height) / self.height
        cols = (col_off + (np.arange(out_width) + 0.5) * width / out_width) / self.width
        surface = 128 + 100 * np.add.outer(np.sin(5 * rows), np.cos(5 * cols)) / 2
        values = np.repeat(np.rint(surface).astype(np.uint8)[..., None], 3, axis=2)
        return values, np.broadcast_to(np.True_, values.shape)

    def surface(self, box: np.ndarray, side: int) -> np.ndarray:
        """What a tile of side x side pixels should show: [side, side]."""
        cx, cy, w, h = box
        rows = cy - h / 2 + (np.arange(side) + 0.5) * h / side
        cols = cx - w / 2 + (np.arange(side) + 0.5) * w / side
        return 128 + 100 * np.add.outer(np.sin(5 * rows), np.cos(5 * cols)) / 2


@pytest.mark.parametrize(
    ("tiling", "shape", "options"),
    [
        ("fixed", (40_000, 30_000), {"fit": "stretch"}),
        ("anyres", (20_000, 20_000), {}),
        ("dris", (20_000, 24_000), {}),
        ("dris", (9_000, 9_000), {"dris": DrisConfig(max_visual_tokens=10_000)}),
    ],
)
def test_large_rasters_are_read_reduced_and_show_the_right_ground(tiling: Any, shape: tuple[int, int], options: Any) -> None:
    scene = LargeScene(*shape)
    config = imagery_config(tiling, tile_px=224, pinpoints=((448, 448),), mean=(0.0,) * 3, std=(1.0,) * 3, **options)
    plan = plan_scene(*shape, config)
    result = pack_scene(scene, plan, config)
    assert sum(scene.pixels_read) <= pack.EXACT_SCENE_PX
    for box, pixels in zip(result.boxes, tiles_of(result), strict=True):
        expected = scene.surface(box, pixels.shape[1])
        assert np.abs(pixels[0] * 255 - expected).max() < 3  # half a read pixel of this surface is less than 1 grey level


def test_windows_are_read_one_by_one_where_one_reading_would_be_too_large() -> None:
    scene = LargeScene(30_000, 30_000)
    config = imagery_config(
        "dris", tile_px=224, mean=(0.0,) * 3, std=(1.0,) * 3, dris=DrisConfig(max_depth=6, max_visual_tokens=9000)
    )
    relevance = np.zeros((64, 64))
    relevance[20, 30] = 1.0  # deep there, coarse elsewhere
    plan = plan_scene(30_000, 30_000, config, relevance=relevance)
    assert max(tile.depth for tile in plan.tiles) == 6
    result = pack_scene(scene, plan, config)
    assert len(scene.pixels_read) >= len(plan.tiles)
    assert max(scene.pixels_read) < 2_000_000
    for box, pixels in zip(result.boxes, tiles_of(result), strict=True):
        assert np.abs(pixels[0] * 255 - scene.surface(box, pixels.shape[1])).max() < 2


def test_small_rasters_are_read_natively() -> None:
    scene = LargeScene(2000, 3000)
    config = imagery_config("fixed", tile_px=224)
    pack_scene(scene, plan_scene(2000, 3000, config), config)
    assert scene.pixels_read == [6_000_000]


def test_thin_scenes() -> None:
    wide = open_scene(np.full((1, 60_000, 3), 200, np.uint8))
    padded = imagery_config("fixed", fit="pad", pad_value=(50, 50, 50), mean=(0.0,) * 3, std=(1.0,) * 3)
    (tile,) = tiles_of(pack_scene(wide, plan_scene(1, 60_000, padded), padded))  # 3.6 Gpx if padded natively
    assert tile.shape == (3, 336, 336)
    assert tile[0, 0, 0] * 255 == pytest.approx(50)
    assert 50 < tile[0, 167:169].max() * 255 <= 200
    cropped = imagery_config("fixed", fit="crop")
    with pytest.raises(InputError, match="too thin for a canvas of 336 x 20160000"):
        pack_scene(wide, plan_scene(1, 60_000, cropped), cropped)
    dris = imagery_config("dris")
    assert pack_scene(wide, plan_scene(1, 60_000, dris), dris).num_tokens <= 2048


def test_a_plan_of_another_scene_is_refused() -> None:
    config = imagery_config("fixed")
    with pytest.raises(InputError, match="plan must be made for this scene of 10 x 20 px, got one for 20 x 10"):
        pack_scene(open_scene(picture(10, 20)), plan_scene(20, 10, config), config)
