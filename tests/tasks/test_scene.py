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
from rsvlm_infer.imagery.plan import Tile, TilePlan
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
    with pytest.raises(InputError, match=r'needs a checkpoint with grid_pinpoints, this one is made for "fixed"'):
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


def dris_plan(*scales: float, stopped: str = "max_tiles", **limits: int) -> TilePlan:
    """Leaves of 100 x 100 px side by side, each at one of `scales`."""
    base = Tile(0, 0, 100, 100 * len(scales), (2, 2), 0, 1.0, (28, 28))
    leaves = [Tile(0, 100 * index, 100, 100, (2, 2), 1, 1.0, (round(100 / scale),) * 2) for index, scale in enumerate(scales)]
    own = telling_config().dris
    budget: dict[str, int | str] = {"max_tiles": own.max_tiles, "max_visual_tokens": own.max_visual_tokens, "stopped": stopped}
    return TilePlan(100, 100 * len(scales), "dris", (base, *leaves), 14, budget=budget | limits)


def test_scale_warnings_name_best_worst_and_mean() -> None:
    config = telling_config(tiling="dris")
    assert scale_warnings(dris_plan(1.0, 1.0), 10.0, config) == ()
    advice = "crop the scene, or ask about a part of it, to keep more"
    assert scale_warnings(dris_plan(1.0, 4.0, 4.0, 1.0), 10.0, config) == (
        "scene was scaled down: ground sampling distance 10 to 40 m in the tiles (25 m on average over the scene), native 10 m; "
        + advice,
    )  # one native leaf does not silence it
    assert scale_warnings(dris_plan(2.0, 2.0), 10.0, config) == (
        f"scene was scaled down: ground sampling distance 20 m, native 10 m; {advice}",
    )
    assert scale_warnings(dris_plan(1.0, 4.0), None, config) == (
        "scene was scaled down 1.00 to 4.00 times in the tiles (2.50 on average over the scene), so details smaller than that are "
        f"lost; {advice}",
    )
    rounding = Tile(0, 0, 1009, 1009, (2, 2), 0, 1.0, (1000, 1000))
    assert scale_warnings(TilePlan(1009, 1009, "fixed", (rounding,), 14), None, config) == ()


@pytest.mark.parametrize(
    ("plan", "advice"),
    [
        (dris_plan(2.0, max_tiles=4), "raise max_tiles (up to 16) to keep more"),
        (
            dris_plan(2.0, max_tiles=4, max_visual_tokens=30),
            "raise max_tiles (up to 16) and max_visual_tokens (up to 128) to keep more",
        ),
        # at the checkpoint's own budget, beyond it, and where another limit stopped the splitting
        (dris_plan(2.0), "crop the scene, or ask about a part of it, to keep more"),
        (dris_plan(2.0, max_tiles=99), "crop the scene, or ask about a part of it, to keep more"),
        (dris_plan(2.0, max_visual_tokens=30), "crop the scene, or ask about a part of it, to keep more"),
        (dris_plan(2.0, stopped="min_gain", max_tiles=4), "crop the scene, or ask about a part of it, to keep more"),
    ],
)
def test_advice_stays_within_the_budget_of_the_checkpoint(plan: TilePlan, advice: str) -> None:
    (text,) = scale_warnings(plan, 10.0, telling_config(tiling="dris"))
    assert text.endswith(f"native 10 m; {advice}")


def test_a_budget_beyond_the_checkpoint_is_warned_about() -> None:
    def warnings(tiling: Any = "dris", **budget: int) -> tuple[str, ...]:
        return plan_image(noisy(28, 28), telling_config(), SceneSettings(tiling=tiling, **budget)).warnings

    made_for = "asked for, but the checkpoint was made for at most 128 visual tokens in 16 tiles, so the text may degrade; "
    assert warnings(max_visual_tokens=128, max_tiles=16) == ()
    (text,) = warnings(max_visual_tokens=129)
    assert text == f"max_visual_tokens=129 {made_for}lower the budget, or crop the scene to keep more detail"
    assert warnings(max_tiles=17)[0].startswith(f"max_tiles=17 {made_for}")
    assert warnings(max_tiles=17, max_visual_tokens=500)[0].startswith(f"max_tiles=17 and max_visual_tokens=500 {made_for}")
    assert warnings("fixed", max_visual_tokens=129) == ()  # one tile whatever the budget


