"""Owns the relevance map of a scene in mode find: scores as a cloud-optimized GeoTIFF. Knows no model and no picture."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError, MissingDependencyError
from ..record import SceneHeader, WindowRecord
from .files import SCORE_DECIMALS, number, replacing

LONG_SIDE_PX = 2048  # of the map; finer than any grid of windows that a person looks at
BLOCK_PX = 256
OVERVIEW_FROM_PX = 512  # a map no larger than this is read whole anyway


def score_map(header: SceneHeader, records: Sequence[WindowRecord], long_side_px: int = LONG_SIDE_PX) -> NDArray[np.float32]:
    """float32 [h, w] over the whole scene: the score of the record that answers for each place, NaN where none does."""
    scale = min(1.0, long_side_px / max(header.height, header.width))
    rows, cols = max(1, round(header.height * scale)), max(1, round(header.width * scale))
    values = np.full((rows, cols), np.nan, dtype=np.float32)
    for record in records:
        score, core = number(record.score), record.place.core
        if score is None:
            continue
        top, left = math.floor(core.row_off * rows / header.height), math.floor(core.col_off * cols / header.width)
        bottom = math.floor((core.row_off + core.height) * rows / header.height)
        right = math.floor((core.col_off + core.width) * cols / header.width)
        # a core below one pixel of the map still shows
        values[top : max(bottom, top + 1), left : max(right, left + 1)] = score
    return values


def write_relevance(path: Path, header: SceneHeader, records: Sequence[WindowRecord]) -> None:
    """A COG of `score_map` in the scene's own crs, nodata NaN.

    Raises:
        InputError: the header's mode is not find. MissingDependencyError: rasterio is not installed.
    """
    if header.mode != "find":
        raise InputError(f'format "relevance" needs mode "find", got a scene in mode "{header.mode}"; leave the format out')
    try:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning
        from rasterio.io import MemoryFile
        from rasterio.shutil import copy
    except ImportError:
        raise MissingDependencyError(
            "the relevance map needs rasterio, which is not installed; pip install 'rsvlm-infer[geo]'"
        ) from None
    values = score_map(header, records)
    rows, cols = values.shape
    georeference = {}
    if header.transform is not None:
        scale = rasterio.Affine.scale(header.width / cols, header.height / rows)
        georeference["transform"] = rasterio.Affine(*header.transform) @ scale
    if header.crs is not None:
        georeference["crs"] = header.crs
    with (
        replacing(path) as scratch,
        rasterio.Env(GDAL_PAM_ENABLED="NO", GDAL_NUM_THREADS="1"),
        warnings.catch_warnings(),
        MemoryFile() as memory,
    ):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # the header's own `lost` says so
        with memory.open(
            driver="GTiff", height=rows, width=cols, count=1, dtype="float32", nodata=float("nan"), **georeference
        ) as plain:
            plain.write(values, 1)
            plain.set_band_description(1, "relevance")
            plain.update_tags(query=header.query, model_hash=header.model_hash, decimals=str(SCORE_DECIMALS))
        with memory.open() as plain:
            copy(
                plain,
                scratch,
                driver="COG",
                compress="DEFLATE",
                predictor="YES",
                blocksize=BLOCK_PX,
                overview_resampling="AVERAGE",
                overviews="AUTO" if max(rows, cols) > OVERVIEW_FROM_PX else "NONE",
            )
