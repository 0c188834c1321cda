"""Owns one number per window: how much there is to see in it, 0..1, in O(1). Knows no plan and no model.

Integral images of the scene's overview (op `complexity_map`) answer any window with a few subtractions, so the planner can
weigh thousands of windows without reading a pixel.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import DrisConfig
from ..errors import InputError
from ..ops.registry import resolve

DEVIATION_FULL = 64.0  # grey levels: a standard deviation that counts as full contrast (uniform noise has 74)
EDGE_FULL = 0.12  # mean Sobel magnitude (|gx| + |gy|) / 2040 that counts as full edge density; dense housing has about 0.1
_DECIMALS = 6  # equal content must tie, also where sums differ in the last bits


class ComplexityMap:
    """Complexity and valid share of the windows of one scene.

    `c = (entropy_weight * entropy + edge_weight * edges + variance_weight * deviation) / sum of weights`, where entropy is
    that of 16 grey-level bins over log 16, edges the mean Sobel magnitude over EDGE_FULL, deviation the standard deviation
    over DEVIATION_FULL, each clipped to 1.
    """

    def __init__(
        self, rgb: NDArray[np.uint8], mask: NDArray[np.bool_], config: DrisConfig, implementation: str = "auto"
    ) -> None:
        """rgb: uint8 [h, w, 3] and mask: bool [h, w], `Scene.overview()`. Windows are in overview pixels until `scaled_to`."""
        if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.shape[:2] != mask.shape:
            raise InputError(
                f"rgb must be uint8 [h, w, 3] and mask bool [h, w], got {list(rgb.shape)} and {list(mask.shape)}; "
                "pass what Scene.overview() returns"
            )
        self._tables: NDArray[np.float64] = resolve("complexity_map", implementation)(to_grey(rgb), np.ascontiguousarray(mask))
        total = config.entropy_weight + config.edge_weight + config.variance_weight
        self._weights = tuple(
            weight / total if total > 0 else 0.0
            for weight in (config.entropy_weight, config.edge_weight, config.variance_weight)
        )
        self._shape = self._scene_shape = mask.shape

    def scaled_to(self, scene_height: int, scene_width: int) -> ComplexityMap:
        """The same map, asked in pixels of a scene of this size. Shares the tables."""
        scaled = object.__new__(ComplexityMap)
        scaled.__dict__.update(self.__dict__)
        scaled._scene_shape = (scene_height, scene_width)
        return scaled

    def window(self, row: int, col: int, height: int, width: int) -> float:
        """Complexity in [0, 1] of a window in scene pixels; 0 where nothing is valid."""
        sums, _ = self._sums(row, col, height, width)
        count = float(sums[0])
        if count < 1:
            return 0.0
        shares = sums[4:] / count
        shares = shares[shares > 0]
        entropy = -float(np.sum(shares * np.log(shares))) / math.log(len(sums) - 4)
        edges = min(1.0, float(sums[3]) / count / EDGE_FULL)
        variance = max(0.0, float(sums[2]) / count - (float(sums[1]) / count) ** 2)
        deviation = min(1.0, math.sqrt(variance) / DEVIATION_FULL)
        parts = (min(1.0, entropy), edges, deviation)
        return round(sum(weight * part for weight, part in zip(self._weights, parts, strict=True)), _DECIMALS)

    def valid_fraction(self, row: int, col: int, height: int, width: int) -> float:
        """Share of valid pixels in [0, 1] of a window in scene pixels."""
        sums, area = self._sums(row, col, height, width)
        return float(sums[0]) / area

    def _sums(self, row: int, col: int, height: int, width: int) -> tuple[NDArray[Any], int]:
        """Channel sums [20] over the overview pixels that the window touches, and their number."""
        top, bottom = _touched(row, height, self._scene_shape[0], self._shape[0])
        left, right = _touched(col, width, self._scene_shape[1], self._shape[1])
        t = self._tables
        sums = t[:, bottom, right] - t[:, top, right] - t[:, bottom, left] + t[:, top, left]
        return sums, (bottom - top) * (right - left)


def to_grey(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [h, w, 3] -> luma uint8 [h, w], ITU-R 601 in the integer arithmetic of Pillow's mode "L"."""
    wide = rgb.astype(np.uint32)
    return ((wide[..., 0] * 19595 + wide[..., 1] * 38470 + wide[..., 2] * 7471 + 0x8000) >> 16).astype(np.uint8)


def _touched(start: int, length: int, scene_side: int, overview_side: int) -> tuple[int, int]:
    """First and past-the-last overview pixel under `length` scene pixels from `start`, in exact integers."""
    if start < 0 or length < 1 or start + length > scene_side:
        raise InputError(f"window must lie inside 0..{scene_side} px, got {start} + {length}; clip it first")
    return start * overview_side // scene_side, -(-(start + length) * overview_side // scene_side)
