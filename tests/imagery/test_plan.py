"""The planner: fixed, anyres and dris geometry, budgets, and the guarantees of the quadtree."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsvlm_infer.config import DrisConfig
from rsvlm_infer.errors import ConfigError, InputError
from rsvlm_infer.imagery.complexity import ComplexityMap
from rsvlm_infer.imagery.plan import Tile, TilePlan, Window, anyres_kept_window, count_tokens, plan_scene
from tests.imagery.configs import imagery_config

DRIS = imagery_config("dris", tile_px=56, dris=DrisConfig(max_tiles=30, max_patches=3000, max_visual_tokens=3000, max_depth=5))


def complexity_of(seed: int, height: int, width: int, invalid: float = 0.0) -> ComplexityMap:
    """A scene of patches that are flat, textured or invalid, shown by an overview of up to 64 px."""
    rng = np.random.default_rng(seed)
    rows, cols = min(height, 64), min(width, 64)
    rgb = rng.integers(0, 256, (rows, cols, 3), dtype=np.uint8)
    flat = np.kron(rng.random((8, 8)) < 0.4, np.ones((8, 8), bool))[:rows, :cols]
    rgb[flat] = 120
    mask = ~np.kron(rng.random((8, 8)) < invalid, np.ones((8, 8), bool))[:rows, :cols]
    return ComplexityMap(rgb, mask, DrisConfig())


# --- token table -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "layout", "tiles", "tokens"),
    [
        (256, 256, (1, 2), 3, 1176),
        (512, 512, (2, 2), 5, 2928),
        (4000, 4000, (2, 2), 5, 2928),
        (1000, 600, (2, 2), 5, 1948),
    ],
)
def test_token_table(width: int, height: int, layout: tuple[int, int], tiles: int, tokens: int) -> None:
    llava = imagery_config("fixed")
    assert count_tokens(plan_scene(height, width, llava), llava) == 576
    geochat = imagery_config("fixed", tile_px=504)
    assert count_tokens(plan_scene(height, width, geochat), geochat) == 1296
    llava_next = imagery_config("anyres")
    plan = plan_scene(height, width, llava_next)
    assert plan.layout == layout
    assert len(plan.tiles) == tiles
    assert count_tokens(plan, llava_next) == tokens


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_anyres_counts_equal_transformers(height: int, width: int) -> None:
    processing = pytest.importorskip("transformers.models.llava_next.processing_llava_next")
    processor = object.__new__(processing.LlavaNextProcessor)
    config = imagery_config("anyres")
    processor.image_processor = type("Pinpoints", (), {"image_grid_pinpoints": [list(p) for p in config.grid_pinpoints]})
    processor.patch_size, processor.num_additional_image_tokens = 14, 0
    expected = processor._get_number_of_features(height, width, 336, 336)
    assert count_tokens(plan_scene(height, width, config), config) == expected


def test_pixel_shuffle_quarters_the_tokens() -> None:
    for tiling, tokens in (("fixed", 144), ("dris", 144 + 4 * 64)):
        config = imagery_config(tiling, pixel_shuffle=2, dris=DrisConfig(max_depth=1))
        assert count_tokens(plan_scene(2000, 2000, config), config) == tokens
    config = imagery_config("anyres", pixel_shuffle=2)
    plan = plan_scene(600, 1000, config)
    assert anyres_kept_window(plan, config) == (5, 19, 0, 24)
    assert count_tokens(plan, config) == 144 + 14 * 25


# --- fixed and anyres geometry -----------------------------------------------------------------------------------------------


def test_fixed_pad_reaches_beyond_the_scene_as_expand2square_does() -> None:
    (tile,) = plan_scene(300, 501, imagery_config("fixed", fit="pad")).tiles
    assert tile == Tile(-100, 0, 501, 501, (24, 24), 0, 1.0, (336, 336), (0, 0))
    (tile,) = plan_scene(501, 300, imagery_config("fixed", fit="pad")).tiles
    assert tile == Tile(0, -100, 501, 501, (24, 24), 0, 1.0, (336, 336), (0, 0))


def test_fixed_crop_resizes_the_shortest_edge() -> None:
    (tile,) = plan_scene(300, 501, imagery_config("fixed", fit="crop")).tiles
    assert tile == Tile(0, 0, 300, 501, (24, 24), 0, 1.0, (336, 561), (0, 112))
    (tile,) = plan_scene(501, 300, imagery_config("fixed", fit="crop")).tiles
    assert tile == Tile(0, 0, 501, 300, (24, 24), 0, 1.0, (561, 336), (112, 0))


def test_fixed_stretch_and_a_tile_that_is_no_multiple_of_the_patch() -> None:
    (tile,) = plan_scene(300, 501, imagery_config("fixed", tile_px=384, family="siglip")).tiles
    assert tile == Tile(0, 0, 300, 501, (27, 27), 0, 1.0, (384, 384), (0, 0))


def test_anyres_tiles_are_cut_from_one_padded_canvas() -> None:
    plan = plan_scene(600, 1000, imagery_config("anyres"))
    assert plan.tiles[0] == Tile(0, 0, 600, 1000, (24, 24), 0, 1.0, (336, 336), (0, 0))
    assert [tile.canvas for tile in plan.tiles[1:]] == [(404, 672)] * 4
    assert [tile.crop for tile in plan.tiles[1:]] == [(-134, 0), (-134, 336), (202, 0), (202, 336)]


def test_boxes_are_the_part_of_the_scene_that_a_tile_shows() -> None:
    np.testing.assert_allclose(plan_scene(300, 600, imagery_config("fixed", fit="crop")).boxes, [[0.5, 0.5, 0.5, 1.0]])
    np.testing.assert_allclose(plan_scene(300, 600, imagery_config("fixed", fit="pad")).boxes, [[0.5, 0.5, 1.0, 1.0]])
    np.testing.assert_allclose(
        plan_scene(672, 672, imagery_config("anyres")).boxes,
        [[0.5, 0.5, 1, 1], [0.25, 0.25, 0.5, 0.5], [0.75, 0.25, 0.5, 0.5], [0.25, 0.75, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]],
    )
    half = plan_scene(256, 256, imagery_config("anyres")).boxes  # 336 px in the middle of 336 x 672
    np.testing.assert_allclose(half[1:], [[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]])
    siglip = plan_scene(384, 384, imagery_config("fixed", tile_px=384, family="siglip")).boxes
    np.testing.assert_allclose(siglip, [[378 / 768, 378 / 768, 378 / 384, 378 / 384]], rtol=1e-6)


# --- dris, by example --------------------------------------------------------------------------------------------------------


def test_a_small_scene_is_its_base_tile() -> None:
    plan = plan_scene(56, 40, DRIS)
    assert len(plan.tiles) == 1
    assert plan.tiles[0] == Tile(0, 0, 56, 40, (4, 4), 0, 1.0, (56, 56))
    assert plan.dropped == ()
    assert plan.budget["stopped"] == "resolved"


def test_without_complexity_the_plan_is_the_longest_one() -> None:
    plan = plan_scene(448, 448, imagery_config("dris", dris=DrisConfig(max_visual_tokens=10_000)))
    # 448 px: four leaves of 224 px, each at 16 x 16 patches and so fully resolved
    assert [(tile.row_off, tile.col_off, tile.height, tile.width, tile.grid) for tile in plan.tiles[1:]] == [
        (0, 0, 224, 224, (16, 16)),
        (0, 224, 224, 224, (16, 16)),
        (224, 0, 224, 224, (16, 16)),
        (224, 224, 224, 224, (16, 16)),
    ]
    assert plan.budget == {
        "tiles": 5,
        "patches": 1600,
        "visual_tokens": 1600,
        "max_tiles": 64,
        "max_patches": 16384,
        "max_visual_tokens": 10_000,
        "stopped": "resolved",
    }
    assert plan.scale == 1.0
    assert plan.scale_range == (1.0, 1.0)


def test_scale_is_the_mean_over_the_area_of_what_represents_the_scene() -> None:
    def tile(row: int, height: int, width: int, side: int) -> Tile:
        return Tile(row, 0, height, width, (side // 14, side // 14), 1, 1.0, (side, side))

    base = tile(0, 400, 400, 28)
    leaves = (tile(0, 100, 400, 400), tile(100, 300, 400, 100))  # native (never below 1.0), and 4 px to one
    plan = TilePlan(400, 400, "dris", (base, *leaves), 14)
    assert plan.scale_range == (1.0, 4.0)
    assert plan.scale == 0.25 * 1.0 + 0.75 * 4.0  # the base tile's 14.3 does not count beside leaves
    partly = TilePlan(400, 400, "dris", (base, leaves[1]), 14, dropped=(Window(0, 0, 100, 400),))
    assert (partly.scale, partly.scale_range) == (4.0, (4.0, 4.0))  # what was dropped does not count
    alone = TilePlan(400, 400, "dris", (base,), 14)
    assert (alone.scale, alone.scale_range) == (400 / 28, (400 / 28, 400 / 28))


def test_scale_of_anyres_is_that_of_its_grid_and_of_fixed_that_of_its_tile() -> None:
    assert plan_scene(1344, 1344, imagery_config("anyres")).scale == 2.0  # 672 x 672 in 2 x 2 tiles; the base tile has 4.0
    assert plan_scene(672, 1344, imagery_config("fixed", fit="pad")).scale == 4.0
    assert plan_scene(672, 1344, imagery_config("fixed", fit="crop")).scale == 2.0


def test_long_windows_are_halved_and_others_quartered() -> None:
    once = dataclasses.replace(DRIS, dris=DrisConfig(max_depth=1))

    def windows(height: int, width: int) -> list[tuple[int, int, int, int]]:
        return [(tile.row_off, tile.col_off, tile.height, tile.width) for tile in plan_scene(height, width, once).tiles[1:]]

    assert windows(300, 451) == [(0, 0, 300, 226), (0, 226, 300, 225)]  # longer than 3:2
    assert windows(451, 300) == [(0, 0, 226, 300), (226, 0, 225, 300)]
    assert windows(300, 450) == [(0, 0, 150, 225), (0, 225, 150, 225), (150, 0, 150, 225), (150, 225, 150, 225)]  # exactly 3:2
    assert windows(1, 5000) == [(0, 0, 1, 2500), (0, 2500, 1, 2500)]


def test_leaf_grid_follows_complexity_but_not_beyond_native_pixels() -> None:
    config = dataclasses.replace(DRIS, dris=DrisConfig(max_depth=1, max_visual_tokens=5000, max_patches=5000))
    assert plan_scene(2000, 2000, config).tiles[1].grid == (16, 16)
    assert plan_scene(200, 200, config).tiles[1].grid == (8, 8)  # 100 px need 8 patches of 14
    assert plan_scene(100, 140, config).tiles[1].grid == (4, 8)  # 50 and 70 px
    rgb = np.full((64, 64, 3), 100, np.uint8)
    rgb[32:, 32:] = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    rgb[:32, 32:, :] = 100 + 30 * (np.arange(32) % 16 < 8)[:, None]
    tiles = plan_scene(2000, 2000, config, complexity=ComplexityMap(rgb, np.ones((64, 64), bool), DrisConfig())).tiles[1:]
    assert [tile.grid for tile in tiles] == [(4, 4), (8, 8), (4, 4), (16, 16)]
    assert tiles[0].complexity < 0.01  # its rim sees the edges next door
    assert 0.15 <= tiles[1].complexity < 0.35 <= tiles[3].complexity


def test_the_most_complex_window_is_split_first() -> None:
    rgb = np.full((64, 64, 3), 100, np.uint8)
    rgb[:32, 32:] = np.random.default_rng(0).integers(0, 256, (32, 32, 3))  # top right
    config = dataclasses.replace(DRIS, dris=DrisConfig(max_tiles=8, min_gain=0.01))
    plan = plan_scene(2048, 2048, config, complexity=ComplexityMap(rgb, np.ones((64, 64), bool), DrisConfig()))
    assert len(plan.tiles) == 8
    assert [(tile.row_off, tile.col_off) for tile in plan.tiles[1:] if tile.depth == 2] == [
        (0, 1024),
        (0, 1536),
        (512, 1024),
        (512, 1536),
    ]
    assert plan.budget["stopped"] == "max_tiles"


def test_relevance_moves_the_refinement() -> None:
    config = dataclasses.replace(DRIS, dris=DrisConfig(max_tiles=8))
    relevance = np.zeros((4, 4), np.float32)
    relevance[3, 0] = 1.0
    plan = plan_scene(2048, 2048, config, relevance=relevance)
    assert [(tile.row_off, tile.col_off) for tile in plan.tiles[1:] if tile.depth == 2] == [
        (1024, 0),
        (1024, 512),
        (1536, 0),
        (1536, 512),
    ]
    assert len(plan_scene(2048, 2048, config, relevance=np.zeros((1, 1))).tiles) == 1
    with pytest.raises(InputError, match="relevance must be a non-empty array"):
        plan_scene(2048, 2048, config, relevance=np.zeros(4))


def test_windows_without_valid_pixels_are_dropped_and_reported() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    mask = np.ones((64, 64), bool)
    mask[:32, :32] = False
    mask[0, :3] = True  # 3 of 1024 pixels
    config = dataclasses.replace(DRIS, dris=DrisConfig(max_depth=1))
    plan = plan_scene(1000, 1000, config, complexity=ComplexityMap(rgb, mask, DrisConfig()))
    assert plan.dropped == (Window(0, 0, 500, 500),)
    assert [(tile.row_off, tile.col_off) for tile in plan.tiles[1:]] == [(0, 500), (500, 0), (500, 500)]
    assert plan.budget["tiles"] == 4
    assert plan.budget["stopped"] == "max_depth"


def test_stop_reasons() -> None:
    def stopped(**dris: Any) -> object:
        return plan_scene(4000, 4000, dataclasses.replace(DRIS, dris=DrisConfig(**dris))).budget["stopped"]

    assert stopped(max_tiles=4) == "max_tiles"
    assert stopped(max_patches=500) == "max_patches"
    assert stopped(max_visual_tokens=500) == "max_visual_tokens"
    assert stopped(max_depth=1) == "max_depth"
    assert stopped(min_gain=1.0) == "min_gain"
    flat = ComplexityMap(np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), bool), DrisConfig())
    plan = plan_scene(4000, 4000, DRIS, complexity=flat)
    assert (len(plan.tiles), plan.budget["stopped"]) == (1, "min_gain")
    assert plan.scale == 4000 / 56


def test_a_scene_without_valid_pixels_is_its_base_tile() -> None:
    nothing = ComplexityMap(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), bool), DrisConfig())
    plan = plan_scene(4000, 4000, DRIS, complexity=nothing)
    assert (len(plan.tiles), plan.dropped) == (1, ())


def test_contract_is_checked() -> None:
    with pytest.raises(InputError, match="height and width must be at least 1"):
        plan_scene(0, 5, DRIS)
    with pytest.raises(InputError, match=r"tiling must be one of \['fixed', 'anyres', 'dris'\], got 'quad'"):
        plan_scene(5, 5, DRIS, tiling="quad")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"multiples of preprocess\.tile_px 56"):
        plan_scene(5, 5, imagery_config("fixed", tile_px=56, pinpoints=((56, 100),)), tiling="anyres")
    with pytest.raises(ConfigError, match=r"needs grid_pinpoints .* got \[\]"):
        plan_scene(5, 5, imagery_config("fixed", pinpoints=()), tiling="anyres")
    with pytest.raises(ConfigError, match=r"dris.max_visual_tokens must hold the base tile \(576 patches"):
        plan_scene(5, 5, imagery_config("dris", dris=DrisConfig(max_visual_tokens=575)))
    with pytest.raises(InputError, match=r'plan\.tiling must be "anyres"'):
        anyres_kept_window(plan_scene(5, 5, DRIS), DRIS)


def test_tiling_argument_overrides_the_config() -> None:
    config = imagery_config("dris")
    assert [plan_scene(700, 700, config, tiling=tiling).tiling for tiling in ("fixed", "anyres", "dris")] == [
        "fixed",
        "anyres",
        "dris",
    ]
    assert plan_scene(700, 700, config).tiling == "dris"


def test_to_dict_is_json() -> None:
    plan = plan_scene(600, 1000, imagery_config("anyres"))
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["layout"] == [2, 2]
    assert values["num_patches"] == 5 * 576
    assert values["tiles"][1] == {
        "row_off": 0,
        "col_off": 0,
        "height": 600,
        "width": 1000,
        "grid": [24, 24],
        "depth": 1,
        "complexity": 1.0,
        "canvas": [404, 672],
        "crop": [-134, 0],
    }


# --- dris, by property -------------------------------------------------------------------------------------------------------

scenes = st.tuples(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 10_000), st.sampled_from([0.0, 0.3, 0.9]))
budgets = st.fixed_dictionaries(
    {
        "max_tiles": st.integers(1, 64),
        "max_patches": st.integers(16, 4000),
        "max_visual_tokens": st.integers(16, 4000),
        "min_gain": st.sampled_from([0.0, 0.05, 0.4]),
        "max_depth": st.integers(0, 6),
    }
)


def plan_of(scene: tuple[int, int, int, float], **dris: Any) -> TilePlan:
    height, width, seed, invalid = scene
    config = dataclasses.replace(DRIS, dris=dataclasses.replace(DRIS.dris, **dris))
    return plan_scene(height, width, config, complexity=complexity_of(seed, height, width, invalid))


def inside(inner: Window, outer: Window) -> bool:
    return (
        outer.row_off <= inner.row_off
        and outer.col_off <= inner.col_off
        and inner.row_off + inner.height <= outer.row_off + outer.height
        and inner.col_off + inner.width <= outer.col_off + outer.width
    )


@given(scenes, budgets)
@settings(max_examples=150)
def test_leaves_and_dropped_windows_partition_the_scene(scene: tuple[int, int, int, float], budget: dict[str, Any]) -> None:
    plan = plan_of(scene, **budget)
    base, *leaves = plan.tiles
    assert (base.row_off, base.col_off, base.height, base.width) == (0, 0, *scene[:2])
    if not leaves:
        assert plan.dropped == ()
        return
    covered = np.zeros(scene[:2], dtype=np.uint8)
    for window in (*leaves, *plan.dropped):
        assert min(window.height, window.width) >= 1
        covered[window.row_off : window.row_off + window.height, window.col_off : window.col_off + window.width] += 1
    assert covered.min() == covered.max() == 1
    assert [(tile.row_off, tile.col_off) for tile in leaves] == sorted((tile.row_off, tile.col_off) for tile in leaves)


@given(scenes, budgets)
@settings(max_examples=150)
def test_budgets_hold_and_leaves_are_no_finer_than_their_pixels(
    scene: tuple[int, int, int, float], budget: dict[str, Any]
) -> None:
    plan = plan_of(scene, **budget)
    assert len(plan.tiles) <= budget["max_tiles"]
    assert plan.num_patches <= budget["max_patches"]
    assert count_tokens(plan, DRIS) <= budget["max_visual_tokens"]
    assert plan.budget["tiles"] == len(plan.tiles)
    assert plan.budget["patches"] == plan.num_patches == plan.cu_seqlens[-1]
    assert (np.diff(plan.cu_seqlens) == plan.grids.prod(axis=1)).all()
    for tile in plan.tiles[1:]:
        assert 1 <= tile.depth <= budget["max_depth"]
        for grid, side, canvas in zip(tile.grid, (tile.height, tile.width), tile.canvas, strict=True):
            assert grid in DRIS.dris.leaf_grids
            assert canvas == grid * 14
            assert grid == 4 or (grid // 2) * 14 < side  # the next smaller grid would not do


@given(scenes, budgets, st.integers(0, 40), st.integers(0, 3000))
@settings(max_examples=150)
def test_a_larger_budget_refines_the_smaller_plan(
    scene: tuple[int, int, int, float], budget: dict[str, Any], more_tiles: int, more_tokens: int
) -> None:
    small = plan_of(scene, **budget)
    larger = budget | {
        "max_tiles": budget["max_tiles"] + more_tiles,
        "max_patches": budget["max_patches"] + more_tokens,
        "max_visual_tokens": budget["max_visual_tokens"] + more_tokens,
    }
    large = plan_of(scene, **larger)
    assert set(small.dropped) <= set(large.dropped)
    coarse = small.tiles[1:] or small.tiles[:1]
    for leaf in large.tiles[1:]:
        assert sum(inside(leaf, window) for window in coarse) == 1
    kept = set(large.tiles)
    for window in small.tiles[1:]:
        children = [leaf for leaf in (*large.tiles[1:], *large.dropped) if inside(leaf, window)]
        assert window in kept or sum(leaf.height * leaf.width for leaf in children) == window.height * window.width


@given(scenes, budgets)
@settings(max_examples=50)
def test_the_same_plan_on_every_run(scene: tuple[int, int, int, float], budget: dict[str, Any]) -> None:
    assert plan_of(scene, **budget) == plan_of(scene, **budget)


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from(["fixed", "anyres", "dris"]))
@settings(max_examples=100)
def test_boxes_stay_in_the_scene(height: int, width: int, tiling: Any) -> None:
    boxes = plan_scene(height, width, imagery_config(tiling, dris=DrisConfig(max_visual_tokens=3000))).boxes
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    assert low.min() >= -1e-6
    assert high.max() <= 1 + 1e-6
    assert boxes[:, 2:].min() >= 0
