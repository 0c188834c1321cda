"""Owns the quick-look: the scene with its windows drawn on it, a legend and a scale bar, as PNG. Knows no georeference."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ...imagery.lettering import font, shortened, wrapped
from ..record import PixelWindow, SceneHeader
from .colours import ACCENT, CITED, RGB, ramp_colour
from .files import write_bytes
from .legend import Legend, best_rows, facts, heading, make_legend
from .rows import OutputRow

PICTURE_PX = 1100  # long side of the scene in the picture; small scenes are enlarged to at least half of it
PANEL_PX, MARGIN_PX = 330, 24
NUMBERED = 5  # of the best windows
TEXTS = 8  # that the panel has room for
UNSEEN = 0.45  # brightness of ground that no record answers for
PAPER, INK, FAINT, LINE, GAP = (250, 250, 248), (28, 30, 34), (104, 108, 116), (214, 214, 208), (226, 226, 222)


class Overview(NamedTuple):
    """The scene in small: rgb uint8 [h, w, 3] and mask bool [h, w], True where valid."""

    rgb: NDArray[np.uint8]
    mask: NDArray[np.bool_]


def write_quicklook(path: Path, header: SceneHeader, rows: Sequence[OutputRow], overview: Overview) -> None:
    """One PNG; the same values give the same bytes with one version of Pillow."""
    buffer = io.BytesIO()
    draw_quicklook(header, rows, overview).save(buffer, "PNG", optimize=True)
    write_bytes(path, buffer.getvalue())


def draw_quicklook(header: SceneHeader, rows: Sequence[OutputRow], overview: Overview) -> Image.Image:
    """The picture."""
    scene = _scene_picture(header, rows, overview)
    legend = make_legend(header, rows)
    boxes = [_scaled(row.area, header, scene.size) for row in rows]
    _draw_windows(scene, rows, boxes, legend, header)
    panel = _panel(header, rows, legend, scene.height)
    title = wrapped(heading(header), 26, scene.width + PANEL_PX)
    top = MARGIN_PX + 34 * len(title) + 30
    height = top + max(scene.height, panel.height) + MARGIN_PX
    page = Image.new("RGB", (MARGIN_PX * 3 + scene.width + PANEL_PX, height), PAPER)
    draw = ImageDraw.Draw(page)
    for index, line in enumerate(title):
        draw.text((MARGIN_PX, MARGIN_PX - 6 + 34 * index), line, INK, font(26))
    name = header.source.replace("\\", "/").rpartition("/")[2]
    draw.text(
        (MARGIN_PX, top - 32),
        shortened("  ·  ".join([name, *facts(header, rows)]), 15, page.width - 2 * MARGIN_PX),
        FAINT,
        font(15),
    )
    page.paste(scene, (MARGIN_PX, top))
    page.paste(panel, (MARGIN_PX * 2 + scene.width, top))
    return page


def _scene_picture(header: SceneHeader, rows: Sequence[OutputRow], overview: Overview) -> Image.Image:
    """The overview at its size on the page; invalid ground is paper-grey, ground without an answer is dark."""
    scale = PICTURE_PX / max(header.height, header.width)
    size = (max(1, round(header.width * scale)), max(1, round(header.height * scale)))
    shown = np.where(overview.mask[..., None], overview.rgb, np.uint8(GAP[0])).astype(np.uint8)
    answered = np.zeros((size[1], size[0]), dtype=np.bool_)
    for row in rows:
        left, top, right, bottom = _scaled(row.area, header, size)
        answered[top:bottom, left:right] = True
    enlarged = size[0] > overview.rgb.shape[1]
    picture = Image.fromarray(shown).resize(size, Image.Resampling.BICUBIC if enlarged else Image.Resampling.BOX)
    valid = np.asarray(Image.fromarray(overview.mask).resize(size, Image.Resampling.NEAREST))
    pixels = np.asarray(picture)
    dark = (pixels * UNSEEN).astype(np.uint8)
    return Image.fromarray(np.where((answered | ~valid)[..., None], pixels, dark))


def _draw_windows(
    scene: Image.Image,
    rows: Sequence[OutputRow],
    boxes: Sequence[tuple[int, int, int, int]],
    legend: Legend,
    header: SceneHeader,
) -> None:
    filled = header.mode in ("classify", "find")
    if filled:
        tint, cover = Image.new("RGB", scene.size), Image.new("L", scene.size)
        paint, opaque = ImageDraw.Draw(tint), ImageDraw.Draw(cover)
        for row, (left, top, right, bottom) in zip(rows, boxes, strict=True):
            if row.role == "answer":
                paint.rectangle((left, top, right - 1, bottom - 1), legend.colour(row))
                opaque.rectangle((left, top, right - 1, bottom - 1), round(255 * legend.opacity(row)))
        scene.paste(tint, (0, 0), cover)
    draw = ImageDraw.Draw(scene)
    numbers = {row.name: str(rank) for rank, row in enumerate(best_rows(rows, NUMBERED), 1)} if header.mode == "find" else {}
    if header.mode in ("describe", "ask") and sum(row.role == "answer" for row in rows) > 1:
        numbers = {row.name: str(row.record.place.index) for row in rows if row.role == "answer"}
    ranked = header.mode == "find"
    for strong in (False, True):  # what is outlined strongly lies on top
        for row, box in zip(rows, boxes, strict=True):
            if (row.role == "cited" or (ranked and row.name in numbers)) == strong:
                _outline(draw, box, row, legend, strong)
    for row, box in zip(rows, boxes, strict=True):
        if row.name in numbers:
            _badge(draw, box, numbers[row.name], ranked)


def _outline(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], row: OutputRow, legend: Legend, strong: bool) -> None:
    left, top, right, bottom = box
    if not strong and (legend.score_range is not None or min(right - left, bottom - top) < 6):  # it would be all lines
        return
    colour: RGB = (255, 255, 255) if strong and row.role == "answer" else legend.colour(row)
    if strong:
        draw.rectangle((left - 1, top - 1, right, bottom), None, (0, 0, 0), 4)
    draw.rectangle((left, top, right - 1, bottom - 1), None, colour, 2 if strong else 1)


def _badge(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], text: str, ranked: bool) -> None:
    left, top, right, bottom = box
    letters = font(17 if ranked else 13)
    width = math.ceil(draw.textlength(text, letters)) + 10
    height = 24 if ranked else 18
    if not ranked and (right - left < width + 4 or bottom - top < height + 4):
        return
    draw.rectangle(
        (left, top, left + width, top + height), (255, 255, 255) if ranked else ACCENT, (0, 0, 0) if ranked else None
    )
    draw.text((left + width / 2, top + height / 2), text, (0, 0, 0), letters, anchor="mm")


def _panel(header: SceneHeader, rows: Sequence[OutputRow], legend: Legend, height: int) -> Image.Image:
    """The column beside the scene: legend, best windows or texts, scale bar."""
    blocks: list[tuple[str, RGB, int, RGB | None]] = []  # text, its colour, its size, a swatch before it
    answers = [row for row in rows if row.role == "answer"]
    for label, colour, share in legend.classes:
        blocks.append((f"{label}  {share:.0%}", INK, 17, colour))
    for rank, row in enumerate(best_rows(rows, NUMBERED), 1):
        if header.mode == "find":
            blocks.append(
                (f"{rank}   {row.record.score:.3f}   row {row.area.row_off}, column {row.area.col_off}", INK, 15, None)
            )
    if header.mode in ("describe", "ask"):
        for row in answers[:TEXTS]:
            mark = f"{row.record.place.index}  " if len(answers) > 1 else ""
            blocks.append((f"{mark}{' '.join(row.record.text.split())}", INK, 16, None))
        if len(answers) > TEXTS:
            blocks.append((f"and {len(answers) - TEXTS:,} more windows", FAINT, 14, None))
    if legend.cited:
        blocks.append(("windows that the answer looked at", INK, 15, CITED))
    if header.empty_px or header.uniform_px:
        share = (header.empty_px + header.uniform_px) / (header.height * header.width)
        blocks.append((f"skipped as empty or uniform  {share:.1%}", FAINT, 14, (70, 72, 76)))
    canvas = Image.new("RGB", (PANEL_PX, max(height, 4000)), PAPER)
    draw = ImageDraw.Draw(canvas)
    top = 0
    if legend.score_range is not None:
        top = _ramp(draw, legend.score_range)
    for text, colour, points, swatch in blocks:
        indent = 32 if swatch else 0
        if swatch:
            draw.rectangle((0, top + 2, 20, top + 20), swatch, LINE)
        for line in wrapped(text, points, PANEL_PX - indent):
            draw.text((indent, top), line, colour, font(points))
            top += round(points * 1.4)
        top += 10
    used = top
    if header.gsd_native_m is not None:
        bar = _scale_bar(header, max(height, used + 60))
        canvas.paste(bar, (0, max(height, used + 60) - bar.height))
        used = max(height, used + 60)
    return canvas.crop((0, 0, PANEL_PX, max(used, 1)))


def _ramp(draw: ImageDraw.ImageDraw, score_range: tuple[float, float]) -> int:
    width = PANEL_PX - 20
    for column in range(width):
        draw.line((column, 0, column, 18), ramp_colour(column / (width - 1)))
    draw.text((0, 24), f"{score_range[0]:.3f}", INK, font(14))
    draw.text((width, 24), f"{score_range[1]:.3f}", INK, font(14), anchor="ra")
    draw.text((width / 2, 24), "score", FAINT, font(14), anchor="ma")
    return 60


def _scale_bar(header: SceneHeader, height: int) -> Image.Image:
    """A round number of metres, at the scale of the picture."""
    assert header.gsd_native_m is not None
    metres_per_px = header.gsd_native_m * max(header.height, header.width) / PICTURE_PX
    metres = round_distance(metres_per_px * (PANEL_PX - 90))
    length = round(metres / metres_per_px)
    bar = Image.new("RGB", (PANEL_PX, 34), PAPER)
    draw = ImageDraw.Draw(bar)
    draw.line((1, 8, 1, 20, length, 20, length, 8), INK, 2)
    text = f"{metres / 1000:g} km" if metres >= 1000 else f"{metres:g} m" if metres >= 1 else f"{metres * 100:g} cm"
    draw.text((length + 10, 20), text, INK, font(15), anchor="lm")
    return bar


def round_distance(limit: float) -> float:
    """The largest of 1, 2, 5 x 10^n that is at most `limit`."""
    power = 10.0 ** math.floor(math.log10(limit))
    return next(round(step * power, 12) for step in (5.0, 2.0, 1.0) if step * power <= limit)


def _scaled(window: PixelWindow, header: SceneHeader, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """left, top, right, bottom in the picture; at least one pixel."""
    across, down = size[0] / header.width, size[1] / header.height
    left, top = round(window.col_off * across), round(window.row_off * down)
    right, bottom = round((window.col_off + window.width) * across), round((window.row_off + window.height) * down)
    return left, top, max(right, left + 1), max(bottom, top + 1)
