"""Owns the way from a scene's file to the embeddings that an archive keeps: content hash, windows, encoding. Knows no archive's files."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..backends.base import Backend, Embeddings, StagedBackend
from ..config import RsvlmConfig
from ..contract import tap_names
from ..engine.checks import check_integer
from ..errors import ImageReadError, InputError
from ..imagery.acquired import acquired_of
from ..imagery.footprint import Transform, footprints
from ..imagery.plan import TilePlan, Window
from ..imagery.source import DEFAULT_MAX_PIXELS, Scene, open_scene, within_memory
from ..tasks.scene import PreparedScene, SceneSettings, prepare_scene
from .archive import F32, FeatureFormat, FeatureType, IndexedScene, ViewFeatures
from .segment import EncodedView, Rectangle

WINDOW_PX = (
    1024  # of a scene that is larger: about what the default budget of 512 visual tokens shows at half its native detail
)
_READ_BYTES = 1 << 20
# what GDAL reads beside a raster and what may change its pixels or place
_SIDECARS = (".aux.xml", ".msk")
_SIDECAR_SUFFIXES = (".tfw", ".wld", ".tifw", ".prj")


class Encoder(Protocol):
    """What encoding asks of a model; RSVLM has it."""

    @property
    def backend(self) -> Backend: ...
    @property
    def config(self) -> RsvlmConfig: ...


@dataclass(frozen=True)
class EncodeSettings:
    """How scenes are read and planned. A scene whose long side is above window_px is encoded in windows of at most that side.

    features: keep the vision encoder's taps of each view as numbers of this type; None keeps none.

    Raises:
        InputError: a window below 1 px. See `SceneSettings` for the rest.
    """

    scene: SceneSettings
    window_px: int = WINDOW_PX
    batch_size: int = 4
    features: FeatureType | None = None

    def __post_init__(self) -> None:
        for name in ("window_px", "batch_size"):
            check_integer(name, getattr(self, name))
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")

    @property
    def encoding(self) -> dict[str, Any]:
        """What decides an embedding, as JSON values; max_pixels and batch_size do not."""
        values = {name: value for name, value in asdict(self.scene).items() if name != "max_pixels"}
        bands = values["bands"]
        return values | {"bands": None if bands is None else list(bands), "window_px": self.window_px}

    def encoding_by(self, encoder: Encoder) -> dict[str, Any]:
        """`encoding`, and how this encoder's features are kept.

        Raises:
            InputError: features of a backend that cannot be taken apart, or of a model that writes no text.
        """
        if self.features is None:
            return self.encoding
        backend, config = encoder.backend, encoder.config
        if not isinstance(backend, StagedBackend):
            raise InputError(
                f'features cannot be kept of backend "{backend.name}", which encodes in one step; choose another one'
            )
        if config.language is None:
            raise InputError("features are kept for answers, and this checkpoint has no language model; leave --features out")
        levels = len(kept_taps(config))
        kept = FeatureFormat(self.features, levels, config.vision.hidden_size, backend.name, backend.precision)
        return self.encoding | {"features": asdict(kept)}


def kept_taps(config: RsvlmConfig) -> tuple[str, ...]:
    """The taps that a model reads to answer: experts read all levels, without them Y is of the scene's level alone."""
    return tap_names() if config.experts is not None else tap_names()[2:]


def content_hash(path: str | Path) -> str:
    """Hex sha256 of a file's bytes and of what lies beside it for GDAL.

    Raises:
        ImageReadError: it cannot be read.
    """
    path = Path(path)
    digest = hashlib.sha256()
    beside = [path.with_name(path.name + end) for end in _SIDECARS] + [path.with_suffix(end) for end in _SIDECAR_SUFFIXES]
    try:
        for part in (path, *(each for each in beside if each.is_file() and each != path)):
            digest.update(f"{part.suffix}\0{part.stat().st_size}\0".encode())
            with part.open("rb") as file:
                while block := file.read(_READ_BYTES):
                    digest.update(block)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageReadError(f"{path} cannot be read ({reason}); check the path and its permissions") from None
    return digest.hexdigest()


