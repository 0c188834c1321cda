"""Owns where a scene is cut into windows, and which of them hold nothing to answer about. Knows no model and no file format.

The grid begins at the scene's pixel (0, 0) and steps by `window_px - overlap_px`, so a scene that is cropped at a multiple of the step
has the same windows. Only the last window of a row or a column moves inwards, so that every window is full where the scene is at least
that large. Two neighbours share their overlap half and half: the cores cover every pixel once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import numpy.typing as npt

from ..engine.checks import check_integer
from ..errors import InputError
from ..imagery.pack import EXACT_SCENE_PX
from ..imagery.source import Scene
from .record import GridWindow, PixelWindow

MAX_WINDOW_PX = int(EXACT_SCENE_PX**0.5)  # a window stands in memory at native size

Content = Literal["something", "empty", "uniform"]


@dataclass(frozen=True)
class GridSpec:
    """Side of a window and what two neighbours share, in native pixels.

    Raises:
        InputError: a side below 1 or too large for memory, or an overlap that leaves no step.
    """

    window_px: int
    overlap_px: int = 0

    def __post_init__(self) -> None:
        check_integer("window_px", self.window_px)
        check_integer("overlap_px", self.overlap_px)
        if not 1 <= self.window_px <= MAX_WINDOW_PX:
            raise InputError(
                f"window_px must be in 1..{MAX_WINDOW_PX}, got {self.window_px}; take windows near the checkpoint's tile, or leave it "
                "out for one answer about the whole scene"
            )
        if not 0 <= self.overlap_px <= self.window_px // 2:
            raise InputError(
                f"overlap_px must be in 0..{self.window_px // 2} (half of window_px {self.window_px}), got {self.overlap_px}; lower it"
            )

    @property
    def step_px(self) -> int:
        """From one window to the next."""
        return self.window_px - self.overlap_px


@dataclass(frozen=True)
class Span:
    """One window along one axis: what is seen and what is answered for, in pixels."""

    start: int
    length: int
    core_start: int
    core_length: int


def spans(side: int, spec: GridSpec) -> list[Span]:
    """The windows along a side of `side` pixels. Their cores cover it once; a core lies inside its window."""
    if side < 1:
        raise InputError(f"side must be at least 1 pixel, got {side}; pass the scene's height or width")
    count = 1 + max(0, -(-(side - spec.window_px) // spec.step_px))
    starts = [index * spec.step_px for index in range(count - 1)]
    starts.append(max(0, side - spec.window_px))
    length = min(side, spec.window_px)
    cuts = [0, *(_cut(start, length, following) for start, following in itertools.pairwise(starts)), side]
    return [Span(start, length, cuts[i], cuts[i + 1] - cuts[i]) for i, start in enumerate(starts)]


def _cut(start: int, length: int, following: int) -> int:
    """Where one core ends and the next begins: the middle of what two windows share."""
    return (following + start + length) // 2


class Grid(Sequence[GridWindow]):
    """All windows of a scene, row by row, made when they are asked for."""

    def __init__(self, height: int, width: int, spec: GridSpec | None) -> None:
        """spec: None is one window, the whole scene."""
        whole = (Span(0, height, 0, height), Span(0, width, 0, width))
        self.rows = [whole[0]] if spec is None else spans(height, spec)
        self.cols = [whole[1]] if spec is None else spans(width, spec)

    def __len__(self) -> int:
        return len(self.rows) * len(self.cols)

    @overload
    def __getitem__(self, index: int) -> GridWindow: ...

    @overload
    def __getitem__(self, index: slice) -> list[GridWindow]: ...

    def __getitem__(self, index: int | slice) -> GridWindow | list[GridWindow]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        place = range(len(self))[index]  # IndexError and negative numbers as for any sequence
        row, col = self.rows[place // len(self.cols)], self.cols[place % len(self.cols)]
        return GridWindow(
            place,
            PixelWindow(row.start, col.start, row.length, col.length),
            PixelWindow(row.core_start, col.core_start, row.core_length, col.core_length),
        )


@dataclass(frozen=True)
class Selection:
    """The windows to answer, and the native pixels of the cores that were left out because nothing is there to see."""

    windows: tuple[GridWindow, ...]
    empty_px: int
    uniform_px: int


def select(scene: Scene, grid: Grid) -> Selection:
    """Leaves out empty windows (no valid pixel) and uniform ones (all valid pixels look the same).

    The scene's overview decides where it can; a window is read only where the overview leaves doubt: at the rim of nodata, and
    where it looks uniform, because an average hides texture. A grid of one window, the whole scene, keeps it.
    """
    if len(grid) == 1:
        return Selection((grid[0],), 0, 0)
    rgb, mask = scene.overview()
    kept: list[GridWindow] = []
    left_out: dict[Content, int] = {"something": 0, "empty": 0, "uniform": 0}
    for place in grid:
        content = _content(scene, place.window, rgb, mask)
        if content == "something":
            kept.append(place)
        left_out[content] += place.core.height * place.core.width
    return Selection(tuple(kept), left_out["empty"], left_out["uniform"])


def _content(scene: Scene, window: PixelWindow, rgb: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_]) -> Content:
    """What the overview (rgb [h, w, 3], mask [h, w]) says about a native window, or its own pixels in doubt."""
    touched, inside = _overview_cells(scene, window, mask.shape)
    if not mask[touched].any():
        return "empty"
    if mask[inside].any() and not _looks_uniform(rgb[inside], mask[inside]):
        return "something"
    own, valid = scene.read(window.row_off, window.col_off, window.height, window.width)
    if not valid.any():
        return "empty"
    return "uniform" if _looks_uniform(own, valid) else "something"


def _overview_cells(
    scene: Scene, window: PixelWindow, shape: tuple[int, ...]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The overview's cells that a window touches, and those that lie well inside it: a mean may reach into the next cell."""
    touched, inside = [], []
    for start, length, side, cells in (
        (window.row_off, window.height, scene.height, shape[0]),
        (window.col_off, window.width, scene.width, shape[1]),
    ):
        stop = start + length
        touched.append(slice(start * cells // side, -(-stop * cells // side)))
        inside.append(slice(-(-start * cells // side) + 1, max(0, stop * cells // side - 1)))
    return (touched[0], touched[1]), (inside[0], inside[1])


def _looks_uniform(rgb: npt.NDArray[np.uint8], valid: npt.NDArray[np.bool_]) -> bool:
    """Whether all valid pixels have one colour."""
    colours = rgb[valid]  # [n, 3]
    return bool((colours == colours[:1]).all())


def total_px(windows: Sequence[GridWindow]) -> int:
    """Native pixels that the records of these windows answer for."""
    return sum(place.core.height * place.core.width for place in windows)


def batches(windows: Sequence[GridWindow], size: int) -> Iterator[list[GridWindow]]:
    """Windows in their order, `size` at a time."""
    for first in range(0, len(windows), size):
        yield list(windows[first : first + size])
