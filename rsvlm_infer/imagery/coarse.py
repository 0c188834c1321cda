"""Owns the coarse copy of a large raster: means over squares of pixels, made in one pass over its blocks. Knows no file and no plan.

A raster without overviews is decoded once, whatever is asked of it later at this resolution: overview, stretch, plan and most tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ops.registry import resolve
from .radiometry import area_average

# 20,000 x 20,000 pixels of 3 uint16 bands are kept at a quarter of their side
COARSE_BYTES = 320 << 20  # of values, validity and grey levels
COARSE_CELLS = 1 << 25
CHUNK_BYTES = 1 << 22  # native values that one step of the pass holds: two of them stay in the last cache of most CPUs

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
    whole, side = math.lcm(blocks.height, factor), math.lcm(blocks.width, factor)
    most = min(CHUNK_BYTES // (whole * blocks.shown_bytes), blocks.cache_bytes // (whole * blocks.decoded_bytes)) // side * side
    no_row_fits = blocks.height * width * blocks.decoded_bytes > blocks.cache_bytes
    if blocks.width < width and (most or no_row_fits):
        rows, cols = whole, max(side, most)
    for row in range(0, height, rows):
        for col in range(0, width, cols):
            yield Chunk(row, col, min(rows, height - row), min(cols, width - col))


def step_cache_bytes(step: Chunk, width: int, blocks: Blocks) -> int:
    """Bytes of decoded blocks that a pass with steps like this one needs: where they are whole blocks, no more than they hold, and so
    little that it stays in the CPU's cache."""
    whole = step.height % blocks.height == 0 and (step.width % blocks.width == 0 or step.width == width)
    return min(2 * step.height * step.width * blocks.decoded_bytes, blocks.cache_bytes) if whole else blocks.cache_bytes


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
    steps: Iterable[Chunk],
    read: ReadChunk,
    fills: Sequence[int] | None = None,
) -> Coarse:
    """Reads every step once, the next one in a thread while this one is reduced.

    read: fills an array [C, h, w] with a step's values and gives its validity, bool [C or 1, h, w] or None where all is valid. It is
    called from one thread at a time. fills: of each band of integers, the one value that is no measurement; `read` then gives None.
    Floats that are not finite are invalid whatever it gives.
    """
    shape = (num_bands, -(-height // factor), -(-width // factor))
    coarse = Coarse(factor, np.empty(shape, dtype=dtype).transpose(1, 2, 0), np.ones(shape, dtype=np.bool_).transpose(1, 2, 0))
    # two of each take turns: fresh memory would cost half as much time as the reading
    buffers: list[NDArray[Any]] = []
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="rsvlm-coarse") as thread:
        ahead: tuple[Chunk, NDArray[Any], Future[NDArray[np.bool_] | None]] | None = None
        for index, step in enumerate(steps):
            if index == 0:  # no later step is larger
                pixels = step.height * step.width
                buffers = [np.empty(num_bands * pixels, dtype=dtype) for _ in range(2)]
            cells = buffers[index % 2][: num_bands * step.height * step.width].reshape(num_bands, step.height, step.width)
            following = (step, cells, thread.submit(read, step, cells))
            if ahead is not None:
                _place(coarse, ahead[0], ahead[1], ahead[2].result(), fills)
            ahead = following
        if ahead is not None:
            _place(coarse, ahead[0], ahead[1], ahead[2].result(), fills)
    return coarse


def overview_of(coarse: Coarse, height: int, width: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """The copy reduced to [height, width, C], and its validity of the same shape."""
    values, valid = coarse.values, coarse.valid
    factor = 1
    while values.shape[0] // (2 * factor) >= height and values.shape[1] // (2 * factor) >= width:
        factor *= 2
    if factor > 1:
        means, found = resolve("cell_means")(values.transpose(2, 0, 1), factor, valid.transpose(2, 0, 1))
        values, valid = means.transpose(1, 2, 0), found.transpose(1, 2, 0)
    return area_average(values, valid, height, width)


def _place(
    coarse: Coarse, step: Chunk, read: NDArray[Any], usable: NDArray[np.bool_] | None, fills: Sequence[int] | None
) -> None:
    """Reduces one step into its cells."""
    factor = coarse.factor
    rows = slice(step.row_off // factor, -(-(step.row_off + step.height) // factor))
    cols = slice(step.col_off // factor, -(-(step.col_off + step.width) // factor))
    out = coarse.values[rows, cols].transpose(2, 0, 1), coarse.valid[rows, cols].transpose(2, 0, 1)
    resolve("cell_means")(read, factor, usable, fills, out)
