"""Owns when a raster was taken, as far as its tags say. Knows no pixels and no file names: a date in a name is a guess."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import InputError

# in order: what GDAL reads from a sensor's own files, then common product tags, then TIFF's tag, which may be of processing
_TAGS = (
    ("IMAGERY", "ACQUISITIONDATETIME"),
    (None, "ACQUISITIONDATETIME"),
    (None, "SENSING_TIME"),
    (None, "DATETIME_ORIGINAL"),
    (None, "EXIF_DateTimeOriginal"),
    (None, "TIFFTAG_DATETIME"),
)
_TIFF = re.compile(r"^(\d{4})[:/](\d\d)[:/](\d\d)(.*)$")  # TIFF and EXIF write dates with colons


def parse_time(text: str, name: str) -> datetime:
    """ISO 8601 -> a time in UTC; without a zone it is UTC, without a time of day it is midnight.

    Raises:
        InputError: `text` is no time; `name` is the argument that holds it.
    """
    try:
        return _utc(text.strip())
    except (ValueError, OverflowError):
        raise InputError(f"{name} must be an ISO 8601 date or time, got {text!r}; write for example 2024-05-31") from None


def acquired_time(dataset: Any) -> datetime | None:
    """The acquisition time of an open rasterio dataset in UTC, None when no tag that is a time says it."""
    for domain, name in _TAGS:
        tags: Mapping[str, str] = dataset.tags(ns=domain) if domain else dataset.tags()
        text = tags.get(name, "").strip()
        if not text:
            continue
        try:
            return _utc(_TIFF.sub(r"\1-\2-\3\4", text))
        except (ValueError, OverflowError):
            continue
    return None


def acquired_of(path: str | Path) -> datetime | None:
    """`acquired_time` of a GeoTIFF or JPEG 2000 file; None for other files, and for any that cannot be opened."""
    try:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning, RasterioError
    except ImportError:
        return None  # the file is read by other means, and then has no tags
    for driver in ("GTiff", "JP2OpenJPEG"):  # no other: a VRT could point at other files and at the network
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                with rasterio.open(path, driver=driver) as dataset:
                    return acquired_time(dataset)
        except RasterioError:
            continue
    return None


def _utc(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
