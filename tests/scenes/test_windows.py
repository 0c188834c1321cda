"""Windows cover a scene once, at places that do not depend on its extent; what holds nothing is left out and counted."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsvlm_infer.errors import InputError
from rsvlm_infer.imagery.source import ArrayScene, open_scene
from rsvlm_infer.scenes.record import GridWindow, PixelWindow
from rsvlm_infer.scenes.windows import Grid, GridSpec, select, spans, total_px

SIDES = st.integers(1, 6000)
SPECS = st.integers(1, 2000).flatmap(lambda window: st.builds(GridSpec, st.just(window), st.integers(0, window // 2)))


@given(SIDES, SPECS)
def test_cores_cover_a_side_once_inside_their_windows(side: int, spec: GridSpec) -> None:
    found = spans(side, spec)
    assert found[0].core_start == 0
    assert found[-1].core_start + found[-1].core_length == side
    for span, following in itertools.pairwise(found):
        assert span.core_start + span.core_length == following.core_start
        assert span.start < following.start
    for span in found:
        assert span.core_length >= 1
        assert span.length == min(side, spec.window_px)  # full, where the side has room for it
        assert 0 <= span.start <= span.core_start
        assert span.core_start + span.core_length <= span.start + span.length <= side


@given(SIDES, SPECS)
def test_neighbours_share_at_least_the_overlap_and_no_window_is_needless(side: int, spec: GridSpec) -> None:
    found = spans(side, spec)
    for span, following in itertools.pairwise(found):
        assert span.start + span.length - following.start >= spec.overlap_px
    assert len(found) == 1 or found[-2].start + spec.window_px < side


@given(st.integers(1, 6000), st.integers(1, 6000), SPECS)
def test_a_grid_covers_every_pixel_of_a_scene_once(height: int, width: int, spec: GridSpec) -> None:
    grid = Grid(height, width, spec)
    assert total_px(list(grid)) == height * width if len(grid) < 2000 else True
    corners = {(place.core.row_off, place.core.col_off) for place in grid[:2000]}
    assert len(corners) == len(grid[:2000])
    assert [place.index for place in grid[:50]] == list(range(min(50, len(grid))))
    assert grid[-1].core.row_off + grid[-1].core.height == height


@given(SIDES, SIDES, SPECS)
def test_a_crop_at_a_step_has_the_same_windows(offset: int, side: int, spec: GridSpec) -> None:
    """Of the inner windows; only the last one moves inwards."""
    steps = offset // spec.step_px
    whole, crop = spans(offset + side, spec), spans(side, spec)
    for index, span in enumerate(crop[:-1]):
        same = whole[steps + index] if steps + index < len(whole) - 1 else None
        if same is not None:
            assert same.start - steps * spec.step_px == span.start
            assert same.length == span.length
            if index > 0 and index < len(crop) - 2 and steps + index < len(whole) - 2:
                assert same.core_start - steps * spec.step_px == span.core_start
                assert same.core_length == span.core_length


def test_one_window_without_a_grid() -> None:
    (place,) = Grid(30, 40, None)
    assert place == GridWindow(0, PixelWindow(0, 0, 30, 40), PixelWindow(0, 0, 30, 40))


def test_places_by_hand() -> None:
    grid = Grid(10, 25, GridSpec(10, 4))
    assert [place.window.col_off for place in grid] == [0, 6, 12, 15]
    assert [(place.core.col_off, place.core.width) for place in grid] == [(0, 8), (8, 6), (14, 4), (18, 7)]
    assert grid[-1] == grid[3]
    assert grid[1:3] == [grid[1], grid[2]]
    with pytest.raises(IndexError):
        grid[4]


@pytest.mark.parametrize(
    ("window", "overlap", "message"),
    [
        (0, 0, "window_px must be in 1..5792, got 0"),
        (6000, 0, "window_px must be in 1..5792, got 6000"),
        (100, 51, r"overlap_px must be in 0..50 \(half of window_px 100\), got 51"),
        (100, -1, "overlap_px must be in 0..50"),
        (1.5, 0, "window_px must be a whole number"),
    ],
)
def test_a_grid_out_of_range(window: int, overlap: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GridSpec(window, overlap)


# --- what is left out --------------------------------------------------------------------------------------------------------


def scene_of(pixels: np.ndarray, mask: np.ndarray | None = None) -> ArrayScene:
    return ArrayScene(pixels, mask, name="test")


def kinds(scene: ArrayScene, spec: GridSpec) -> tuple[set[tuple[int, int]], int, int]:
    chosen = select(scene, Grid(scene.height, scene.width, spec))
    return {(place.window.row_off, place.window.col_off) for place in chosen.windows}, chosen.empty_px, chosen.uniform_px


def test_empty_and_uniform_windows_are_left_out_and_counted() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    mask = np.ones((120, 160), bool)
    mask[:40, :40] = False
    pixels[80:, 120:] = 77
    assert kinds(scene_of(pixels, mask), GridSpec(40)) == (
        {(row, col) for row in (0, 40, 80) for col in (0, 40, 80, 120)} - {(0, 0), (80, 120)},
        1600,
        1600,
    )


def test_one_valid_pixel_or_one_other_colour_keeps_a_window() -> None:
    pixels = np.full((80, 80, 3), 9, np.uint8)
    mask = np.ones((80, 80), bool)
    mask[:40, :40] = False
    mask[3, 5:7] = True
    pixels[3, 6] = 10
    pixels[79, 79] = 10
    found, empty, uniform = kinds(scene_of(pixels, mask), GridSpec(40))
    assert found == {(0, 0), (40, 40)}
    assert (empty, uniform) == (0, 3200)


@given(st.integers(0, 2**32 - 1), st.integers(20, 90), st.integers(0, 10))
def test_what_is_left_out_is_what_the_pixels_say(seed: int, window: int, overlap: int) -> None:
    """Also where the overview is coarser than a window: it decides nothing that the pixels do not."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(30, 400, 2)
    pixels = np.repeat(
        rng.integers(0, 2, (height, width, 1), dtype=np.uint8) * (rng.random((height, width, 1)) < 0.002), 3, axis=2
    )
    mask = np.zeros((height, width), bool)
    mask[rng.integers(0, height) :, rng.integers(0, width) :] = True
    scene = scene_of(pixels.astype(np.uint8), mask)
    grid = Grid(int(height), int(width), GridSpec(window, overlap))
    chosen = select(scene, grid)
    if len(grid) == 1:
        assert chosen.windows == (grid[0],)
        return
    expected = {"empty": 0, "uniform": 0}
    kept = []
    for place in grid:
        cut = np.s_[place.window.row_off :, place.window.col_off :]
        own = pixels[cut][: place.window.height, : place.window.width]
        valid = mask[cut][: place.window.height, : place.window.width]
        area = place.core.height * place.core.width
        if not valid.any():
            expected["empty"] += area
        elif len(np.unique(own[valid], axis=0)) == 1:
            expected["uniform"] += area
        else:
            kept.append(place)
    assert chosen.windows == tuple(kept)
    assert (chosen.empty_px, chosen.uniform_px) == (expected["empty"], expected["uniform"])
    assert total_px(chosen.windows) + chosen.empty_px + chosen.uniform_px == height * width


def test_an_overview_that_is_coarser_than_the_grid_still_tells_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsvlm_infer.imagery.source.OVERVIEW_PX", 16)
    pixels = np.zeros((320, 320), np.uint8)
    pixels[::2, ::2] = 200  # a pattern whose means are all equal
    pixels[:80, :80] = 50
    with open_scene(pixels) as scene:
        chosen = select(scene, Grid(320, 320, GridSpec(80)))
    assert len(chosen.windows) == 15
    assert chosen.uniform_px == 6400
