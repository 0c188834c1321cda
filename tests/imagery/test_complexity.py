"""Complexity against a direct computation, and in scene pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from rsvlm_infer.config import DrisConfig
from rsvlm_infer.errors import InputError
from rsvlm_infer.imagery.complexity import DEVIATION_FULL, EDGE_FULL, ComplexityMap, to_grey

RNG = np.random.default_rng(7)
NOISE = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)
EVERYWHERE = np.ones((40, 60), bool)


def direct(grey: np.ndarray, top: int, left: int, height: int, width: int) -> tuple[float, float, float]:
    """Entropy, edges and deviation of a window, without integral images."""
    part = grey[top : top + height, left : left + width].astype(float)
    shares = np.bincount((part.astype(int) // 16).ravel(), minlength=16) / part.size
    entropy = -sum(share * math.log(share) for share in shares if share > 0) / math.log(16)
    padded = np.pad(grey.astype(float), 1, mode="edge")
    height_all, width_all = grey.shape
    around = {(y, x): padded[1 + y : 1 + y + height_all, 1 + x : 1 + x + width_all] for y in (-1, 0, 1) for x in (-1, 0, 1)}
    gx = sum(weight * (around[y, 1] - around[y, -1]) for y, weight in ((-1, 1), (0, 2), (1, 1)))
    gy = sum(weight * (around[1, x] - around[-1, x]) for x, weight in ((-1, 1), (0, 2), (1, 1)))
    edges = ((abs(gx) + abs(gy)) / 2040)[top : top + height, left : left + width].mean()
    return entropy, min(1.0, edges / EDGE_FULL), min(1.0, part.std() / DEVIATION_FULL)


@pytest.mark.parametrize("window", [(0, 0, 40, 60), (3, 5, 17, 11), (39, 59, 1, 1), (10, 0, 1, 60)])
def test_window_equals_a_direct_computation(window: tuple[int, int, int, int]) -> None:
    rgb = (NOISE // 4 + 40).astype(np.uint8)
    entropy, edges, deviation = direct(to_grey(rgb), *window)
    expected = 0.4 * entropy + 0.3 * edges + 0.3 * deviation
    assert ComplexityMap(rgb, EVERYWHERE, DrisConfig()).window(*window) == pytest.approx(expected, abs=1e-6)


def test_weights_choose_and_are_normalised() -> None:
    entropy, edges, deviation = direct(to_grey(NOISE // 8), 0, 0, 40, 60)
    for weights, expected in (
        ((1, 0, 0), entropy),
        ((0, 5, 0), edges),
        ((0, 0, 2), deviation),
        ((1, 1, 0), (entropy + edges) / 2),
    ):
        config = DrisConfig(entropy_weight=weights[0], edge_weight=weights[1], variance_weight=weights[2])
        assert ComplexityMap(NOISE // 8, EVERYWHERE, config).window(0, 0, 40, 60) == pytest.approx(expected, abs=1e-6)
    zero = DrisConfig(entropy_weight=0, edge_weight=0, variance_weight=0)
    assert ComplexityMap(NOISE, EVERYWHERE, zero).window(0, 0, 40, 60) == 0.0


def test_range_is_zero_for_flat_and_one_for_noise() -> None:
    assert ComplexityMap(np.full((40, 60, 3), 200, np.uint8), EVERYWHERE, DrisConfig()).window(0, 0, 40, 60) == 0.0
    grey_noise = np.repeat(NOISE[..., :1], 3, axis=2)
    assert 0.99 < ComplexityMap(grey_noise, EVERYWHERE, DrisConfig()).window(0, 0, 40, 60) <= 1.0


def test_invalid_pixels_do_not_count() -> None:
    rgb, mask = np.full((40, 60, 3), 90, np.uint8), EVERYWHERE.copy()
    rgb[:, :30], mask[:, :30] = 255, False
    complexity = ComplexityMap(rgb, mask, DrisConfig())
    assert complexity.window(0, 0, 40, 60) == 0.0
    assert complexity.window(0, 0, 40, 30) == 0.0
    assert complexity.valid_fraction(0, 0, 40, 60) == 0.5
    assert complexity.valid_fraction(0, 0, 40, 30) == 0.0


def test_scene_pixels_map_to_the_overview_pixels_that_they_touch() -> None:
    rgb = np.full((4, 4, 3), 50, np.uint8)
    mask = np.zeros((4, 4), bool)
    mask[1, 2] = True
    complexity = ComplexityMap(rgb, mask, DrisConfig()).scaled_to(4000, 1000)  # 1000 rows and 250 columns per overview pixel
    assert complexity.valid_fraction(1000, 500, 1000, 250) == 1.0
    assert complexity.valid_fraction(1999, 749, 1, 1) == 1.0
    assert complexity.valid_fraction(2000, 749, 1, 1) == 0.0
    assert complexity.valid_fraction(0, 500, 4000, 250) == 0.25
    assert complexity.valid_fraction(0, 0, 4000, 1000) == 1 / 16
    assert complexity.valid_fraction(1500, 700, 1, 100) == 0.5  # touches two


def test_equal_content_gives_equal_numbers() -> None:
    rgb = np.tile(NOISE[:20, :20], (2, 3, 1))
    complexity = ComplexityMap(rgb, EVERYWHERE, DrisConfig(edge_weight=0))
    values = {complexity.window(row, col, 20, 20) for row in (0, 20) for col in (0, 20, 40)}
    assert len(values) == 1


def test_every_implementation_gives_the_same_complexity() -> None:
    eager = ComplexityMap(NOISE, EVERYWHERE, DrisConfig(), "eager")
    auto = ComplexityMap(NOISE, EVERYWHERE, DrisConfig(), "auto")
    for window in ((0, 0, 40, 60), (1, 2, 30, 7)):
        assert eager.window(*window) == auto.window(*window)


def test_grey_is_pillows_luma() -> None:
    assert (to_grey(NOISE) == np.asarray(Image.fromarray(NOISE).convert("L"))).all()


def test_contract_is_checked() -> None:
    with pytest.raises(InputError, match="rgb must be uint8"):
        ComplexityMap(NOISE[..., 0], EVERYWHERE, DrisConfig())
    complexity = ComplexityMap(NOISE, EVERYWHERE, DrisConfig()).scaled_to(400, 600)
    for window in ((-1, 0, 2, 2), (0, 0, 401, 1), (0, 600, 1, 1), (0, 0, 0, 5)):
        with pytest.raises(InputError, match="window must lie inside"):
            complexity.window(*window)
