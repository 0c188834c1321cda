"""Owns the GeoJSON of a scene (RFC 7946): WGS 84, counter-clockwise rings, cut at the antimeridian. Knows no model and no raster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..record import SceneHeader
from .files import json_text, write_bytes
from .rows import OutputRow, lost_sentences, scene_place


def write_geojson(path: Path, header: SceneHeader, rows: Sequence[OutputRow]) -> None:
    """One feature a line. A window without a place on Earth is a feature whose geometry is null, as the RFC has it.

    The member `scene` holds the header; readers that do not know it ignore it.
    """
    lines = []
    for row in rows:
        values = row.values(header)
        feature = {"type": "Feature", "id": values.pop("id"), "geometry": row.place.geometry, "properties": values}
        if row.place.bbox is not None:
            feature["bbox"] = list(row.place.bbox)
        lines.append(json_text(feature))
    whole = scene_place(header)
    scene = header.to_dict() | {"lost": lost_sentences(header, [row.place for row in rows])}
    bbox = "" if whole.bbox is None else f'"bbox": {json_text(list(whole.bbox))},\n'
    features = ",\n".join(lines)
    text = f'{{"type": "FeatureCollection",\n{bbox}"scene": {json_text(scene)},\n"features": [\n{features}\n]}}\n'
    write_bytes(path, text.encode())