@dataclass
class OpenedScene:
    """A scene that is ready to be encoded. `record` says what an archive keeps of it; `views` encodes."""

    record: IndexedScene
    windows: list[Window]
    _scene: Scene
    _encoder: Encoder
    _settings: EncodeSettings

    def views(self) -> Iterator[EncodedView]:
        """Every window that holds anything valid, a batch at a time. One window that is the whole scene is read from the file itself.

        Raises:
            ImageReadError: it cannot be decoded.
        """
        prepared_windows = self._prepared()
        empty = True
        while batch := list(itertools.islice(prepared_windows, self._settings.batch_size)):
            for (window, prepared), (embeddings, taps) in zip(batch, self._encoded([each for _, each in batch]), strict=True):
                yield self._view(window, prepared, embeddings, taps)
            empty = False
        if empty:
            raise ImageReadError(f"{self.record.source} has no valid pixel in any window; check its nodata value and mask")

    def _encoded(self, batch: Sequence[PreparedScene]) -> Iterator[tuple[Embeddings, F32 | None]]:
        """Embeddings of each, and the taps that are kept."""
        backend, packed = self._encoder.backend, [each.packed for each in batch]
        if self._settings.features is None:
            for features in backend.encode(packed, [None] * len(packed)):
                yield backend.embed_image(features), None
            return
        assert isinstance(backend, StagedBackend)  # encoding_by refused another one
        for scene, taps in zip(packed, backend.encode_tiles(packed), strict=True):
            embeddings = backend.align(taps, scene)
            assert embeddings is not None  # an archive needs alignment
            yield embeddings, np.stack([taps[name] for name in kept_taps(self._encoder.config)])

    def _prepared(self) -> Iterator[tuple[Window, PreparedScene]]:
        config, settings = self._encoder.config, self._settings.scene
        if len(self.windows) == 1:
            yield self.windows[0], prepare_scene(self.record.source, config, settings)
            return
        for window in self.windows:
            with within_memory(self.record.source):
                rgb, mask = self._scene.read(window.row_off, window.col_off, window.height, window.width)
                share = float(mask.mean())
                if share == 0.0 or share < config.dris.min_valid_fraction:
                    continue
                picture = Image.fromarray(rgb)
                if share < 1.0:
                    picture.putalpha(Image.fromarray(mask.astype(np.uint8) * np.uint8(255)))
            plain = SceneSettings(**{**asdict(settings), "bands": None, "max_pixels": None})  # bands are chosen already
            yield window, prepare_scene(picture, config, plain)

    def _view(self, window: Window, prepared: PreparedScene, embeddings: Embeddings, taps: F32 | None) -> EncodedView:
        tiles = _tiles(prepared.plan, window)
        transform, crs = self.record.transform, self.record.crs
        places = [window, *(Window(*tile) for tile in tiles)]
        gsd = self.record.gsd_native_m
        return EncodedView(
            (window.row_off, window.col_off, window.height, window.width),
            tuple(tiles),
            tuple(each.bbox for each in footprints(places, transform, crs)) if crs else (None,) * len(places),
            None if gsd is None else gsd * prepared.plan.scale,
            embeddings.object,
            embeddings.region,
            embeddings.scene,
            None if taps is None else ViewFeatures(taps, prepared.plan.to_dict(), prepared.warnings),
        )


@contextmanager
def opened(
    path: str | Path, content: str, encoder: Encoder, settings: EncodeSettings, acquired: datetime | None = None
) -> Iterator[OpenedScene]:
    """A scene file, opened for encoding. acquired: when it was taken; None asks the file's tags.

    Raises:
        ImageReadError: it cannot be read. InputError: bands that do not fit.
    """
    source = str(Path(path).absolute())
    limit = settings.scene.max_pixels or DEFAULT_MAX_PIXELS
    with open_scene(Path(path), bands=settings.scene.bands, max_pixels=limit) as scene:
        windows = grid(scene.height, scene.width, settings.window_px)
        acquired = acquired or acquired_of(path)
        record = IndexedScene(
            source=source,
            content_hash=content,
            height=scene.height,
            width=scene.width,
            crs=scene.crs,
            transform=_six(scene.transform),
            gsd_native_m=scene.gsd_native_m,
            acquired=None if acquired is None else acquired.isoformat(),
            num_views=0,
        )
        yield OpenedScene(record, windows, scene, encoder, settings)


def grid(height: int, width: int, window_px: int) -> list[Window]:
    """The fewest equal windows of at most `window_px` a side that cover a scene once, in raster order."""
    rows = _cuts(height, window_px)
    cols = _cuts(width, window_px)
    return [
        Window(top, left, bottom - top, right - left)
        for top, bottom in itertools.pairwise(rows)
        for left, right in itertools.pairwise(cols)
    ]


def _cuts(length: int, window_px: int) -> list[int]:
    parts = -(-length // window_px)
    return [length * index // parts for index in range(parts + 1)]


def _tiles(plan: TilePlan, window: Window) -> list[Rectangle]:
    """What each tile shows, in pixels of the whole scene, at least one pixel a side."""
    tiles = []
    for cx, cy, w, h in plan.boxes.astype(np.float64):
        top, bottom = (window.row_off + round((cy + sign * h / 2) * window.height) for sign in (-1, 1))
        left, right = (window.col_off + round((cx + sign * w / 2) * window.width) for sign in (-1, 1))
        tiles.append((top, left, max(1, bottom - top), max(1, right - left)))
    return tiles


def _six(transform: Sequence[float] | None) -> Transform | None:
    if transform is None:
        return None
    a, b, c, d, e, f = (float(value) for value in transform)
    return a, b, c, d, e, f
