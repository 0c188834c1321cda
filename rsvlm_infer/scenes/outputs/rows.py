"""Owns the table that every format shows: a row for each record and each window that it cites, with its place. Knows no format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...imagery.footprint import NO_CRS, NO_GEOREFERENCE, Footprint, footprints
from ..record import PixelWindow, SceneHeader, WindowRecord
from .files import number

Role = Literal["answer", "cited"]


@dataclass(frozen=True)
class OutputRow:
    """One row. `area` is the part of the scene that it is drawn on: a record's core, or a window that a record cites."""

    name: str
    role: Role
    area: PixelWindow
    place: Footprint
    record: WindowRecord

    def values(self, header: SceneHeader) -> dict[str, Any]:
        """Plain values, the same in every format. A cited window repeats neither text nor scores of its record."""
        record, window = self.record, self.record.place.window
        told = self.role == "answer"
        return {
            "id": self.name,
            "role": self.role,
            "record": record.place.index,
            "text": record.text if told else "",
            "label": record.label if told else None,
            "score": number(record.score) if told else None,
            "scores": {name: number(score) for name, score in record.scores.items()} if told else {},
            "row_off": self.area.row_off,
            "col_off": self.area.col_off,
            "height": self.area.height,
            "width": self.area.width,
            "window": list(_four(window if told else self.area)),
            "gsd_native_m": number(header.gsd_native_m),
            "gsd_effective_m": number(record.gsd_effective_m) if told else None,
            "valid_share": number(record.valid_share) if told else None,
            "num_visual_tokens": record.num_visual_tokens if told else None,
            "num_prompt_tokens": record.num_prompt_tokens if told else None,
            "num_new_tokens": record.num_new_tokens if told else None,
            "finish_reason": record.finish_reason if told else None,
            "warnings": list(record.warnings) if told else [],
            "source": header.source,
            "mode": header.mode,
            "query": header.query,
            "model_hash": header.model_hash,
            "prompt_hash": header.prompt_hash,
        }


def output_rows(header: SceneHeader, records: Sequence[WindowRecord]) -> list[OutputRow]:
    """Rows in the order of the grid; behind each record the windows that it cites."""
    entries: list[tuple[str, Role, PixelWindow, WindowRecord]] = []
    for record in sorted(records, key=lambda record: record.place.index):
        index = record.place.index
        entries.append((str(index), "answer", record.place.core, record))
        entries += [(f"{index}-cited-{rank}", "cited", window, record) for rank, window in enumerate(record.cited)]
    places = footprints([area for _, _, area, _ in entries], header.transform, header.crs)
    return [
        OutputRow(name, role, area, place, record) for (name, role, area, record), place in zip(entries, places, strict=True)
    ]


def scene_place(header: SceneHeader) -> Footprint:
    """Where the whole scene lies."""
    return footprints([PixelWindow(0, 0, header.height, header.width)], header.transform, header.crs)[0]


def lost_sentences(header: SceneHeader, places: Sequence[Footprint]) -> list[str]:
    """What the files cannot say about places, each sentence once. The header's own words stand for a missing georeference."""
    found = [place.lost for place in places if place.lost]
    known = {NO_CRS, NO_GEOREFERENCE} if header.lost else set()
    return list(dict.fromkeys([*header.lost, *(words for words in found if words not in known)]))


def _four(window: PixelWindow) -> tuple[int, int, int, int]:
    return window.row_off, window.col_off, window.height, window.width
