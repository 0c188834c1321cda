"""Owns what a search gives to people and maps: lines, GeoJSON, a contact sheet of what was found. Knows no archive's files."""

from __future__ import annotations

import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..errors import ImageReadError, InputError
from ..imagery.footprint import Footprint, footprint
from ..imagery.lettering import font, shortened, wrapped
from ..imagery.plan import Window
from ..imagery.source import open_scene
from .search import Hit, SearchResult

SCORE_DECIMALS = 6
SUFFIXES = (".geojson", ".png")
CARD_PX, COLUMNS, MARGIN_PX, WORDS_PX = 240, 5, 20, 66
ANSWER_LINES, ANSWER_LINE_PX = 6, 18
PAPER, INK, FAINT, GROUND, LINE = (250, 250, 248), (28, 30, 34), (104, 108, 116), (226, 226, 222), (200, 200, 194)


def hit_values(hit: Hit) -> dict[str, Any]:
    """One find as JSON values."""
    scene = hit.scene
    names = ("row_off", "col_off", "height", "width")
    return {
        "score": round(hit.score, SCORE_DECIMALS),
        "level": hit.level,
        "source": scene.source,
        **dict(zip(names, hit.window, strict=True)),
        "view": dict(zip(names, hit.view, strict=True)),
        "acquired": scene.acquired,
        "gsd_native_m": scene.gsd_native_m,
        "content_hash": scene.content_hash,
        "bbox": None if hit.bbox is None else list(hit.bbox),
        **({} if hit.answer is None else {"answer": hit.answer}),
    }


def hit_line(hit: Hit) -> str:
    """One find as a line: score, file, window, date, its middle where it has a place, and its answer where it was asked."""
    row, col, height, width = hit.window
    words = [
        f"{hit.score:.4f}",
        hit.scene.source,
        f"row {row} column {col} {height} x {width}",
        (hit.scene.acquired or "-")[:10],
    ]
    place = "-"
    if hit.bbox is not None:
        west, south, east, north = hit.bbox
        middle = (west + east + (360 if west > east else 0)) / 2
        place = f"{(south + north) / 2:.5f} {(middle + 180) % 360 - 180:.5f}"
    return "\t".join([*words, place, *([] if hit.answer is None else [" ".join(hit.answer.split())])])


def results_geojson(result: SearchResult, query: str) -> str:
    """The finds as GeoJSON (RFC 7946), best first; a find without a place has the geometry null."""
    lines = []
    for rank, hit in enumerate(result.hits, 1):
        place = _place(hit)
        values = hit_values(hit)
        del values["bbox"]
        feature: dict[str, Any] = {
            "type": "Feature",
            "id": rank,
            "geometry": place.geometry,
            "properties": {"rank": rank, **values},
        }
        if place.bbox is not None:
            feature["bbox"] = list(place.bbox)
        lines.append(_json(feature))
    features = ",\n".join(lines)
    return f'{{"type": "FeatureCollection",\n"query": {_json(query)},\n"features": [\n{features}\n]}}\n'


