"""Owns how band values become grey levels: one stretch per scene, area averages. Knows no files, plans or models.

A stretch is fitted once on the valid pixels of a scene's overview and then used for every window, because a stretch per
window would give the same ground two colours (a 20 % zero collar alone moves the 2 % percentile from 883 to 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PERCENTILES = (2.0, 98.0)
_CHUNK_PX = 1 << 17  # values are mapped in float64 or by indices of 8 bytes: 1 MiB at a time stays in a core's own cache


@dataclass(frozen=True)
class Stretch:
    """Linear map of each band: `low` becomes grey level 0, `high` becomes 255, values beyond are clipped."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    def apply(self, values: NDArray[Any], valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """Band values [h, w, C] of any real dtype -> grey levels uint8 [h, w, C]; invalid values become 0."""
        grey = np.empty(values.shape, dtype=np.uint8)
        integer = values.dtype.kind in "iu" and values.dtype.itemsize <= 2
        bits = np.dtype(f"u{values.dtype.itemsize}" if integer else values.dtype)
        rows = max(1, _CHUNK_PX // max(1, values.shape[1]))
        for band, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            table = _levels(values.dtype, low, high) if integer else None
            for start in range(0, values.shape[0], rows):  # an index takes 8 bytes a pixel
                part = values[start : start + rows, :, band]
                # every bit pattern is in the table: "clip" only spares the check
                levels = _map_linear(part, low, high) if table is None else np.take(table, part.view(bits), mode="clip")
                np.multiply(levels, valid[start : start + rows, :, band], out=grey[start : start + rows, :, band])
        return grey


def fit_stretch(values: NDArray[Any], valid: NDArray[np.bool_]) -> Stretch:
    """The 2-98 percentile stretch of each band, over its valid values only.

    Args:
        values: [h, w, C], an overview of the scene, any real dtype.
        valid: bool [h, w, C].

    Returns:
        One range per band. Where the percentiles meet, the range is min..max; a constant band maps to middle grey.
    """
    lows, highs = [], []
    for band in range(values.shape[2]):
        usable = values[..., band][valid[..., band]]
        if usable.dtype.kind != "u" or usable.dtype.itemsize > 4:  # else differences in order are exact, in half the time
            usable = usable.astype(np.float64)
        if usable.size == 0:
            low, high = 0.0, 1.0
        else:
            low, high = (float(edge) for edge in np.percentile(usable, PERCENTILES))
            if not high > low:
                low, high = float(usable.min()), float(usable.max())
            if not high > low:
                margin = max(1.0, abs(low) * 1e-6)
                low, high = low - margin, high + margin
        lows.append(low)
        highs.append(high)
    return Stretch(tuple(lows), tuple(highs))


def to_rgb(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [h, w, 1 or 3] -> uint8 [h, w, 3], contiguous."""
    return np.ascontiguousarray(np.repeat(grey, 3, axis=2) if grey.shape[2] == 1 else grey)


