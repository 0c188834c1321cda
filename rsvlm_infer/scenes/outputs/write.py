"""Owns which files a scene gets and under which names. Knows the formats' modules, no format's inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import InputError, MissingDependencyError
from ...hardware import library_version
from ...imagery.source import open_scene
from ..record import SceneHeader, WindowRecord
from .geojson import write_geojson
from .geoparquet import write_geoparquet
from .page import write_page
from .quicklook import Overview, write_quicklook
from .relevance import write_relevance
from .rows import output_rows
from .stac import write_stac

# in the order in which they are written: the page links to what is there, the item lists it
SUFFIXES = {
    "geojson": ".geojson",
    "geoparquet": ".parquet",
    "relevance": ".relevance.tif",
    "quicklook": ".png",
    "html": ".html",
    "stac": ".stac.json",
}
FORMATS = tuple(SUFFIXES)
# format -> the library without which none of it is written, and the extra that brings it. A crs needs rasterio too, but a scene that has
# one was opened by it.
NEEDS = {
    "geoparquet": ("pyarrow", "geo"),
    "relevance": ("rasterio", "geo"),
    "quicklook": ("matplotlib", "report"),
    "html": ("jinja2", "report"),
}

ReadOverview = Callable[[SceneHeader], Overview]


def file_name(name: str, output_format: str) -> str:
    """The file of a format."""
    return f"{name}{SUFFIXES[output_format]}"


def check_formats(formats: Sequence[str], mode: str | None = None) -> tuple[str, ...]:
    """Formats in the order in which they are written, each once.

    Raises:
        InputError: an unknown format, or a relevance map of another mode than find.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if isinstance(formats, str) or unknown:
        raise InputError(f"formats must be a list of {list(FORMATS)}, got {formats!r}; choose among them")
    if "relevance" in formats and mode not in (None, "find"):
        raise InputError(f'format "relevance" needs mode "find", got "{mode}"; leave the format out')
    return tuple(name for name in FORMATS if name in formats)


def require_libraries(formats: Sequence[str]) -> None:
    """Whether all formats can be written here, told before work is spent on their contents. Libraries are looked up, not loaded.

    Raises:
        MissingDependencyError: names every library that is not installed, the formats that need it, and what to install.
    """
    missing = [name for name in formats if name in NEEDS and library_version(NEEDS[name][0]) is None]
    if missing:
        libraries, extras = (list(dict.fromkeys(NEEDS[name][part] for name in missing)) for part in (0, 1))
        raise MissingDependencyError(
            f"formats {missing} need {', '.join(libraries)}, not installed here; pip install 'rsvlm-infer[{','.join(extras)}]', or "
            "leave these formats out"
        )


def read_overview(header: SceneHeader) -> Overview:
    """The overview of a header's source, opened with the defaults of `open_scene`."""
    with open_scene(header.source) as scene:
        return Overview(*scene.overview())


def write_outputs(
    header: SceneHeader,
    records: Sequence[WindowRecord],
    folder: Path,
    formats: Sequence[str],
    *,
    name: str | None = None,
    read_overview: ReadOverview = read_overview,
    acquired: str | None = None,
    model_href: str | None = None,
) -> list[Path]:
    """Writes a scene's records in some of FORMATS and gives the files. Equal arguments give equal bytes.

    Each file appears under its name when it is whole. name: what the files are called, without suffix; default the source's stem.
    read_overview: gives the picture for quick-look and page; called only when one of them is asked for. acquired, model_href: for
    the STAC item, see `write_stac`; without `acquired` it is the header's.

    Raises:
        InputError: a format that does not exist or does not fit the mode, records of windows outside the scene, or a file that
            cannot be written.
        MissingDependencyError: a format needs a package that is not installed.
        ImageReadError: the source cannot be read for its picture.
    """
    chosen = check_formats(formats, header.mode)
    require_libraries(chosen)
    check_records(header, records)
    name = name or Path(header.source).stem or "scene"
    rows = output_rows(header, records)
    overview = read_overview(header) if {"quicklook", "html"} & set(chosen) else None
    files = {output_format: folder / file_name(name, output_format) for output_format in chosen}
    for output_format, path in files.items():
        if output_format == "geojson":
            write_geojson(path, header, rows)
        elif output_format == "geoparquet":
            write_geoparquet(path, header, rows)
        elif output_format == "relevance":
            write_relevance(path, header, records)
        elif output_format == "stac":
            described = {other: file for other, file in files.items() if other != "stac"}
            write_stac(path, header, records, described, acquired or header.acquired, model_href)
        else:
            assert overview is not None
            if output_format == "quicklook":
                write_quicklook(path, header, rows, overview)
            else:
                write_page(path, header, rows, overview, {other: file for other, file in files.items() if other != "html"})
    return list(files.values())


def check_records(header: SceneHeader, records: Sequence[WindowRecord]) -> None:
    """Raises InputError for windows outside the scene and for two records of one window."""
    seen: set[int] = set()
    for record in records:
        if record.place.index in seen:
            raise InputError(f"records must be of different windows, got window {record.place.index} twice; drop one")
        seen.add(record.place.index)
        for window in (record.place.core, *record.cited):
            inside = min(window.row_off, window.col_off) >= 0 and min(window.height, window.width) >= 1
            if not inside or window.row_off + window.height > header.height or window.col_off + window.width > header.width:
                raise InputError(
                    f"records must lie inside the scene of {header.height} x {header.width} px, window {record.place.index} has "
                    f"{window}; pass the records of this scene"
                )
