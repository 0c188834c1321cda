"""Owns the reading of windows beside the model: one thread with its own handle, a few windows ahead. Knows no model and no record."""

from __future__ import annotations

import bisect
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..imagery.source import ArrayScene, Scene
from .record import GridWindow, PixelWindow


@dataclass(frozen=True)
class WindowPixels:
    """One window as shown: rgb uint8 [h, w, 3], mask bool [h, w], the milliseconds of its reading."""

    rgb: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_]
    read_ms: float

    @property
    def valid_share(self) -> float:
        """Share of valid pixels."""
        return int(self.mask.sum()) / self.mask.size

    def scene(self, parent: Scene, window: PixelWindow) -> ArrayScene:
        """The window as a scene of its own, with its own metres per pixel."""
        name = f"{parent.name} at row {window.row_off}, column {window.col_off}"
        scene = ArrayScene(self.rgb, None if self.mask.all() else self.mask, name=name, stretch="none")
        scene.gsd_native_m = parent.gsd_at(window.row_off + window.height / 2, window.col_off + window.width / 2)
        return scene


class WindowReader:
    """Reads windows in a thread, and the ones that follow them in `order` while their caller works.

    ahead_bytes: what may wait; at most as many windows as were asked for last.
    """

    def __init__(self, scene: Scene, order: Sequence[GridWindow], ahead_bytes: int) -> None:
        self._scene, self._order, self._ahead_bytes = scene, order, ahead_bytes
        self._places = [place.index for place in order]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rsvlm-windows")
        self._twin: Scene | None = None
        self._waiting: dict[PixelWindow, Future[WindowPixels]] = {}

    def take(self, windows: Sequence[GridWindow]) -> list[WindowPixels]:
        """The pixels of these windows; then the reading of the following ones begins.

        Raises:
            ImageReadError: one of them cannot be read.
        """
        wanted = []
        for place in windows:
            ready = self._waiting.pop(place.window) if place.window in self._waiting else None
            wanted.append(ready or self._submit(place.window))
        for stale in self._waiting.values():  # what nobody asked for any more
            stale.cancel()
        self._waiting.clear()
        pixels = [each.result() for each in wanted]
        if windows:
            self._read_ahead(windows[-1].index, len(windows))
        return pixels

    def close(self) -> None:
        """Ends the thread and its handle."""
        for waiting in self._waiting.values():
            waiting.cancel()
        self._waiting.clear()
        self._thread.shutdown(wait=True)
        if self._twin is not None and self._twin is not self._scene:
            self._twin.close()

    def _read_ahead(self, last: int, count: int) -> None:
        first = bisect.bisect_right(self._places, last)
        room = self._ahead_bytes
        for place in self._order[first : first + count]:
            room -= 4 * place.window.height * place.window.width  # three grey levels and a flag
            if room < 0:
                return
            self._waiting[place.window] = self._submit(place.window)

    def _submit(self, window: PixelWindow) -> Future[WindowPixels]:
        return self._thread.submit(self._read, window)

    def _read(self, window: PixelWindow) -> WindowPixels:
        if self._twin is None:
            self._twin = self._scene.twin()
        started = time.perf_counter()
        rgb, mask = self._twin.read(window.row_off, window.col_off, window.height, window.width)
        return WindowPixels(rgb, mask, (time.perf_counter() - started) * 1e3)
