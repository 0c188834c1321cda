"""Owns the definition of the means over square cells of pixels, what a coarse copy consists of. Knows no raster, step or file.

A pixel has no part in its cell where it is invalid: the value that a band says is no measurement, a mask, or a float that is not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64")
MAX_FACTOR = 1 << 15  # sums of so many rows of 2-byte integers fit 32 bits

_UNSIGNED: tuple[np.dtype[Any], ...] = tuple(np.dtype(kind) for kind in (np.uint8, np.uint16, np.uint32, np.uint64))

Cells = tuple[NDArray[Any], NDArray[np.bool_]]


def check_cell_means(
    values: NDArray[Any], factor: int, valid: NDArray[np.bool_] | None, nodata: Sequence[int] | None, out: Cells | None
) -> None:
    """Raises InputError unless the arguments are what `cell_means` says."""
    if values.ndim != 3 or values.dtype.name not in DTYPES or min(values.shape) < 1:
        raise InputError(
            f"values must be a non-empty array [C, h, w] of {', '.join(DTYPES)}, got {values.dtype} {list(values.shape)}; "
            "read real bands, band first"
        )
    if not 1 <= factor <= MAX_FACTOR or factor & (factor - 1):
        raise InputError(f"factor must be a power of two in 1..{MAX_FACTOR}, got {factor}; round it to one")
    num_bands, height, width = values.shape
    if valid is not None and (valid.dtype != np.bool_ or valid.shape not in ((num_bands, height, width), (1, height, width))):
        raise InputError(
            f"valid must be bool [{num_bands} or 1, {height}, {width}] like values, got {valid.dtype} {list(valid.shape)}; "
            "pass one flag per pixel"
        )
    if nodata is not None:
        _check_nodata(values, valid, nodata)
    if out is not None:
        shape = (num_bands, -(-height // factor), -(-width // factor))
        for name, part, dtype in (("means", out[0], values.dtype), ("found", out[1], np.dtype(np.bool_))):
            if part.shape != shape or part.dtype != dtype:
                raise InputError(
                    f"{name} of out must be {dtype} {list(shape)}, got {part.dtype} {list(part.shape)}; allocate it for these values"
                )


def _check_nodata(values: NDArray[Any], valid: NDArray[np.bool_] | None, nodata: Sequence[int]) -> None:
    if valid is not None:
        raise InputError("nodata must be None beside valid, got both; pass the mask alone")
    if values.dtype.kind == "f":
        raise InputError(
            f"nodata must be None for floats, got {list(nodata)} for {values.dtype}; pass valid, or NaN in the values"
        )
    limits = np.iinfo(values.dtype)
    if len(nodata) != len(values) or not all(limits.min <= value <= limits.max for value in nodata):
        raise InputError(
            f"nodata must be one {values.dtype} value for each of {len(values)} bands, got {list(nodata)}; pass valid instead"
        )


def cell_means(
    values: NDArray[Any],
    factor: int,
    valid: NDArray[np.bool_] | None = None,
    nodata: Sequence[int] | None = None,
    out: Cells | None = None,
) -> Cells:
    """Means of the valid pixels of each cell of `factor` x `factor` pixels; cells at the right and the bottom may hold fewer.

    Integers of 1 and 2 bytes are summed exactly. All else is summed in float64, rows from top to bottom, then columns from left to right,
    an invalid pixel as 0, so that each implementation gives equal bits.

    Args:
        values: [C, h, w] of a dtype in DTYPES. Floats that are not finite are invalid.
        factor: a power of two.
        valid: bool [C or 1, h, w], True where a pixel is valid; None where all are.
        nodata: of each band of integers, the one value that is no measurement; then `valid` is None.
        out: where to write what is returned.

    Returns:
        means [C, ceil(h / factor), ceil(w / factor)] in the dtype of values, integers rounded to the nearest (halves up), 0 where no
        pixel is valid; and found, bool of the same shape: whether any is.

    Raises:
        InputError: wrong dtype, shape or value.
    """
    check_cell_means(values, factor, valid, nodata, out)
    shape = (len(values), *(-(-side // factor) for side in values.shape[1:]))
    means, found = out if out is not None else (np.empty(shape, values.dtype), np.empty(shape, np.bool_))
    for band, plane in enumerate(values):
        usable = None if valid is None else valid[min(band, len(valid) - 1)]
        if nodata is not None:
            usable = plane != values.dtype.type(nodata[band])
        if plane.dtype.kind == "f":
            finite = np.isfinite(plane)
            usable = finite if usable is None else usable & finite
        if usable is None or usable.all():
            means[band], found[band] = _means(plane, _pixels(plane.shape, factor), factor), True
        else:
            count = _sums(usable.view(np.uint8), factor)
            # a product takes a fifth of the time of a choice, but NaN times 0 is NaN
            kept = np.where(usable, plane, plane.dtype.type(0)) if plane.dtype.kind == "f" else plane * usable
            means[band] = _means(kept, count, factor)
            found[band] = count > 0
    return means, found


def _means(plane: NDArray[Any], count: NDArray[Any], factor: int) -> NDArray[Any]:
    """Means [h', w'] of a band whose invalid pixels are 0; count: valid pixels of each cell."""
    total = _sums(plane, factor)
    if total.dtype.kind == "f":
        return _in_dtype(total / np.maximum(count, 1), plane.dtype)
    full = factor * factor
    if int(total.max(initial=0)) + full // 2 > np.iinfo(total.dtype).max:
        total = total.astype(np.int64)
    mean: NDArray[Any] = (total + total.dtype.type(full // 2)) >> total.dtype.type(full.bit_length() - 1)
    cut = (count != full) & (count > 0)  # few: the rims of nodata and of the scene
    if cut.any():
        mean[cut] = np.floor(total[cut] / np.maximum(count[cut], 1) + 0.5)
    return mean.astype(plane.dtype, copy=False)


def _pixels(shape: tuple[int, ...], factor: int) -> NDArray[np.int64]:
    """Pixels of each cell [h', w'] of an array [h, w]."""
    height, width = (np.diff(np.append(np.arange(0, side, factor), side)) for side in shape)
    return np.outer(height, width)


def _sums(plane: NDArray[Any], factor: int) -> NDArray[Any]:
    """Sums over cells [h, w] -> [h', w'], exact for integers of 1 and 2 bytes, in float64 for all else.

    Additions of whole rows in the narrowest dtype that holds them: 0.15 ns a pixel, where a sum over short axes takes 3 ns.
    """
    kinds: list[np.dtype[Any]]
    if plane.dtype.kind not in "iu" or plane.dtype.itemsize > 2:
        kinds = [np.dtype(np.float64)] * 2
    elif plane.dtype.kind == "i":
        wide = factor * factor * -int(np.iinfo(plane.dtype).min) > np.iinfo(np.int32).max
        kinds = [np.dtype(np.int64 if wide else np.int32)] * 2
    else:
        top = int(plane.max(initial=0))
        kinds = [
            next(kind for kind in _UNSIGNED if top * terms <= np.iinfo(kind).max and kind.itemsize >= plane.dtype.itemsize)
            for terms in (factor, factor * factor)
        ]
    rows = _row_sums(plane, factor, kinds[0])  # [h', w]
    return np.ascontiguousarray(_row_sums(rows.T, factor, kinds[1]).T)


def _row_sums(plane: NDArray[Any], factor: int, kind: np.dtype[Any]) -> NDArray[Any]:
    """[h, w] -> [h', w], each sum from top to bottom. Keeps the memory order of a transposed view."""
    full, rest = divmod(plane.shape[0], factor)
    sums: NDArray[Any] = np.empty_like(plane, dtype=kind, shape=(full + (rest > 0), plane.shape[1]))
    sums[:] = plane[::factor]
    for index in range(1, factor):
        below = plane[index::factor]
        sums[: len(below)] += below
    return sums


def _in_dtype(mean: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Means in float64 as the dtype of what was averaged, integers inside its range."""
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        highest = float(limits.max)
        if int(highest) > limits.max:  # 2^63 - 1 is no float64
            highest = float(np.nextafter(highest, 0.0))
        mean = np.clip(np.floor(mean + 0.5), float(limits.min), highest)
    return mean.astype(dtype)
