"""Owns the coarse copy of a large raster: means over squares of pixels, made in one pass over its blocks. Knows no file and no plan.

A raster without overviews is decoded once, whatever is asked of it later at this resolution: overview, stretch, plan and most tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .radiometry import area_average

# 20,000 x 20,000 pixels of 3 uint16 bands are kept at a quarter of their side
COARSE_BYTES = 320 << 20  # of values, validity and grey levels
COARSE_CELLS = 1 << 25
CHUNK_BYTES = 1 << 25  # native values that one step of the pass holds

_LARGEST = np.iinfo(np.uint16).max
_UNSIGNED = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.uint32))

ReadChunk = Callable[["Chunk", NDArray[Any]], NDArray[np.bool_] | None]


@dataclass(frozen=True)
class Coarse:
    """values [h, w, C] in the raster's dtype and valid bool [h, w, C], True where any pixel below is valid.

    A cell is the mean of the valid ones of `factor` x `factor` pixels; cells at the right and the bottom may hold fewer.
    """

    factor: int
    values: NDArray[Any]
    valid: NDArray[np.bool_]


def coarse_factor(height: int, width: int, num_bands: int, itemsize: int) -> int:
    """The smallest power of two, at least 2, with which the copy stays below COARSE_CELLS and COARSE_BYTES.

    It depends on nothing but the raster, so that the memory of a machine changes no answer.
    """
    factor, cell_bytes = 2, num_bands * (itemsize + 1) + 3
    while (cells := -(-height // factor) * -(-width // factor)) > COARSE_CELLS or cells * cell_bytes > COARSE_BYTES:
        factor *= 2
    return factor


@dataclass(frozen=True)
class Chunk:
    """A rectangle of native pixels that one step reads. Its corner lies on a cell."""

    row_off: int
    col_off: int
    height: int
    width: int


@dataclass(frozen=True)
class Blocks:
    """How a raster is stored: block height and width in pixels, bytes of a pixel in the shown bands, and in all bands that are decoded
    together, and the bytes of the cache for decoded blocks."""

    height: int
    width: int
    shown_bytes: int
    decoded_bytes: int
    cache_bytes: int


def chunks(height: int, width: int, blocks: Blocks, factor: int) -> Iterator[Chunk]:
    """Steps of the pass, row by row, so that each block is decoded once: a block that two steps touch is still in the cache."""
    rows, cols = _step_rows(width, blocks, factor), width
    if blocks.width < width and blocks.height * width * blocks.decoded_bytes > blocks.cache_bytes:  # no row of blocks fits
        rows, side = math.lcm(blocks.height, factor), math.lcm(blocks.width, factor)
        cols = max(side, blocks.cache_bytes // (rows * blocks.decoded_bytes) // side * side)
    for row in range(0, height, rows):
        for col in range(0, width, cols):
            yield Chunk(row, col, min(rows, height - row), min(cols, width - col))


def _step_rows(width: int, blocks: Blocks, factor: int) -> int:
    """Full rows of one step: whole rows of blocks, or an even part of one, within CHUNK_BYTES where that goes."""
    most = min(CHUNK_BYTES // (width * blocks.shown_bytes), blocks.cache_bytes // (width * blocks.decoded_bytes))
    rows = math.lcm(blocks.height, factor)
    if rows <= most:
        return most // rows * rows
    while rows > most and rows % (2 * factor) == 0:
        rows //= 2
    return rows if rows <= most else max(1, most // factor) * factor


def make_coarse(
    height: int,
    width: int,
    num_bands: int,
    dtype: np.dtype[Any],
    factor: int,
    steps: Iterator[Chunk],
    read: ReadChunk,
    fills: Sequence[int] | None = None,
) -> Coarse:
    """Reads every step once, the next one in a thread while this one is reduced.

    read: fills an array [C, h, w] with a step's values and gives its validity, bool [C or 1, h, w] or None where all is valid. It is
    called from one thread at a time. fills: of each band, the one value that is no measurement; `read` then gives None.
    """
    shape = (num_bands, -(-height // factor), -(-width // factor))
    coarse = Coarse(factor, np.empty(shape, dtype=dtype).transpose(1, 2, 0), np.ones(shape, dtype=np.bool_).transpose(1, 2, 0))
    # two of each take turns: fresh memory would cost half as much time as the reading
    buffers: list[NDArray[Any]] = []
    masks: list[NDArray[np.bool_]] = []
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="rsvlm-coarse") as thread:
        ahead: tuple[Chunk, NDArray[Any], Future[NDArray[np.bool_] | None]] | None = None
        for index, step in enumerate(steps):
            if index == 0:  # no later step is larger
                pixels = step.height * step.width
                buffers = [np.empty(num_bands * pixels, dtype=dtype) for _ in range(2)]
                masks = [np.empty(pixels, dtype=np.bool_) for _ in range(2)]
            cells = buffers[index % 2][: num_bands * step.height * step.width].reshape(num_bands, step.height, step.width)
            following = (step, cells, thread.submit(read, step, cells))
            if ahead is not None:
                _place(coarse, ahead[0], ahead[1], ahead[2].result(), fills, masks)
            ahead = following
        if ahead is not None:
            _place(coarse, ahead[0], ahead[1], ahead[2].result(), fills, masks)
    return coarse


def reduce_squares(
    values: NDArray[Any], valid: NDArray[np.bool_] | None, factor: int, fill: int | None = None
) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Means of the valid values in squares of one band.

    Args:
        values: [h, w], any real dtype. valid: bool [h, w], None where all is valid. factor: a power of two.
        fill: the one value that all invalid integers hold, when that is so; it spares a pass over the pixels.

    Returns:
        [ceil(h / factor), ceil(w / factor)] in the same dtype, integers rounded to the nearest (halves up), and whether any value was
        valid (None where all were). Where none was the value is 0.
    """
    counts = None if valid is None or valid.all() else _Counts.of(valid, factor)
    return _reduce(values, valid, counts, factor, fill), None if counts is None else counts.found


