"""Owns what the colours of one scene mean: a colour for each row, the legend's entries, the range of scores. Draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..record import SceneHeader
from .colours import ACCENT, CITED, RGB, class_colours, ramp_colour
from .files import number
from .rows import OutputRow

CLASS_OPACITY = 0.38
FIND_OPACITY = (0.08, 0.6)  # of the lowest and the highest score: what is not relevant stays to be seen


@dataclass(frozen=True)
class Legend:
    """classes: (label, colour, share of the answered area). score_range: lowest and highest score of mode find, None elsewhere."""

    classes: tuple[tuple[str, RGB, float], ...]
    score_range: tuple[float, float] | None
    cited: bool

    def colour(self, row: OutputRow) -> RGB:
        """The colour of one row."""
        if row.role == "cited":
            return CITED
        share = self._share(row)
        if share is not None:
            return ramp_colour(share)
        return next((colour for label, colour, _ in self.classes if label == row.record.label), ACCENT)

    def opacity(self, row: OutputRow) -> float:
        """How much of the scene one row's colour covers, 0 to 1: the better a find, the more; answers in words cover nothing."""
        share = self._share(row)
        if row.role == "cited" or (share is None and row.record.label is None):
            return 0.0
        return CLASS_OPACITY if share is None else FIND_OPACITY[0] + (FIND_OPACITY[1] - FIND_OPACITY[0]) * share

    def _share(self, row: OutputRow) -> float | None:
        """Where a score lies in the range, 0 to 1."""
        score = number(row.record.score)
        if self.score_range is None or score is None:
            return None
        low, high = self.score_range
        return (score - low) / (high - low) if high > low else 1.0


def make_legend(header: SceneHeader, rows: Sequence[OutputRow]) -> Legend:
    """The legend of a scene's rows."""
    answers = [row for row in rows if row.role == "answer"]
    cited = len(answers) < len(rows)
    scores = [score for row in answers if (score := number(row.record.score)) is not None]
    if header.mode == "find":
        return Legend((), (min(scores), max(scores)) if scores else None, cited)
    areas: dict[str, int] = {}
    for row in answers:
        if row.record.label is not None:
            areas[row.record.label] = areas.get(row.record.label, 0) + row.area.height * row.area.width
    colours = class_colours(list(areas))
    total = sum(areas.values())
    order = sorted(areas, key=lambda label: (-areas[label], label))
    return Legend(tuple((label, colours[label], areas[label] / total) for label in order), None, cited)


def best_rows(rows: Sequence[OutputRow], count: int) -> list[OutputRow]:
    """The answers with the highest scores, ties in the order of the grid."""
    scored = [(score, row) for row in rows if row.role == "answer" and (score := number(row.record.score)) is not None]
    return [row for _, row in sorted(scored, key=lambda entry: -entry[0])[:count]]


def heading(header: SceneHeader) -> str:
    """What was asked, in words."""
    words = {"describe": "Description", "ask": "Question", "classify": "Classes", "find": "Search"}[header.mode]
    return f"{words}: {header.query}" if header.query else words


def facts(header: SceneHeader, rows: Sequence[OutputRow]) -> list[str]:
    """Short facts about the scene: its pixels, ground and windows."""
    words = [f"{header.width:,} × {header.height:,} px", f"{header.count} × {header.dtype}"]
    if header.gsd_native_m is not None:
        area = header.width * header.height * header.gsd_native_m**2 / 1e6
        words += [f"{header.gsd_native_m:.3g} m per pixel", f"{area:,.3g} km²" if area < 1000 else f"{area:,.0f} km²"]
    count = sum(row.role == "answer" for row in rows)
    words.append(f"{count:,} window" + ("" if count == 1 else "s"))
    return words
