"""Owns the page: one HTML file with the scene, its windows, a table and links, which needs no network. Knows no georeference."""

from __future__ import annotations

import base64
import io
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import MissingDependencyError
from ..record import SceneHeader
from .colours import CITED, RAMP, css
from .files import json_text, write_bytes
from .legend import facts, heading, make_legend
from .quicklook import GAP, Overview, round_distance
from .rows import OutputRow, lost_sentences

TEMPLATES = Path(__file__).resolve().parent / "templates"
JPEG_QUALITY = 88
NAMES = {
    "geojson": "GeoJSON",
    "geoparquet": "GeoParquet",
    "stac": "STAC item",
    "relevance": "Relevance map (COG)",
    "quicklook": "Quick-look (PNG)",
}


def write_page(
    path: Path, header: SceneHeader, rows: Sequence[OutputRow], overview: Overview, files: Mapping[str, Path]
) -> None:
    """files: format -> file beside the page, which it links to.

    Raises:
        MissingDependencyError: Jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise MissingDependencyError(
            "the page needs Jinja2, which is not installed; pip install 'rsvlm-infer[report]'"
        ) from None
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    legend = make_legend(header, rows)
    text = environment.get_template("page.html.j2").render(
        heading=heading(header),
        name=_plain(header.source.replace("\\", "/").rpartition("/")[2]),
        source=_plain(header.source),
        facts=facts(header, rows),
        header=header,
        lost=lost_sentences(header, [row.place for row in rows]),
        links=[(NAMES[name], urllib.parse.quote(file.name)) for name, file in files.items()],
        picture=_picture(overview),
        classes=[(label, css(colour), f"{share:.1%}") for label, colour, share in legend.classes],
        score_range=legend.score_range,
        ramp=", ".join(css(colour) for colour in RAMP),
        cited=css(CITED) if legend.cited else None,
        # "<" would end the script that holds the data
        data=json_text(_data(header, rows)).replace("<", "\\u003c"),
    )
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def _data(header: SceneHeader, rows: Sequence[OutputRow]) -> dict[str, Any]:
    """What the page's script draws. A row: id, role, text, label, score, row, column, height, width, lon, lat, colour, opacity."""
    legend = make_legend(header, rows)
    entries = []
    for row in rows:
        values = row.values(header)
        west, south, east, north = row.place.bbox or (None, None, None, None)
        lon = lat = None
        if west is not None and east is not None and south is not None and north is not None:
            middle = (west + east + (360 if west > east else 0)) / 2
            lon, lat = round((middle + 180) % 360 - 180, 5), round((south + north) / 2, 5)
        columns = [values[name] for name in ("id", "role", "text", "label", "score", "row_off", "col_off", "height", "width")]
        entries.append([*columns, lon, lat, css(legend.colour(row)), round(legend.opacity(row), 3)])
    metres = header.gsd_native_m
    return {
        "width": header.width,
        "height": header.height,
        "mode": header.mode,
        "rows": entries,
        "metresPerPixel": metres,
        "roundMetres": None if metres is None else [round_distance(10.0**power) for power in range(-2, 7)],
    }


def _picture(overview: Overview) -> str:
    """The overview as a data address."""
    buffer = io.BytesIO()
    shown = np.where(overview.mask[..., None], overview.rgb, np.uint8(GAP[0])).astype(np.uint8)
    Image.fromarray(shown).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _plain(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
