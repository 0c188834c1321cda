"""GeoTIFFs of coloured ground, and a model that names the colour it sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsvlm_infer.pipeline import RSVLM
from tests.tasks.telling_model import COLOURS, TellingBackend, load_tokenizer

SIDE = 56  # of one field of colour


def fields(colours: list[list[str]], seed: int = 0) -> np.ndarray:
    """uint8 [3, h, w]: squares of SIDE pixels with a little texture, so that none is uniform. "none" is 0 in every band."""
    rng = np.random.default_rng(seed)
    rows = []
    for line in colours:
        cells = []
        for colour in line:
            cell = np.zeros((SIDE, SIDE, 3), np.int64)
            if colour != "none":
                cell += np.array(COLOURS[colour]) + rng.integers(-8, 9, (SIDE, SIDE, 3))
                cell = np.maximum(cell, 1)
            cells.append(cell)
        rows.append(np.concatenate(cells, axis=1))
    return np.concatenate(rows).astype(np.uint8).transpose(2, 0, 1)


def write_scene(path: Path, values: np.ndarray, **profile: Any) -> Path:
    """values: [C, H, W]."""
    rasterio = pytest.importorskip("rasterio")
    place = {"crs": "EPSG:32631", "transform": rasterio.transform.Affine(2, 0, 500_000, 0, -2, 5_000_000)}
    shape = {"count": len(values), "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype}
    with rasterio.open(path, "w", driver="GTiff", **shape, **(place | profile)) as file:
        file.write(values)
    return path


def telling_model(folder: Path) -> RSVLM:
    return RSVLM(TellingBackend(), load_tokenizer(folder / "tokenizer"))
