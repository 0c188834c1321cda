"""Owns LLaVA-NeXT's integer geometry: which grid, how large inside it, what is padding. Knows no scene and no pixels.

Every rounding is that of the published processors, because a placeholder count that is off by one breaks a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def best_resolution(height: int, width: int, pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) of `pinpoints` that keeps the most scene pixels, then wastes the fewest; the first wins ties."""
    best, best_kept, best_waste = pinpoints[0], -1, math.inf
    for target_height, target_width in pinpoints:
        scale = min(target_width / width, target_height / height)
        kept = min(int(width * scale) * int(height * scale), height * width)
        waste = target_height * target_width - kept
        if kept > best_kept or (kept == best_kept and waste < best_waste):
            best, best_kept, best_waste = (target_height, target_width), kept, waste
    return best


def fit_inside(height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels of the scene resized into `target` with its aspect ratio kept, rounded up."""
    scale_height, scale_width = target[0] / height, target[1] / width
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), target[0]), target[1]
    return target[0], min(math.ceil(width * scale_height), target[1])


def kept_window(height: int, width: int, rows: int, cols: int) -> tuple[int, int, int, int]:
    """What remains of a canvas of rows x cols tokens when its padding is cut off.

    Args:
        height, width: scene pixels.
        rows, cols: tokens of the assembled canvas.

    Returns:
        row_start, row_stop, col_start, col_stop in tokens.
    """
    if width / height > cols / rows:
        padding = (rows - int(round(height * (cols / width), 7))) // 2
        return padding, rows - padding, 0, cols
    padding = (cols - int(round(width * (rows / height), 7))) // 2
    return 0, rows, padding, cols - padding
