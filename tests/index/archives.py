"""Archives of chosen or random embeddings for the index tests."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rsvlm_infer.index.archive import F32, Archive, IndexedScene, ViewFeatures
from rsvlm_infer.index.segment import EncodedView
from rsvlm_infer.index.writer import ArchiveWriter

EMBEDDER, WIDTH = "e" * 64, 16
ENCODING: dict[str, Any] = {"tiling": None, "window_px": 1024}
FEATURES = {"dtype": "float32", "levels": 3, "width": 8, "backend": "fake", "precision": "float32"}


def unit(generator: np.random.Generator, *shape: int) -> F32:
    vectors = generator.standard_normal(shape).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), dtype=np.float32)


def scene(name: str, content: str | None = None, **changes: Any) -> IndexedScene:
    values: dict[str, Any] = {
        "source": f"/{name}",
        "content_hash": hashlib.sha256((content or name).encode()).hexdigest(),
        "height": 100,
        "width": 200,
        "crs": None,
        "transform": None,
        "gsd_native_m": None,
        "acquired": None,
        "num_views": 0,
    }
    return IndexedScene(**(values | changes))


def view(generator: np.random.Generator, tiles: int = 3, objects: int = 2, bboxes: Any = None, patches: int = 0) -> EncodedView:
    """With features when it has patches."""
    return EncodedView(
        window=(0, 0, 100, 200),
        tiles=tuple((10 * tile, 5 * tile, 10 + tile, 20 + tile) for tile in range(tiles)),
        bboxes=tuple(bboxes) if bboxes else (None,) * (tiles + 1),
        gsd_effective_m=None,
        object=unit(generator, tiles, objects, WIDTH),
        region=unit(generator, tiles, WIDTH),
        scene=unit(generator, WIDTH),
        features=ViewFeatures(unit(generator, 3, patches, 8), {"tiles": tiles}, ("a warning",)) if patches else None,
    )


def writer(folder: Path, **changes: Any) -> ArchiveWriter:
    values: dict[str, Any] = {"embedder": EMBEDDER, "embed_size": WIDTH, "encoding": ENCODING}
    return ArchiveWriter(folder, **(values | changes))


def filled(folder: Path, scenes: Sequence[tuple[IndexedScene, Sequence[EncodedView]]], per_segment: int = 1000) -> Archive:
    """An archive of these scenes, with a new segment after every `per_segment` of them."""
    with writer(folder) as open_writer:
        for index, (each, views) in enumerate(scenes):
            if index and index % per_segment == 0:
                open_writer.close_segment()
            open_writer.add(each, views)
    return Archive.open(folder)
