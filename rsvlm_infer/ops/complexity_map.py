"""Owns the definition of the complexity tables (integral images of a grey overview). Knows no scenes, plans or weights.

Twenty integral images answer every question of the planner about a window in O(1). All entries are exact integers in
float64 (channel 3: an exact integer divided once), so each implementation must give equal bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

NUM_BINS = 16  # grey-level bins for the entropy: 16 levels each
NUM_CHANNELS = 4 + NUM_BINS
SOBEL_SCALE = 2040.0  # the largest |gx| + |gy| of uint8 input: 2 * 4 * 255


def check_complexity_map(gray: NDArray[np.uint8], mask: NDArray[np.bool_]) -> None:
    """Raises InputError unless `gray` is uint8 [H, W] with H, W >= 1 and `mask` is bool of the same shape."""
    if gray.ndim != 2 or gray.dtype != np.uint8 or min(gray.shape) < 1:
        raise InputError(
            f"gray must be a non-empty uint8 array [H, W], got {gray.dtype} {list(gray.shape)}; convert the overview to grey first"
        )
    if mask.shape != gray.shape or mask.dtype != np.bool_:
        raise InputError(
            f"mask must be a bool array of gray's shape {list(gray.shape)}, got {mask.dtype} {list(mask.shape)}; "
            "pass one validity flag per pixel"
        )


def complexity_map(gray: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Integral images (exclusive prefix sums) of what makes a window complex.

    A window's sum is `t[c, r1, c1] - t[c, r0, c1] - t[c, r1, c0] + t[c, r0, c0]`. Only valid pixels count.

    Args:
        gray: uint8 [H, W], grey levels.
        mask: bool [H, W], True where a pixel is valid.

    Returns:
        float64 [20, H + 1, W + 1]: 0 number of valid pixels, 1 sum of grey, 2 sum of grey squared, 3 sum of the Sobel
        magnitude (|gx| + |gy|) / 2040 in 0..1 (border replicated; a pixel next to an invalid one counts 0, because the
        rim of the nodata area is no edge of the ground), 4..19 number of pixels in each of 16 grey-level bins.

    Raises:
        InputError: wrong dtype or shape.
    """
    check_complexity_map(gray, mask)
    height, width = gray.shape
    tables = np.zeros((NUM_CHANNELS, height + 1, width + 1), dtype=np.float64)  # [20, H+1, W+1]
    grey = np.where(mask, gray, 0).astype(np.int64)
    tables[0, 1:, 1:] = mask
    tables[1, 1:, 1:] = grey
    tables[2, 1:, 1:] = grey * grey
    tables[3, 1:, 1:] = _sobel(gray, mask)
    bins = gray // (256 // NUM_BINS)
    for index in range(NUM_BINS):
        tables[4 + index, 1:, 1:] = (bins == index) & mask
    np.cumsum(tables, axis=1, out=tables)
    np.cumsum(tables, axis=2, out=tables)
    tables[3] /= SOBEL_SCALE
    return tables


def _sobel(gray: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """|gx| + |gy| as integers [H, W], 0 where the 3x3 neighbourhood is not all valid."""
    height = gray.shape[0]
    padded = np.pad(gray.astype(np.int64), 1, mode="edge")
    valid = np.pad(mask, 1, mode="edge")
    rows = [padded[i : i + height] for i in range(3)]
    smooth = rows[0] + 2 * rows[1] + rows[2]  # [H, W+2], smoothed across rows
    across = rows[2] - rows[0]  # [H, W+2]
    gx = smooth[:, 2:] - smooth[:, :-2]
    gy = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]
    rows_valid = valid[:-2] & valid[1:-1] & valid[2:]
    all_valid = rows_valid[:, :-2] & rows_valid[:, 1:-1] & rows_valid[:, 2:]
    magnitude: NDArray[np.int64] = np.where(all_valid, np.abs(gx) + np.abs(gy), 0)
    return magnitude