@dataclass(frozen=True)
class _Counts:
    """Valid pixels of each cell [h', w'], and whether there is any."""

    count: NDArray[Any]
    found: NDArray[np.bool_]

    @classmethod
    def of(cls, valid: NDArray[np.bool_], factor: int) -> _Counts:
        count = _sums(valid.view(np.uint8), factor)
        return cls(count, count > 0)


def _reduce(
    values: NDArray[Any], valid: NDArray[np.bool_] | None, counts: _Counts | None, factor: int, fill: int | None
) -> NDArray[Any]:
    """Means [h', w'] of one band; counts: of `valid`, None where all is valid."""
    if counts is not None and valid is not None and fill is None:
        values = np.where(valid, values, values.dtype.type(0))
    full = factor * factor
    total = _sums(values, factor)
    if total.dtype.kind == "f":
        count = _pixels(values.shape, factor) if counts is None else np.maximum(counts.count, 1)
        return _in_dtype(total / count, values.dtype)
    if counts is not None and fill:
        total = total - (_pixels(values.shape, factor) - counts.count) * fill
    if total.dtype == np.uint16 and int(total.max(initial=0)) + full // 2 > _LARGEST:
        total = total.astype(np.uint32)
    mean: NDArray[Any] = (total + total.dtype.type(full // 2)) >> total.dtype.type(full.bit_length() - 1)
    if counts is not None or values.shape[0] % factor or values.shape[1] % factor:
        count = _pixels(values.shape, factor) if counts is None else counts.count
        cut = count != full  # few: the rims of nodata and of the scene
        mean[cut] = np.floor(total[cut] / np.maximum(count[cut], 1) + 0.5)
    return mean.astype(values.dtype, copy=False)


def _pixels(shape: tuple[int, ...], factor: int) -> NDArray[np.int64]:
    """Pixels of each cell [h', w'] of an array [h, w]."""
    height, width = (np.diff(np.append(np.arange(0, side, factor), side)) for side in shape)
    return np.outer(height, width)


def _same(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> bool:
    """Whether two contiguous masks of one shape are equal, eight flags at a time."""
    flat, twin = one.reshape(-1).view(np.uint8), other.reshape(-1).view(np.uint8)
    words = flat.size // 8 * 8
    same = np.array_equal(flat[:words].view(np.uint64), twin[:words].view(np.uint64))
    return same and np.array_equal(flat[words:], twin[words:])


def overview_of(coarse: Coarse, height: int, width: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """The copy reduced to [height, width, C], and its validity of the same shape."""
    values, valid = coarse.values, coarse.valid
    factor = 1
    while values.shape[0] // (2 * factor) >= height and values.shape[1] // (2 * factor) >= width:
        factor *= 2
    if factor > 1:
        parts = [reduce_squares(values[..., band], valid[..., band], factor) for band in range(values.shape[2])]
        values = np.stack([mean for mean, _ in parts], axis=2)
        valid = np.stack([np.ones(mean.shape, np.bool_) if found is None else found for mean, found in parts], axis=2)
    return area_average(values, valid, height, width)


def _place(
    coarse: Coarse,
    step: Chunk,
    read: NDArray[Any],
    usable: NDArray[np.bool_] | None,
    fills: Sequence[int] | None,
    masks: Sequence[NDArray[np.bool_]],
) -> None:
    """Reduces one step into its cells. Bands mostly miss the same pixels, which are then counted once."""
    factor = coarse.factor
    rows = slice(step.row_off // factor, -(-(step.row_off + step.height) // factor))
    cols = slice(step.col_off // factor, -(-(step.col_off + step.width) // factor))
    last: NDArray[np.bool_] | None = None
    counts: _Counts | None = None
    for band, plane in enumerate(read):
        fill = None if fills is None else fills[band]
        valid = None if usable is None else usable[min(band, len(usable) - 1)]
        if fill is not None:
            own = masks[band % 2][: plane.size].reshape(plane.shape)
            valid = np.not_equal(plane, fill, out=own)
        if valid is not None and (last is None or not _same(valid, last)):
            counts = None if valid.all() else _Counts.of(valid, factor)
        last = valid
        coarse.values[rows, cols, band] = _reduce(plane, valid, counts, factor, fill)
        if counts is not None:
            coarse.valid[rows, cols, band] = counts.found


def _sums(plane: NDArray[Any], factor: int) -> NDArray[Any]:
    """Sums over squares [h, w] -> [h', w'], exact for integers of 1 and 2 bytes, in float64 for all else.

    Additions of whole rows in the narrowest dtype that holds them: 0.15 ns a pixel, where a sum over short axes takes 3 ns.
    """
    if plane.dtype.kind not in "iu" or plane.dtype.itemsize > 2:
        return _column_sums(_row_sums(plane, factor, np.dtype(np.float64)), factor, np.dtype(np.float64))
    if plane.dtype.kind == "i":
        return _column_sums(_row_sums(plane, factor, np.dtype(np.int32)), factor, np.dtype(np.int32))
    top = int(plane.max(initial=0))
    kinds = [
        next(kind for kind in _UNSIGNED if top * terms <= np.iinfo(kind).max and kind.itemsize >= plane.dtype.itemsize)
        for terms in (factor, factor * factor)
    ]
    return _column_sums(_row_sums(plane, factor, kinds[0]), factor, kinds[1])


def _row_sums(plane: NDArray[Any], factor: int, kind: np.dtype[Any]) -> NDArray[Any]:
    """[h, w] -> [h', w]."""
    full = plane.shape[0] // factor
    sums = np.empty((-(-plane.shape[0] // factor), plane.shape[1]), dtype=kind)
    if full:
        grouped = plane[: full * factor].reshape(full, factor, plane.shape[1])
        np.add(grouped[:, 0], grouped[:, 1], out=sums[:full], dtype=kind)
        for index in range(2, factor):
            sums[:full] += grouped[:, index]
    if full < len(sums):
        sums[full] = plane[full * factor :].sum(axis=0, dtype=kind)
    return sums


def _column_sums(plane: NDArray[Any], factor: int, kind: np.dtype[Any]) -> NDArray[Any]:
    """[h', w] -> [h', w']."""
    full = plane.shape[1] // factor
    sums = np.empty((plane.shape[0], -(-plane.shape[1] // factor)), dtype=kind)
    if full:
        sums[:, :full] = plane[:, : full * factor : factor]
        for index in range(1, factor):
            sums[:, :full] += plane[:, index : full * factor : factor]
    if full < sums.shape[1]:
        sums[:, full] = plane[:, full * factor :].sum(axis=1, dtype=kind)
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
