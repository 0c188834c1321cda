"""Files that maps open, from one scene's records: GeoJSON, GeoParquet, STAC, a relevance map, a quick-look, a page."""

from __future__ import annotations

from .quicklook import Overview
from .write import FORMATS, file_name, write_outputs

__all__ = ["FORMATS", "Overview", "file_name", "write_outputs"]
