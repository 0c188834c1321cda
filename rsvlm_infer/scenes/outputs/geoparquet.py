"""Owns the GeoParquet of a scene (version 1.1): WKB in the scene's own crs, its PROJJSON, a bbox column. Knows no model and no raster."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import MissingDependencyError
from ...imagery.footprint import Ring
from ..record import SceneHeader
from .files import json_text, replacing
from .rows import OutputRow, lost_sentences

VERSION = "1.1.0"
_LITTLE_ENDIAN, _POLYGON = 1, 3  # of WKB
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def write_geoparquet(path: Path, header: SceneHeader, rows: Sequence[OutputRow]) -> None:
    """Columns as in GeoJSON, `geometry` and `bbox`; the file's metadata hold `geo` and the header as `rsvlm:scene`.

    Without a crs the `geo` metadata say that it is unknown (null), and coordinates are those of the transform, or (column, -row).

    Raises:
        MissingDependencyError: pyarrow, or for the crs rasterio, is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingDependencyError(
            "GeoParquet needs pyarrow, which is not installed; pip install 'rsvlm-infer[geo]'"
        ) from None
    types: dict[str, Any] = {
        "id": pa.string(),
        "role": pa.string(),
        "record": pa.int32(),
        "text": pa.string(),
        "label": pa.string(),
        "score": pa.float64(),
        "scores": pa.map_(pa.string(), pa.float64()),
        **dict.fromkeys(("row_off", "col_off", "height", "width"), pa.int32()),
        "window": pa.list_(pa.int32(), 4),
        **dict.fromkeys(("gsd_native_m", "gsd_effective_m", "valid_share"), pa.float64()),
        **dict.fromkeys(("num_visual_tokens", "num_prompt_tokens", "num_new_tokens"), pa.int32()),
        "finish_reason": pa.string(),
        "warnings": pa.list_(pa.string()),
        **dict.fromkeys(("source", "mode", "query", "model_hash", "prompt_hash"), pa.string()),
    }
    values = [row.values(header) for row in rows]
    for each in values:
        each["scores"] = sorted(each["scores"].items())
        each["source"] = json_text(each["source"])[1:-1]
    boxes = [_box(row.place.native) for row in rows]
    corners = pa.struct([(corner, pa.float64()) for corner in _CORNERS])
    columns = [pa.array([each[name] for each in values], type=kind) for name, kind in types.items()]
    columns.append(pa.array([dict(zip(_CORNERS, box, strict=True)) for box in boxes], type=corners))
    columns.append(pa.array([_wkb(row.place.native) for row in rows], type=pa.binary()))
    names = [*types, "bbox", "geometry"]
    geometry = {
        "encoding": "WKB",
        "geometry_types": ["Polygon"] if rows else [],
        "crs": None if header.crs is None else projjson(header.crs),
        "orientation": "counterclockwise",
        "edges": "planar",
        "covering": {"bbox": {corner: ["bbox", corner] for corner in _CORNERS}},
    }
    if boxes:
        lows, highs = zip(*((box[:2], box[2:]) for box in boxes), strict=True)
        geometry["bbox"] = [*(min(each) for each in zip(*lows, strict=True)), *(max(each) for each in zip(*highs, strict=True))]
    scene = header.to_dict() | {"lost": lost_sentences(header, [row.place for row in rows])}
    metadata = {
        "geo": json_text({"version": VERSION, "primary_column": "geometry", "columns": {"geometry": geometry}}),
        "rsvlm:scene": json_text(scene),
    }
    table = pa.table(dict(zip(names, columns, strict=True))).replace_schema_metadata(metadata)
    with replacing(path) as scratch:
        parquet.write_table(table, scratch, compression="zstd", write_statistics=True)


def projjson(crs: str) -> dict[str, Any]:
    """A crs as PROJJSON.

    Raises:
        MissingDependencyError: rasterio is not installed.
    """
    try:
        from rasterio.crs import CRS
    except ImportError:
        raise MissingDependencyError(
            "PROJJSON of a coordinate reference system needs rasterio, which is not installed; pip install 'rsvlm-infer[geo]'"
        ) from None
    values: dict[str, Any] = CRS.from_user_input(crs).to_dict(projjson=True)
    return values


def _wkb(ring: Ring) -> bytes:
    flat = [coordinate for point in ring for coordinate in point]
    return struct.pack(f"<BIII{len(flat)}d", _LITTLE_ENDIAN, _POLYGON, 1, len(ring), *flat)


def _box(ring: Ring) -> tuple[float, float, float, float]:
    xs, ys = zip(*ring, strict=True)
    return min(xs), min(ys), max(xs), max(ys)
