"""Owns the STAC item of a scene's results: its place and time, what it derives from, how and by which model. Knows no file's inside."""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ... import __version__
from ...errors import InputError, MissingDependencyError
from ..record import SceneHeader, WindowRecord
from .files import json_text, number, write_bytes
from .geoparquet import projjson
from .rows import scene_place

STAC_VERSION = "1.1.0"
EXTENSIONS = {
    "mlm": "https://stac-extensions.github.io/mlm/v1.4.0/schema.json",
    "processing": "https://stac-extensions.github.io/processing/v1.1.0/schema.json",
    "projection": "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
}
MEDIA_TYPES = {
    "geojson": "application/geo+json",
    "geoparquet": "application/vnd.apache.parquet",
    "relevance": "image/tiff; application=geotiff; profile=cloud-optimized",
    "quicklook": "image/png",
    "html": "text/html",
}
ROLES = {
    "geojson": ["data"],
    "geoparquet": ["data"],
    "relevance": ["data"],
    "quicklook": ["overview"],
    "html": ["metadata"],
}
TASKS = {"describe": "image-captioning", "ask": "generative", "classify": "scene-classification", "find": "similarity-search"}

# STAC demands an interval where the time is unknown. This one holds every picture of the Earth from above: the first aerial
# photograph is of 1858, and the end must not depend on the day on which the item is written.
UNKNOWN_TIME = ("1858-01-01T00:00:00Z", "9999-12-31T23:59:59Z")
_ADDRESS = re.compile(r"^(?:[A-Za-z][A-Za-z0-9+.\-]+:/|/vsi)")


def write_stac(
    path: Path,
    header: SceneHeader,
    records: Sequence[WindowRecord],
    files: Mapping[str, Path],
    acquired: str | None = None,
    model_href: str | None = None,
) -> None:
    """files: format -> file that lies in the item's folder. acquired: ISO 8601, UTC unless it says otherwise; None: unknown.

    model_href: where the model can be had; None names it by its hash alone, as urn:sha256.

    Raises:
        InputError: `acquired` is no time.
    """
    place = scene_place(header)
    task = TASKS[header.mode]
    labels = sorted({label for record in records for label in record.scores})
    properties: dict[str, Any] = {
        **_times(acquired),
        "title": f"{header.mode} {header.query}".strip(),
        "processing:software": {"rsvlm-infer": __version__},
        "processing:lineage": (
            f"RSVLM in mode {header.mode} on {len(records)} windows; {header.empty_px} empty and {header.uniform_px} uniform "
            "pixels were skipped"
        ),
        "mlm:name": "RSVLM",
        "mlm:architecture": "RSVLM",
        "mlm:tasks": [task],
        "mlm:input": [
            {
                "name": "tiles",
                "bands": [],
                "input": {"shape": [-1, 3, -1, -1], "dim_order": ["batch", "channel", "height", "width"], "data_type": "uint8"},
            }
        ],
        "mlm:output": [{"name": "records", "tasks": [task], "result": _result(header, labels)}],
        "mlm:hyperparameters": {
            "mode": header.mode,
            "query": header.query,
            "prompt_hash": header.prompt_hash,
            "config_hash": header.config_hash,
            **({"labels": labels} if labels else {}),
        },
        "proj:shape": [header.height, header.width],
        **_projection(header),
    }
    if header.gsd_native_m is not None:
        properties["gsd"] = number(header.gsd_native_m)
    if header.lost:
        properties["description"] = " ".join(f"{words}." for words in header.lost)
    assets: dict[str, Any] = {
        name: {"href": f"./{_href(file.name)}", "type": MEDIA_TYPES[name], "roles": ROLES[name]}
        for name, file in sorted(files.items())
    }
    assets["model"] = {
        "href": model_href or f"urn:sha256:{header.model_hash}",
        "title": f"checkpoint with sha256 {header.model_hash}",
        "roles": ["mlm:model"],
        "mlm:artifact_type": "safetensors",
    }
    item: dict[str, Any] = {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": [EXTENSIONS[name] for name in sorted(EXTENSIONS)],
        "id": f"{path.name.removesuffix('.json').removesuffix('.stac')}-{header.mode}-{header.config_hash[:12]}",
        "geometry": place.geometry,
        "properties": properties,
        "links": [{"rel": "derived_from", "href": _source_href(header.source, path.parent), "title": "the scene"}],
        "assets": assets,
    }
    if place.bbox is not None:
        item["bbox"] = list(place.bbox)
    write_bytes(path, (json_text(item, indent=1) + "\n").encode())


def _result(header: SceneHeader, labels: Sequence[str]) -> dict[str, Any]:
    if header.mode == "classify":
        return {"shape": [-1, len(labels) or -1], "dim_order": ["batch", "class"], "data_type": "float32"}
    if header.mode == "find":
        return {"shape": [-1], "dim_order": ["batch"], "data_type": "float32"}
    return {"shape": [-1, -1], "dim_order": ["batch", "token"], "data_type": "other"}


def _times(acquired: str | None) -> dict[str, Any]:
    if acquired is None:
        return {"datetime": None, "start_datetime": UNKNOWN_TIME[0], "end_datetime": UNKNOWN_TIME[1]}
    try:
        time = datetime.fromisoformat(acquired)
    except ValueError:
        raise InputError(
            f"acquired must be an ISO 8601 time, got {acquired!r}; write for example 2024-05-31T10:20:00Z"
        ) from None
    time = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    return {"datetime": time.isoformat().replace("+00:00", "Z")}


def _projection(header: SceneHeader) -> dict[str, Any]:
    """proj:code where the crs has one, else its PROJJSON; both null without one, as the extension has it."""
    values: dict[str, Any] = {"proj:code": None}
    if header.transform is not None:
        values["proj:transform"] = list(header.transform)
    if header.crs is None:
        return values
    try:
        from rasterio.crs import CRS
    except ImportError:
        raise MissingDependencyError(
            "the STAC item of a scene with a coordinate reference system needs rasterio, which is not installed; "
            "pip install 'rsvlm-infer[geo]'"
        ) from None
    authority = CRS.from_user_input(header.crs).to_authority()
    if authority is not None:
        values["proj:code"] = ":".join(authority)
    else:
        values["proj:projjson"] = projjson(header.crs)
    return values


def _source_href(source: str, folder: Path) -> str:
    """An address as it is; a file relative to the item, so that both can move together."""
    if _ADDRESS.match(source):
        return source
    return _href(os.path.relpath(source, folder).replace(os.sep, "/"))


def _href(path: str) -> str:
    return urllib.parse.quote(os.fsencode(path), safe="/:@!$&'()*+,;=~")
