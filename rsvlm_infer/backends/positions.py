"""Position tables for other grids, as torch's `F.interpolate` makes them, in numpy. Knows no encoder."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_CUBIC = -0.75  # torch's (and OpenCV's) choice of the cubic's free parameter


def resize_table(
    table: npt.NDArray[np.float32], side: int, rows: int, columns: int, interpolation: str
) -> npt.NDArray[np.float32]:
    """A table [side², D] of a square grid -> [rows · columns, D], row-major; corners are not aligned, nothing is antialiased.

    Args:
        interpolation: "bicubic" or "bilinear".
    """
    if (rows, columns) == (side, side):
        return table
    weights = _cubic_weights if interpolation == "bicubic" else _linear_weights
    square = table.reshape(side, side, -1).astype(np.float64)
    wide = np.einsum("cs,rsd->rcd", weights(side, columns), square)  # [side, columns, D]
    resized = np.einsum("rs,scd->rcd", weights(side, rows), wide)  # [rows, columns, D]
    return np.ascontiguousarray(resized.reshape(rows * columns, -1), dtype=np.float32)


def _linear_weights(source: int, target: int) -> npt.NDArray[np.float64]:
    """[target, source]."""
    places = np.maximum((np.arange(target) + 0.5) * (source / target) - 0.5, 0.0)
    first = np.floor(places).astype(np.int64)
    share = places - first
    weights = np.zeros((target, source))
    np.add.at(weights, (np.arange(target), first), 1.0 - share)
    np.add.at(weights, (np.arange(target), np.minimum(first + 1, source - 1)), share)
    return weights


def _cubic_weights(source: int, target: int) -> npt.NDArray[np.float64]:
    """[target, source]; taps beyond the border count for the border."""
    places = (np.arange(target) + 0.5) * (source / target) - 0.5
    first = np.floor(places).astype(np.int64)
    weights = np.zeros((target, source))
    for tap in range(-1, 3):
        distance = np.abs(places - first - tap)
        near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
        far = ((_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC) * distance - 4 * _CUBIC
        np.add.at(weights, (np.arange(target), np.clip(first + tap, 0, source - 1)), np.where(distance <= 1, near, far))
    return weights
