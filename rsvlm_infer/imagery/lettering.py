"""Owns words in pictures: the font, lines that fit a width. Knows no picture's meaning."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from PIL import ImageFont

from ..errors import MissingDependencyError

# Pillow's own font lacks most letters outside English; matplotlib brings this one, which has most alphabets
_FONT = Path("mpl-data") / "fonts" / "ttf" / "DejaVuSans.ttf"
MAX_LINES = 6


@functools.cache
def font(points: int) -> ImageFont.FreeTypeFont:
    """The one font of all pictures, `points` pixels high.

    Raises:
        MissingDependencyError: matplotlib, which brings the font, is not installed.
    """
    found = importlib.util.find_spec("matplotlib")
    folders = [] if found is None else [Path(folder) for folder in found.submodule_search_locations or []]
    file = next((folder / _FONT for folder in folders if (folder / _FONT).is_file()), None)
    if file is None:
        raise MissingDependencyError(
            "words in pictures need the font that matplotlib brings, which is not installed; pip install 'rsvlm-infer[report]'"
        )
    return ImageFont.truetype(str(file), points)


def wrapped(text: str, points: int, width: int, max_lines: int = MAX_LINES) -> list[str]:
    """Lines no wider than `width` pixels; what does not fit `max_lines` becomes an ellipsis."""
    letters = font(points)
    lines: list[str] = []
    for word in text.split():
        if lines and letters.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        elif len(lines) == max_lines:
            return [*lines[:-1], shortened(f"{lines[-1]} {word}", points, width)]
        else:
            lines.append(shortened(word, points, width))
    return lines


def shortened(text: str, points: int, width: int) -> str:
    """The text, or its beginning and an ellipsis, no wider than `width` pixels."""
    letters = font(points)
    if letters.getlength(text) <= width:
        return text
    low, high = 0, len(text)  # the longest beginning that fits, by halving: a text may be long
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if letters.getlength(f"{text[:middle]}…") <= width else (low, middle - 1)
    return f"{text[:low]}…"