def test_a_lowered_budget_is_advised_against_end_to_end() -> None:
    image = noisy(448, 448)
    config = telling_config(tiling="dris")
    (lowered,) = plan_image(image, config, SceneSettings(max_tiles=4)).warnings
    assert lowered.endswith("raise max_tiles (up to 16) to keep more")
    (own,) = plan_image(image, config, SceneSettings()).warnings
    assert own.endswith("crop the scene, or ask about a part of it, to keep more")


def test_ground_sampling_distance_is_the_mean_over_the_scene(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio", reason="needs rasterio")
    file = tmp_path / "scene.tif"
    transform = rasterio.transform.from_origin(500000, 4000000, 10, 10)
    profile = {"driver": "GTiff", "height": 112, "width": 112, "count": 3, "dtype": "uint8"}
    pixels = noisy(112, 112)
    pixels[:56, :56] = 9  # nothing to see: a leaf of 2 x 2 patches, 2 px to one; the others have 4 x 4
    with rasterio.open(file, "w", **profile, crs="EPSG:32633", transform=transform) as target:
        target.write(pixels.transpose(2, 0, 1))
    report = plan_image(file, telling_config(), SceneSettings())
    assert (report.gsd_native_m, report.gsd_effective_m) == (pytest.approx(10), pytest.approx(40))
    assert report.warnings == (
        'scene was scaled down: ground sampling distance 40 m, native 10 m; use tiling "dris" to keep more',
    )
    fine = prepare_scene(file, telling_config(), SceneSettings(tiling="dris"))
    assert fine.plan.scale_range == (1.0, 2.0)
    assert fine.gsd_effective_m == fine.packed.scene["gsd_effective_m"] == pytest.approx(12.5)
    (text,) = fine.warnings
    assert "distance 10 to 20 m in the tiles (12.5 m on average over the scene), native 10 m; crop the scene" in text
    assert fine.to_dict()["plan"]["num_patches"] == fine.plan.num_patches


@pytest.mark.parametrize("tiling", ["fixed", "anyres", "dris"])
def test_a_scene_without_a_valid_pixel_is_refused_and_one_with_few_warned_about(tiling: Any) -> None:
    config = telling_config(tiling=tiling, grid_pinpoints=((28, 56), (56, 56)))
    pixels = np.dstack([noisy(28, 28), np.zeros((28, 28), np.uint8)])
    for nothing in (Image.fromarray(pixels), np.full((28, 28), np.nan)):
        for use in (plan_image, prepare_scene):
            with pytest.raises(ImageReadError, match=r"has no valid pixel: all are nodata.*; check its nodata value and mask"):
                use(nothing, config, SceneSettings())
    pixels[3, 3:10, 3] = 255  # 7 of 784: 0.9 %
    (text,) = plan_image(Image.fromarray(pixels), config, SceneSettings()).warnings
    assert text == (
        "only 0.0089 of the scene's area is valid, less than the checkpoint's min_valid_fraction 0.01, so the result may have "
        "little to do with it; check its nodata value, or crop the scene to its valid part"
    )
    pixels[3, 10, 3] = 255  # 8 of 784: 1.02 %
    assert plan_image(Image.fromarray(pixels), config, SceneSettings()).warnings == ()


def test_a_raster_of_nodata_is_refused(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio", reason="needs rasterio")
    profile = {"driver": "GTiff", "height": 28, "width": 28, "count": 3, "dtype": "uint8"}
    for name, nodata in (("empty.tif", 0), ("black.tif", None)):
        with rasterio.open(tmp_path / name, "w", **profile, nodata=nodata) as target:
            target.write(np.zeros((3, 28, 28), np.uint8))
    with pytest.raises(ImageReadError, match=r"empty\.tif has no valid pixel"):
        plan_image(tmp_path / "empty.tif", telling_config(), SceneSettings())
    assert plan_image(tmp_path / "black.tif", telling_config(), SceneSettings()).warnings == ()


def test_a_scene_that_cannot_be_invalid_is_not_read_to_plan_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsvlm_infer.imagery.source.Scene.overview", lambda *_: pytest.fail("read for nothing"))
    assert plan_image(picture("red"), telling_config(), SceneSettings()).num_tokens == 4


@pytest.mark.parametrize("step", ["rsvlm_infer.imagery.source.Scene.overview", "rsvlm_infer.tasks.scene.pack_scene"])
def test_running_out_of_memory_is_an_error_of_that_image(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(step, exhausted)
    with pytest.raises(ImageReadError, match=r"array needs more memory than is free; lower max_pixels .*bands=\(1,\)"):
        prepare_scene(picture("red"), telling_config(tiling="dris"), SceneSettings())


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
