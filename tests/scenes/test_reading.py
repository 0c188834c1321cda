"""Windows are read by one thread with its own handle, the following ones ahead, within a bound."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from rsvlm_infer.errors import ImageReadError
from rsvlm_infer.imagery.source import ArrayScene, Scene, open_scene
from rsvlm_infer.scenes.reading import WindowReader
from rsvlm_infer.scenes.windows import Grid, GridSpec
from tests.scenes.telling_scenes import write_scene


class Watched(ArrayScene):
    """A scene that notes who reads which window."""

    def __init__(self, pixels: np.ndarray) -> None:
        super().__init__(pixels, None, name="watched")
        self.seen: list[tuple[int, str]] = []
        self.fails_at = -1

    def read(self, row_off, col_off, height, width, out_height=None, out_width=None):  # type: ignore[no-untyped-def]
        self.seen.append((col_off, threading.current_thread().name))
        if col_off == self.fails_at:
            raise ImageReadError("no such window")
        return super().read(row_off, col_off, height, width, out_height, out_width)


PIXELS = np.random.default_rng(0).integers(0, 255, (10, 80, 3), dtype=np.uint8)


@pytest.fixture
def scene() -> Watched:
    return Watched(PIXELS)


def reader_of(scene: Scene, ahead_bytes: int = 1 << 20) -> tuple[WindowReader, list]:  # type: ignore[type-arg]
    windows = list(Grid(10, 80, GridSpec(10)))
    return WindowReader(scene, windows, ahead_bytes), windows


def columns(scene: Watched) -> list[int]:
    return [col for col, _ in scene.seen]


def test_following_windows_are_read_ahead_once_and_by_one_thread(scene: Watched) -> None:
    reader, windows = reader_of(scene)
    first = reader.take(windows[:2])
    second = reader.take(windows[2:4])
    reader.close()
    assert columns(scene)[:4] == [0, 10, 20, 30]
    assert len(set(columns(scene))) == len(columns(scene))
    assert {name for _, name in scene.seen} == {"rsvlm-windows_0"}
    for index, pixels in enumerate((*first, *second)):
        assert (pixels.rgb == PIXELS[:, 10 * index : 10 * index + 10]).all()
        assert pixels.valid_share == 1.0
        assert pixels.read_ms > 0


def test_nothing_is_read_ahead_beyond_the_bound_or_the_end(scene: Watched) -> None:
    reader, windows = reader_of(scene, ahead_bytes=2 * 4 * 100 + 399)  # two windows of 10 x 10 pixels and a little more
    reader.take(windows[:4])
    reader.close()
    assert set(columns(scene)) <= {0, 10, 20, 30, 40, 50}
    reader, windows = reader_of(scene)
    reader.take(windows[-1:])
    reader.close()


def test_any_order_and_repeats_give_the_right_pixels(scene: Watched) -> None:
    reader, windows = reader_of(scene)
    for order in ((7, 0), (3, 3), (1, 2), (3, 4)):
        for index, pixels in zip(order, reader.take([windows[index] for index in order]), strict=True):
            assert (pixels.rgb == PIXELS[:, 10 * index : 10 * index + 10]).all()
    reader.close()


def test_a_window_that_fails_harms_no_other(scene: Watched) -> None:
    scene.fails_at = 20
    reader, windows = reader_of(scene)
    assert len(reader.take(windows[:2])) == 2
    with pytest.raises(ImageReadError, match="no such window"):
        reader.take(windows[2:4])
    assert len(reader.take(windows[3:4])) == 1
    reader.close()
    reader.close()


def test_the_thread_has_a_handle_of_its_own_with_the_same_stretch(tmp_path: Path) -> None:
    path = write_scene(tmp_path / "a.tif", np.random.default_rng(1).integers(0, 4000, (3, 10, 80), dtype=np.uint16))
    with open_scene(path) as scene:
        twin = scene.twin()
        assert twin is not scene
        assert twin.stretch == scene.stretch
        assert not twin.stretch_from_scene
        assert scene.stretch_from_scene
        reader, windows = reader_of(scene)
        (pixels,) = reader.take(windows[3:4])
        assert (pixels.rgb == scene.read(0, 30, 10, 10)[0]).all()
        reader.close()
        scene.read(0, 0, 10, 10)  # the scene's own handle is open still
        own = pixels.scene(scene, windows[3].window)
        assert own.gsd_native_m == scene.gsd_native_m
        twin.close()
