"""Scenes without rasters and a model without weights, quick enough to be killed many times.

A fake source is a JSON file: {"windows": n, ...}. The answer to a window depends on the file's bytes and the window alone. What was
answered is appended to a log, one line for each window and call, so that a test can count.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsvlm_infer.errors import ImageReadError, InputError
from rsvlm_infer.scenes.record import GridWindow, PixelWindow, SceneHeader, WindowRecord
from rsvlm_infer.tasks.result import Timings

SIDE = 100


def write_fake(path: Path, windows: int, **behaviour: Any) -> str:
    """behaviour: broken = indices that always fail; flaky = indices that fail once; gsd."""
    path.write_text(json.dumps({"windows": windows, **behaviour}))
    return str(path)


def _sha(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass
class FakeRun:
    """One fake scene."""

    opener: FakeOpener
    source: str
    budget: int
    values: dict[str, Any]
    header: SceneHeader = field(init=False)
    windows: Sequence[GridWindow] = field(init=False)
    failed: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        count = self.values["windows"]
        places = [PixelWindow(index * SIDE, 0, SIDE, SIDE) for index in range(count)]
        self.windows = [GridWindow(index, place, place) for index, place in enumerate(places)]
        self.header = SceneHeader(
            source=self.source,
            content_hash=_sha(self.values),
            height=max(1, count) * SIDE,
            width=SIDE,
            count=3,
            dtype="uint8",
            crs=None,
            transform=None,
            gsd_native_m=self.values.get("gsd", 10.0),
            stretch_low=(),
            stretch_high=(),
            mode="describe",
            query="",
            model_hash=_sha("model", self.opener.model),
            prompt_hash=_sha("prompt"),
            config_hash=_sha("config", self.budget),
        )

    def answer(self, windows: Sequence[GridWindow]) -> list[WindowRecord]:
        indices = [window.index for window in windows]
        self.opener.note(self.source, indices, self.budget)
        if len(windows) > self.opener.memory_windows or self.budget > self.opener.memory_budget:
            raise MemoryError
        time.sleep(self.opener.pause_s * len(windows))
        for index in indices:
            if index in self.values.get("broken", ()):
                raise RuntimeError(f"window {index} is broken")
            if index in self.values.get("flaky", ()) and len(windows) == 1 and index not in self.failed:
                self.failed.add(index)
                raise RuntimeError(f"window {index} is flaky")
        return [self._record(window) for window in windows]

    def close(self) -> None:
        self.opener.closed += 1

    def _record(self, window: GridWindow) -> WindowRecord:
        digest = _sha(self.header.content_hash, window.index)
        return WindowRecord(
            place=window,
            text=f"scene {digest[:12]} – {self.budget}",
            score=int(digest[:8], 16) / 7.0,
            num_visual_tokens=self.budget,
            num_prompt_tokens=10,
            num_new_tokens=5,
            timings=Timings(decode_ms=time.perf_counter()),
        )


@dataclass
class FakeOpener:
    """Opens fake scenes. memory_windows, memory_budget: beyond them there is no memory."""

    log: Path
    pause_s: float = 0.0
    memory_windows: int = 1000
    memory_budget: int = 100_000
    model: str = "fake"
    budget: int = 256
    least_budget: int = 64
    opened: int = 0
    closed: int = 0

    def open(self, source: str, budget: int | None) -> FakeRun:
        self.opened += 1
        asked = self.budget if budget is None else budget
        if asked < self.least_budget:
            raise InputError(f"budget must be at least {self.least_budget}, got {asked}")
        try:
            return FakeRun(self, source, asked, json.loads(Path(source).read_text()))
        except (OSError, ValueError) as error:
            raise ImageReadError(f"{source} cannot be read ({error}); check the file") from None

    def note(self, source: str, indices: Sequence[int], budget: int) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps([Path(source).name, list(indices), budget]) + "\n")

    def calls(self) -> list[tuple[str, list[int], int]]:
        return [tuple(json.loads(line)) for line in self.log.read_text().splitlines()] if self.log.exists() else []