def area_average(
    values: NDArray[Any],
    valid: NDArray[np.bool_],
    out_height: int,
    out_width: int,
    row_span: tuple[float, float] | None = None,
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Mean of the valid values whose centres lie under each output pixel (Pillow's BOX filter).

    Args:
        values: [h, w, C], any real dtype. Means are rounded back to an integer dtype. They are computed in float32; where that
            cannot hold the dtype (integers of 4 bytes or more, float64), in float32 over the band's own range.
        valid: bool [h, w, C].
        out_height, out_width: output shape in pixels.
        row_span: first and last row to average over, may lie between rows; default 0..h.

    Returns:
        Values [out_height, out_width, C] of the same dtype, and bool: True where at least one valid value contributed.
    """
    if values.shape[:2] == (out_height, out_width):
        return values, valid
    top, bottom = row_span or (0.0, float(values.shape[0]))
    size, box = (out_width, out_height), (0.0, top, float(values.shape[1]), bottom)
    out = np.zeros((out_height, out_width, values.shape[2]), dtype=values.dtype)
    out_valid = np.ones(out.shape, dtype=np.bool_)
    wide = values.dtype.itemsize > (4 if values.dtype.kind == "f" else 2)
    shares: list[NDArray[np.float32] | None] = []  # of valid pixels, None where all are
    for band in range(values.shape[2]):
        usable = valid[..., band]
        if band and (valid.strides[2] == 0 or np.array_equal(usable, valid[..., band - 1])):
            shares.append(shares[-1])  # usual: what one band misses, all miss
        else:
            shares.append(None if usable.all() else _mean(usable, size, box))

    for band, share in enumerate(shares):
        channel, usable = values[..., band], valid[..., band]
        low, high = _range(channel, usable) if wide else (0.0, 0.0)
        if wide:
            channel = _to_unit(channel, low, high)
        mean: NDArray[Any]
        if share is None:
            mean = _mean(channel, size, box)
        else:
            out_valid[..., band] = share > 1e-6  # float32 noise of the filter is near 1e-8
            total = _mean(np.where(usable, channel, 0), size, box)
            mean = np.divide(total, share, out=np.zeros_like(total), where=out_valid[..., band])
        if wide:
            mean = np.where(out_valid[..., band], _from_unit(mean, low, high), 0.0)
        out[..., band] = _rounded(mean, values.dtype) if values.dtype.kind in "iub" else mean
    return out, out_valid


def _range(channel: NDArray[Any], usable: NDArray[np.bool_]) -> tuple[float, float]:
    """Smallest and largest valid value; (0, 0) where nothing is valid."""
    valid = channel[usable]
    return (float(valid.min()), float(valid.max())) if valid.size else (0.0, 0.0)


def _to_unit(channel: NDArray[Any], low: float, high: float) -> NDArray[np.float64]:
    """low..high -> 0..1. Halves, because the whole width of float64's range is no float64."""
    half = (high / 2 - low / 2) or 1.0
    with np.errstate(over="ignore", invalid="ignore"):  # values that are not valid may lie anywhere
        unit: NDArray[np.float64] = (channel.astype(np.float64) / 2 - low / 2) / half
    return unit


def _from_unit(mean: NDArray[Any], low: float, high: float) -> NDArray[np.float64]:
    """The way back; a mean never leaves low..high."""
    halves = np.clip(mean.astype(np.float64) * (high / 2 - low / 2) + low / 2, low / 2, high / 2)
    values: NDArray[np.float64] = halves * 2
    return values


def _rounded(mean: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Nearest integers inside the range of `dtype`; a cast from beyond it would wrap around."""
    if dtype.kind == "b":
        return np.asarray(np.rint(mean))
    limits = np.iinfo(dtype)
    highest = float(limits.max)
    if int(highest) > limits.max:  # 2^63 - 1 is no float64, and 2^63 is no int64
        highest = float(np.nextafter(highest, 0.0))
    rounded: NDArray[Any] = np.clip(np.rint(mean), float(limits.min), highest)
    return rounded


def _map_linear(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Round-half-up of (values - low) / (high - low) * 255, clipped; NaN becomes 0."""
    scaled = (values.astype(np.float64) - low) * 255.0 / (high - low) + 0.5
    return np.nan_to_num(np.clip(scaled, 0.0, 255.0), nan=0.0).astype(np.uint8)


@lru_cache(maxsize=12)
def _levels(dtype: np.dtype[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Grey levels of all bit patterns of an integer dtype: exact, and several times faster than float arithmetic. At most 64 KiB."""
    every = np.arange(1 << (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}")
    table = _map_linear(every.view(dtype), low, high)
    table.setflags(write=False)
    return table


def _mean(channel: NDArray[Any], size: tuple[int, int], box: tuple[float, float, float, float]) -> NDArray[np.float32]:
    """Plain area mean of [h, w] inside box (left, top, right, bottom) -> float32 [size[1], size[0]]."""
    image = Image.fromarray(np.ascontiguousarray(channel, dtype=np.float32))
    return np.asarray(image.resize(size, Image.Resampling.BOX, box=box), dtype=np.float32)
