"""From an image to packed patches: overrides, scale warnings, query-aware plans."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rsvlm_infer.errors import ConfigError, ImageReadError, InputError
from rsvlm_infer.imagery.pack import PackedScene
from rsvlm_infer.tasks.scene import SceneSettings, plan_image, prepare_scene, scale_warnings, source_name
from tests.tasks.telling_model import picture, telling_config


def noisy(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_fixed_tiling_packs_one_tile_and_times_each_stage() -> None:
    prepared = prepare_scene(picture("red", 56, 56), telling_config(), SceneSettings())
    assert prepared.num_tokens == prepared.packed.num_tokens == 4
    assert prepared.packed.patches.shape == (4, 3 * 14 * 14)
    assert prepared.source == "<array>"
    assert min(prepared.read_ms, prepared.plan_ms, prepared.preprocess_ms) > 0
    assert prepared.warnings == (
        'scene was scaled down 2.00 times, so details smaller than that are lost; use tiling "dris" to keep more',
    )


def test_a_scene_of_the_tile_size_loses_nothing() -> None:
    assert plan_image(picture("red"), telling_config(), SceneSettings()).warnings == ()


def test_budget_overrides_bound_a_dris_plan() -> None:
    image = noisy(224, 224)
    wide = plan_image(image, telling_config(), SceneSettings(tiling="dris"))
    assert (len(wide.plan.tiles), wide.num_tokens) == (8, 4 + 7 * 16)
    assert len(plan_image(image, telling_config(), SceneSettings(tiling="dris", max_tiles=4)).plan.tiles) == 1
    assert plan_image(image, telling_config(), SceneSettings(tiling="dris", max_visual_tokens=30)).num_tokens == 4
    with pytest.raises(ConfigError, match="max_visual_tokens must hold the base tile"):
        plan_image(image, telling_config(), SceneSettings(tiling="dris", max_visual_tokens=3))


def test_a_budget_below_a_fixed_plan_is_refused() -> None:
    with pytest.raises(InputError, match=r'max_visual_tokens must be at least 4 with tiling "fixed", got 3'):
        plan_image(picture("red"), telling_config(), SceneSettings(max_visual_tokens=3))


def test_anyres_needs_a_checkpoint_made_for_it() -> None:
    with pytest.raises(InputError, match=r'needs a LLaVA-NeXT checkpoint with grid_pinpoints, this one is made for "fixed"'):
        plan_image(picture("red"), telling_config(), SceneSettings(tiling="anyres"))
    config = telling_config(tiling="anyres", grid_pinpoints=((28, 56), (56, 56)))
    report = plan_image(picture("red", 56, 56), config, SceneSettings())
    assert (report.plan.layout, report.num_tokens) == ((2, 2), 4 + 4 * 5)
    assert plan_image(picture("red"), config, SceneSettings(tiling="fixed")).num_tokens == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tiling": "huge"}, 'tiling must be "fixed", "anyres" or "dris"'),
        ({"max_tiles": 0}, "max_tiles must be at least 1, got 0"),
        ({"max_pixels": 0}, "max_pixels must be at least 1, got 0"),
        ({"max_visual_tokens": -1}, "max_visual_tokens must be at least 1, got -1"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SceneSettings(**changes)


def test_max_pixels_and_bands_reach_the_reader(tmp_path: Path) -> None:
    file = tmp_path / "red.png"
    Image.fromarray(picture("red")).save(file)
    with pytest.raises(ImageReadError, match="more than max_pixels=100"):
        plan_image(file, telling_config(), SceneSettings(max_pixels=100))
    with pytest.raises(InputError, match="bands must be 1 or 3 numbers"):
        plan_image(file, telling_config(), SceneSettings(bands=(1, 2)))
    prepared = prepare_scene(file, telling_config(), SceneSettings(bands=[3, 2, 1]))  # type: ignore[arg-type]
    colours = prepared.packed.patches.reshape(4, 3, -1).mean(axis=(0, 2))
    np.testing.assert_allclose(colours, (np.array([10, 10, 200]) / 255 - 0.5) / 0.5, atol=1e-5)


def test_scale_warnings_name_both_distances() -> None:
    assert scale_warnings(1.0, 10.0, "fixed") == ()
    assert scale_warnings(1.009, None, "fixed") == ()
    (text,) = scale_warnings(2.5, 10.0, "dris")
    assert text == (
        "scene was scaled down: effective ground sampling distance 25 m is coarser than the native 10 m; raise max_tiles and "
        "max_visual_tokens to keep more"
    )


def test_ground_sampling_distance_follows_the_finest_tile(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio", reason="needs rasterio")
    file = tmp_path / "scene.tif"
    transform = rasterio.transform.from_origin(500000, 4000000, 10, 10)
    profile = {"driver": "GTiff", "height": 112, "width": 112, "count": 3, "dtype": "uint8"}
    with rasterio.open(file, "w", **profile, crs="EPSG:32633", transform=transform) as target:
        target.write(noisy(112, 112).transpose(2, 0, 1))
    report = plan_image(file, telling_config(), SceneSettings())
    assert (report.gsd_native_m, report.gsd_effective_m) == (pytest.approx(10), pytest.approx(40))
    assert "effective ground sampling distance 40 m" in report.warnings[0]
    fine = plan_image(file, telling_config(), SceneSettings(tiling="dris"))
    assert fine.gsd_effective_m == pytest.approx(10)
    assert fine.warnings == ()
    assert fine.to_dict()["plan"]["num_patches"] == fine.plan.num_patches


def test_a_query_aware_plan_refines_where_the_scores_point() -> None:
    config = telling_config(tiling="dris")
    config = dataclasses.replace(
        config, dris=dataclasses.replace(config.dris, max_tiles=13, max_visual_tokens=512, max_depth=4)
    )
    image = noisy(448, 448)
    seen: list[PackedScene] = []

    def bottom_right(packed: PackedScene) -> np.ndarray:
        seen.append(packed)
        return (packed.boxes[:, 0] + packed.boxes[:, 1] - packed.boxes[:, 2]).astype(np.float32)

    blind = prepare_scene(image, config, SceneSettings())
    aware = prepare_scene(image, config, SceneSettings(), bottom_right)
    assert len(seen) == 1
    assert max(tile.depth for tile in seen[0].plan.tiles) <= 2
    corner = [tile for tile in aware.plan.tiles if tile.depth >= 2]
    assert corner
    assert all(tile.row_off >= 224 or tile.col_off >= 224 for tile in corner)
    assert aware.plan != blind.plan


def test_a_scene_too_small_for_a_coarse_pass_is_planned_once() -> None:
    def never(_: PackedScene) -> np.ndarray:
        raise AssertionError("no coarse pass was expected")

    config = telling_config(tiling="dris")
    assert prepare_scene(picture("red"), config, SceneSettings(), never).num_tokens == 4
    fixed = SceneSettings(tiling="fixed")
    assert prepare_scene(noisy(448, 448), config, fixed, never).num_tokens == 4


def test_names_of_sources(tmp_path: Path) -> None:
    assert source_name(tmp_path / "a.tif") == str(tmp_path / "a.tif")
    assert source_name("a.tif") == "a.tif"
    assert source_name(b"123") == "<bytes>"
    assert source_name(np.zeros((2, 2))) == "<array>"
    assert source_name(Image.new("RGB", (2, 2))) == "<Image>"
    file = tmp_path / "b.png"
    Image.new("RGB", (2, 2)).save(file)
    with Image.open(file) as image:
        assert source_name(image) == str(file)
