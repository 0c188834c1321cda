"""Scenes with records for the output tests: in UTM, on the antimeridian, without a place; in every mode."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rsvlm_infer.scenes.outputs.quicklook import Overview
from rsvlm_infer.scenes.record import GridWindow, Mode, PixelWindow, SceneHeader, WindowRecord

HEIGHT, WIDTH, SIDE = 300, 400, 100
LABELS = ("farmland", "forest", "port & <harbour>")
UTM_33 = "EPSG:32633"
NORTH_UP = (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_500_000.0)
ANTIMERIDIAN = ("EPSG:32660", (100.0, 0.0, 699_000.0, 0.0, -100.0, 5_500_000.0))


def wkt(crs: str) -> str:
    from rasterio.crs import CRS

    return str(CRS.from_user_input(crs).to_wkt(version="WKT2_2019"))


def header(mode: Mode = "find", *, crs: str | None = UTM_33, transform: Any = NORTH_UP, **changes: Any) -> SceneHeader:
    values: dict[str, Any] = {
        "source": "scenes/Kiel Förde.tif",
        "content_hash": "c" * 64,
        "height": HEIGHT,
        "width": WIDTH,
        "count": 4,
        "dtype": "uint16",
        "crs": None if crs is None else wkt(crs),
        "transform": transform,
        "gsd_native_m": None if crs is None else 10.0,
        "stretch_low": (1.0, 2.0, 3.0),
        "stretch_high": (100.0, 200.0, 300.0),
        "mode": mode,
        "query": "harbour with many ships" if mode in ("find", "ask") else "",
        "model_hash": "a" * 64,
        "prompt_hash": "b" * 64,
        "config_hash": "d" * 64,
        "empty_px": SIDE * SIDE,
    }
    return SceneHeader(**(values | changes))


def records(mode: Mode = "find") -> list[WindowRecord]:
    """A grid of 3 x 4 windows; window 5 was skipped. Each window reaches 10 px over its core, where the scene does."""
    made = []
    for index in range(12):
        if index == 5:
            continue
        row, col = divmod(index, 4)
        core = PixelWindow(row * SIDE, col * SIDE, SIDE, SIDE)
        top, left = max(0, core.row_off - 10), max(0, core.col_off - 10)
        window = PixelWindow(
            top, left, min(HEIGHT, core.row_off + SIDE + 10) - top, min(WIDTH, core.col_off + SIDE + 10) - left
        )
        values: dict[str, Any] = {"text": f"text {index} of <b>windows</b> — größer"}
        if mode == "find":
            values = {"score": index / 64}
        elif mode == "classify":
            label = LABELS[index % 3]
            values = {"label": label, "score": 0.5, "scores": {name: 0.5 if name == label else 0.25 for name in LABELS}}
        elif mode == "ask":
            values["cited"] = (PixelWindow(0, 0, 30, 30), core)
        made.append(
            WindowRecord(
                place=GridWindow(index, window, core),
                gsd_effective_m=12.5,
                valid_share=0.75,
                num_visual_tokens=64,
                num_prompt_tokens=80,
                num_new_tokens=len(values.get("text", "")),
                finish_reason="stop",
                warnings=("scaled down",) if index == 3 else (),
                **values,
            )
        )
    return made


def overview(_: SceneHeader | None = None) -> Overview:
    """A blue picture whose left tenth is invalid."""
    rgb = np.full((150, 200, 3), (20, 60, 120), np.uint8)
    mask = np.ones((150, 200), np.bool_)
    mask[:, :20] = False
    return Overview(rgb, mask)


def slower(made: list[WindowRecord]) -> list[WindowRecord]:
    """The same records that took longer and came in another order."""
    return [dataclasses.replace(each, timings=dataclasses.replace(each.timings, decode_ms=1e6)) for each in reversed(made)]


def pixel(picture: Image.Image, row: int, col: int) -> tuple[int, ...]:
    value = picture.getpixel((col, row))
    assert isinstance(value, tuple)
    return value


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")
