"""Owns the coarse copy of a large raster: means over squares of pixels, made in one pass over its blocks. Knows no file and no plan.

A raster without overviews is decoded once, whatever is asked of it later at this resolution: overview, stretch, plan and most tiles.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..hardware import num_threads
from ..ops.registry import resolve
from .radiometry import Stretch, area_average

# 20,000 x 20,000 pixels of 3 uint16 bands are kept at a quarter of their side
COARSE_BYTES = 320 << 20  # of values, validity and grey levels
COARSE_CELLS = 1 << 25
PART_BYTES = 1 << 20  # of the copy that one step of what is made of it holds, so that it stays in a core's own cache
_INDEX_BYTES = 8  # numpy looks a pixel up by an index of that size
CHUNK_BYTES = 1 << 22  # native values that one step of the pass holds: two of them stay in the last cache of most CPUs

ReadChunk = Callable[["Chunk", NDArray[Any]], NDArray[np.bool_] | None]
OpenReader = Callable[[], AbstractContextManager[ReadChunk]]


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


def pass_threads(spans: Sequence[Sequence[Chunk]], blocks: Blocks, cache_bytes: int, most_bytes: int) -> int:
    """Threads of a pass, each of which holds `cache_bytes` of decoded blocks and the values of a step: as many as cores and `most_bytes`
    allow, at least one."""
    held = cache_bytes + max(step.height * step.width for span in spans for step in span) * blocks.shown_bytes
    return max(1, min(num_threads(), len(spans), most_bytes // held))


def _step_rows(width: int, blocks: Blocks, factor: int) -> int:
    """Full rows of one step: whole rows of blocks, or an even part of one, within CHUNK_BYTES where that goes."""
    most = min(CHUNK_BYTES // (width * blocks.shown_bytes), blocks.cache_bytes // (width * blocks.decoded_bytes))
    rows = math.lcm(blocks.height, factor)
    if rows <= most:
        return most // rows * rows
    while rows > most and rows % (2 * factor) == 0:
        rows //= 2
    return rows if rows <= most else max(1, most // factor) * factor


def apart(steps: Iterable[Chunk], blocks: Blocks) -> Iterator[list[Chunk]]:
    """The same steps in spans that have no block in common, so that several handles decode no block twice."""
    span: list[Chunk] = []
    for step in steps:
        if span and step.row_off % blocks.height == 0 and step.col_off % blocks.width == 0:
            yield span
            span = []
        span.append(step)
    if span:
        yield span


def make_coarse(
    height: int,
    width: int,
    num_bands: int,
    dtype: np.dtype[Any],
    factor: int,
    spans: Iterable[Sequence[Chunk]],
    readers: Sequence[OpenReader],
    fills: Sequence[int] | None = None,
) -> Coarse:
    """Reads and reduces every step once, each reader in a thread of its own that takes the spans of steps in order.

    spans: of steps. readers: each opens, in its thread, what fills an array [C, h, w] with a step's
    values and gives its validity, bool [C or 1, h, w] or None where all is valid. fills: of each band of integers, the one value that is
    no measurement; readers then give None. Floats that are not finite are invalid whatever they give.

    Each cell has its place and its pixels, so neither the steps nor the number of readers change a bit.
    """
    # the bands of a row side by side: `grey_of` can write a row's pixels where its flags are
    shape = (-(-height // factor), num_bands, -(-width // factor))
    coarse = Coarse(factor, np.empty(shape, dtype=dtype).transpose(0, 2, 1), np.empty(shape, dtype=np.bool_).transpose(0, 2, 1))
    reduce = resolve("cell_means")
    waiting, turn, failed = iter(spans), threading.Lock(), threading.Event()

    def next_span() -> Sequence[Chunk]:
        with turn:
            return () if failed.is_set() else next(waiting, ())

    def work(open_reader: OpenReader) -> None:
        # kept: fresh memory for each step would cost half as much time as the reading
        buffer: NDArray[Any] = np.empty(0, dtype=dtype)
        try:
            with open_reader() as read:
                while span := next_span():
                    for step in span:
                        if failed.is_set():
                            return
                        count = num_bands * step.height * step.width
                        buffer = np.empty(count, dtype=dtype) if buffer.size < count else buffer
                        values = buffer[:count].reshape(num_bands, step.height, step.width)
                        _place(reduce, coarse, step, values, read(step, values), fills)
        except BaseException:
            failed.set()
            raise

    if len(readers) == 1:
        work(readers[0])
        return coarse
    with ThreadPoolExecutor(max_workers=len(readers), thread_name_prefix="rsvlm-coarse") as threads:
        working = [threads.submit(work, reader) for reader in readers]
        try:
            for each in working:
                each.result()
        except BaseException:  # also an interrupt, which reaches only this thread
            failed.set()
            raise
    return coarse


def overview_of(coarse: Coarse, height: int, width: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """The copy reduced to [height, width, C], and its validity of the same shape."""
    values, valid = coarse.values, coarse.valid
    factor = 1
    while values.shape[0] // (2 * factor) >= height and values.shape[1] // (2 * factor) >= width:
        factor *= 2
    if factor > 1:
        rows, cols, num_bands = values.shape
        spans = [[Chunk(row, 0, count, cols)] for row, count in _parts(rows, factor, num_bands * cols * values.itemsize)]

        def read(step: Chunk, cells: NDArray[Any]) -> NDArray[np.bool_]:
            taken = slice(step.row_off, step.row_off + step.height)
            cells[:] = values[taken].transpose(2, 0, 1)
            return np.ascontiguousarray(valid[taken].transpose(2, 0, 1))

        readers = [lambda: nullcontext(read)] * min(num_threads(), len(spans))
        smaller = make_coarse(rows, cols, num_bands, values.dtype, factor, spans, readers)
        values, valid = smaller.values, smaller.valid
    return area_average(values, valid, height, width)


def grey_of(coarse: Coarse, stretch: Stretch | None) -> NDArray[np.uint8]:
    """Grey levels uint8 [h, w, 3] of the copy; None: of bytes, shown as they are.

    Where the copy has three bands in the order of `make_coarse` they take the memory of its flags, which are lost.
    """
    values, valid = coarse.values, coarse.valid
    rows, cols, num_bands = values.shape
    flags = valid.transpose(0, 2, 1)  # [h, C, w]
    shape = (rows, cols, 3)
    out: NDArray[np.uint8]
    out = flags.view(np.uint8).reshape(shape) if num_bands == 3 and flags.flags.c_contiguous else np.empty(shape, np.uint8)

    def show(part: tuple[int, int]) -> None:
        taken = slice(part[0], part[0] + part[1])
        grey = values[taken] if stretch is None else stretch.apply(values[taken], valid[taken])
        out[taken] = grey  # one band becomes all three

    parts = list(_parts(rows, 1, _INDEX_BYTES * cols))
    with ThreadPoolExecutor(max_workers=min(num_threads(), len(parts)), thread_name_prefix="rsvlm-grey") as threads:
        for _ in threads.map(show, parts):
            pass
    return out


def _parts(rows: int, factor: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of parts of at most PART_BYTES, each but the last a multiple of `factor`."""
    most = max(1, PART_BYTES // (row_bytes * factor)) * factor
    for row in range(0, rows, most):
        yield row, min(most, rows - row)


def _place(
    reduce: Callable[..., Any],
    coarse: Coarse,
    step: Chunk,
    read: NDArray[Any],
    usable: NDArray[np.bool_] | None,
    fills: Sequence[int] | None,
) -> None:
    """Reduces one step into its cells."""
    factor = coarse.factor
    rows = slice(step.row_off // factor, -(-(step.row_off + step.height) // factor))
    cols = slice(step.col_off // factor, -(-(step.col_off + step.width) // factor))
    out = coarse.values[rows, cols].transpose(2, 0, 1), coarse.valid[rows, cols].transpose(2, 0, 1)
    reduce(read, factor, usable, fills, out)