def contact_sheet(result: SearchResult, query: str) -> bytes:
    """A PNG with a card for each find: its window, rank, score, file and date. A file that cannot be read has a card that says so.

    Raises:
        MissingDependencyError: the font is not installed.
    """
    columns = min(COLUMNS, max(1, len(result.hits)))
    width = max(columns * (CARD_PX + MARGIN_PX) + MARGIN_PX, 640)
    title = wrapped(query, 24, width - 2 * MARGIN_PX, max_lines=2) or ["search"]
    top = MARGIN_PX + 32 * len(title) + 14
    rows = -(-len(result.hits) // columns)
    answers = [wrapped(hit.answer or "", 13, CARD_PX, max_lines=ANSWER_LINES) for hit in result.hits]
    longest = max(map(len, answers), default=0)
    words_px = WORDS_PX + (ANSWER_LINE_PX * longest + 6 if longest else 0)
    page = Image.new("RGB", (width, top + rows * (CARD_PX + words_px + MARGIN_PX) + MARGIN_PX), PAPER)
    draw = ImageDraw.Draw(page)
    for index, line in enumerate(title):
        draw.text((MARGIN_PX, MARGIN_PX - 4 + 32 * index), line, INK, font(24))
    for index, hit in enumerate(result.hits):
        left = MARGIN_PX + index % columns * (CARD_PX + MARGIN_PX)
        upper = top + index // columns * (CARD_PX + words_px + MARGIN_PX)
        _card(page, left, upper, index + 1, hit, answers[index])
    buffer = io.BytesIO()
    page.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_results(path: Path, result: SearchResult, query: str) -> None:
    """A file by its suffix: .geojson, or .png for the contact sheet. It is whole under its name or not there.

    Raises:
        InputError: another suffix, or it cannot be written.
    """
    check_results_path(path)
    content = contact_sheet(result, query) if path.suffix == ".png" else results_geojson(result, query).encode()
    scratch = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError as error:
        raise InputError(f"--output {path} cannot be written ({error.strerror}); choose another place") from None
    finally:
        with suppress(OSError):
            scratch.unlink()


def check_results_path(path: Path) -> None:
    """Raises InputError for a suffix that no result has."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"--output {path} must end in one of {list(SUFFIXES)}; .png is a contact sheet")


def _place(hit: Hit) -> Footprint:
    return footprint(Window(*hit.window), hit.scene.transform, hit.scene.crs)


def _card(page: Image.Image, left: int, top: int, rank: int, hit: Hit, answer: list[str]) -> None:
    draw = ImageDraw.Draw(page)
    draw.rectangle((left - 1, top - 1, left + CARD_PX, top + CARD_PX), GROUND, LINE)
    try:
        picture = _crop(hit)
    except (ImageReadError, InputError):  # moved, changed or damaged since it was indexed
        for index, line in enumerate(wrapped("the file cannot be read any more", 15, CARD_PX - 40)):
            draw.text((left + CARD_PX / 2, top + CARD_PX / 2 - 10 + 22 * index), line, FAINT, font(15), anchor="mm")
    else:
        page.paste(picture, (left + (CARD_PX - picture.width) // 2, top + (CARD_PX - picture.height) // 2))
    below = top + CARD_PX + 8
    draw.text((left, below), f"{rank}", INK, font(17))
    draw.text((left + CARD_PX, below), f"{hit.score:.3f}", INK, font(17), anchor="ra")
    name = Path(hit.scene.source).name.encode("utf-8", "backslashreplace").decode()
    draw.text((left, below + 23), shortened(name, 13, CARD_PX), INK, font(13))
    facts = [(hit.scene.acquired or "")[:10]]
    if hit.scene.gsd_native_m is not None:
        ground = hit.scene.gsd_native_m * max(hit.window[2:])
        facts.append(f"{ground / 1000:.3g} km" if ground >= 1000 else f"{ground:.3g} m")
    else:
        facts.append(f"{hit.window[3]} × {hit.window[2]} px")
    draw.text((left, below + 41), "  ·  ".join(filter(None, facts)), FAINT, font(13))
    for index, line in enumerate(answer):
        draw.text((left, below + 64 + ANSWER_LINE_PX * index), line, INK, font(13))


def _crop(hit: Hit) -> Image.Image:
    """The window at the size of a card, its long side filled."""
    row, col, height, width = hit.window
    with open_scene(hit.scene.source) as scene:
        if (scene.height, scene.width) != (hit.scene.height, hit.scene.width):
            raise ImageReadError(f"{hit.scene.source} has changed since it was indexed; index it again")
        scale = CARD_PX / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        rgb, mask = scene.read(row, col, height, width, min(height, size[1]), min(width, size[0]))
    shown = np.where(mask[..., None], rgb, np.uint8(GROUND[0])).astype(np.uint8)
    picture = Image.fromarray(shown)
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)


def _json(values: Any) -> str:
    # a file name that is no UTF-8 keeps its bytes as escapes
    return json.dumps(values, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace").decode("utf-8")
