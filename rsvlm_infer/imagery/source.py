"""Owns what a scene is and how plain images and arrays become one. Knows no raster format (geo.py), plan or model.

Nothing here touches the network: an address is refused before anything opens it.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import ImageReadError, InputError, MissingDependencyError
from .access import Access, allowance, driver_of, find_source
from .coarse import Coarse, grey_of, overview_of
from .plain import decode_plain, open_plain
from .radiometry import Stretch, area_average, fit_stretch, to_rgb

DEFAULT_MAX_PIXELS = 1 << 27  # 134 Mpx: about 1 GiB while a plain RGB image is decoded
DEFAULT_MAX_RAM = 768 << 20  # bytes for reading one raster: GDAL's block cache, the coarse copy, windows that wait
COARSE_FROM_PX = 1 << 25  # native pixels from which a raster without overviews is read once into a coarse copy
OVERVIEW_PX = 1024
_STRIP_PX = 1 << 23  # native pixels that one read holds at once

Edge = float | tuple[float, ...]  # one value, or one for each shown band
StretchChoice = Literal["auto", "percentile", "none"] | tuple[Edge, Edge]

_log = logging.getLogger(__name__)


class Scene(ABC):
    """One image of the ground, read by windows. Use it as a context manager, or call `close`.

    Attributes:
        name: what messages call it.
        height, width: pixels of the whole scene.
        count: bands in the source.
        dtype: numpy name of the band values.
        num_shown: bands that are shown, 1 or 3.
        gsd_native_m: ground metres per pixel, None when the source does not say.
        crs: coordinate reference system as text, or None. crs_wkt: the same as WKT2.
        transform: affine (a, b, c, d, e, f) from (column, row) to crs coordinates, or None.
        bounds: (left, bottom, right, top) in crs units, or None.
        lost: sentences about what the georeference does not say.
        acquired: when it was taken as far as its tags say, ISO 8601 in UTC, or None.
        in_memory: a native read costs no decoding.
        all_valid: known without reading: there is no mask, no nodata and no NaN.
    """

    name: str
    height: int
    width: int
    count: int
    dtype: str
    num_shown: int = 3
    gsd_native_m: float | None = None
    crs: str | None = None
    crs_wkt: str | None = None
    lost: tuple[str, ...] = ("there is no georeference: places are in pixels only",)
    acquired: str | None = None
    transform: tuple[float, float, float, float, float, float] | None = None
    bounds: tuple[float, float, float, float] | None = None
    in_memory: bool = False
    all_valid: bool = False
    _stretch_choice: StretchChoice = "auto"
    _display_ready: bool = False  # "auto" shows the values as they are

    @abstractmethod
    def _read_raw(
        self, row_off: float, col_off: float, height: float, width: float, out_height: int, out_width: int
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Band values [oh, ow, 1 or 3] and their validity of the same shape; area means where the output is smaller."""

    @cached_property
    def stretch(self) -> Stretch | None:
        """The scene's one stretch; None when uint8 values are shown as they are."""
        choice = self._stretch_choice
        if choice == "none" or (choice == "auto" and self._display_ready):
            return None
        if isinstance(choice, tuple):
            low, high = (edge if isinstance(edge, tuple) else (edge,) * self.num_shown for edge in choice)
            return Stretch(low, high)
        return self._survey.fitted

    @property
    def stretch_from_scene(self) -> bool:
        """Whether the stretch comes from the scene's own values, so that a crop of it would look different."""
        return not isinstance(self._stretch_choice, tuple) and self.stretch is not None

    def twin(self) -> Scene:
        """The same scene with the same stretch for another thread, which closes it; a file gets a handle of its own."""
        return self

    def gsd_at(self, row: float, col: float) -> float | None:
        """Ground metres per pixel at a place; `gsd_native_m` is that of the centre."""
        return self.gsd_native_m

    @cached_property
    def _survey(self) -> _Survey:
        """The one pass over a scene that decides how all of it is shown."""
        shape = self._overview_shape(OVERVIEW_PX)
        if not self._costly:
            values, valid = self._read_strips(0, 0, self.height, self.width, *shape, raw=True)
            return _Survey(values, valid, fit_stretch(values, valid))
        copy = self._read_coarse()
        values, valid = overview_of(copy, *shape)
        fitted = fit_stretch(values, valid)
        own = self._stretch_choice
        stretch = fitted if own == "percentile" or (own == "auto" and not self._display_ready) else self.stretch
        return _Survey(values, valid, fitted, (grey_of(copy, stretch), copy.factor))  # grey levels are enough from now on

    @property
    def _costly(self) -> bool:
        """Whether reading the whole scene again would decode all of it again."""
        return False

    def _read_coarse(self) -> Coarse:
        """The whole of a costly scene, once."""
        raise NotImplementedError

    @property
    def coarse(self) -> tuple[NDArray[np.uint8], int] | None:
        """(rgb uint8 [h, w, 3], native pixels per cell and side) of a large raster without overviews; None of others.

        The last row and column of cells may hold fewer native pixels.
        """
        return self._survey.coarse if self._costly else None

    def overview(self, max_side_px: int = OVERVIEW_PX) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """The whole scene with its long side at most `max_side_px`: (rgb uint8 [h, w, 3], mask bool [h, w])."""
        if max_side_px < 1:
            raise InputError(f"max_side_px must be at least 1, got {max_side_px}; {OVERVIEW_PX} is usual")
        if max_side_px == OVERVIEW_PX:
            return _shown(self._survey.values, self._survey.valid, self.stretch)
        return self.read(0, 0, self.height, self.width, *self._overview_shape(max_side_px))

    def read(
        self,
        row_off: int,
        col_off: int,
        height: int,
        width: int,
        out_height: int | None = None,
        out_width: int | None = None,
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """One window, native or reduced by area means.

        Args:
            row_off, col_off, height, width: window in scene pixels, inside the scene.
            out_height, out_width: shape to return, at most the window's; default native.

        Returns:
            rgb uint8 [out_height, out_width, 3] and mask bool [out_height, out_width], True where a pixel is valid.

        Raises:
            InputError: the window is not inside the scene, or the output is larger than the window.
            ImageReadError: the source cannot be decoded there.
        """
        inside = min(row_off, col_off) >= 0 and row_off + height <= self.height and col_off + width <= self.width
        if not inside or height < 1 or width < 1:
            raise InputError(
                f"window must lie inside the scene of {self.height} x {self.width} px, got row_off={row_off}, "
                f"col_off={col_off}, height={height}, width={width}; clip it first"
            )
        out_height, out_width = out_height or height, out_width or width
        if not (1 <= out_height <= height and 1 <= out_width <= width):
            raise InputError(
                f"out_height and out_width must be in 1..window ({height} x {width}), got {out_height} x {out_width}; "
                "read natively and enlarge afterwards"
            )
        return self._read_strips(row_off, col_off, height, width, out_height, out_width, raw=False)

    def close(self) -> None:
        """Frees what the scene holds open. Reading afterwards is an error."""
        return

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _overview_shape(self, max_side_px: int) -> tuple[int, int]:
        scale = min(1.0, max_side_px / max(self.height, self.width))
        return max(1, round(self.height * scale)), max(1, round(self.width * scale))

    def _read_strips(
        self, row_off: int, col_off: int, height: int, width: int, out_height: int, out_width: int, *, raw: bool
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Reads in strips of rows, so that a huge window never stands in memory at native size and dtype."""
        rows = max(1, int(_STRIP_PX / width * out_height / height))
        if self.in_memory and not raw and self.stretch is None and (out_height, out_width) == (height, width):
            rows = out_height  # a view, no copy
        whole: NDArray[Any] = np.empty(0)
        masks: NDArray[np.bool_] = np.empty(0, dtype=np.bool_)
        for start in range(0, out_height, rows):
            stop = min(out_height, start + rows)
            top, bottom = start * height / out_height, stop * height / out_height
            values, valid = self._read_raw(row_off + top, col_off, bottom - top, width, stop - start, out_width)
            part, mask = (values, valid) if raw else _shown(values, valid, self.stretch)
            if stop - start == out_height:
                return part, mask
            if start == 0:
                whole = np.empty((out_height, *part.shape[1:]), dtype=part.dtype)
                masks = np.empty((out_height, *mask.shape[1:]), dtype=np.bool_)
            whole[start:stop], masks[start:stop] = part, mask
        return whole, masks


@dataclass(frozen=True)
class _Survey:
    """The overview's values [h, w, C] and validity, the stretch that fits them, and the coarse copy of a costly scene."""

    values: NDArray[Any]
    valid: NDArray[np.bool_]
    fitted: Stretch
    coarse: tuple[NDArray[np.uint8], int] | None = None


def _shown(
    values: NDArray[Any], valid: NDArray[np.bool_], stretch: Stretch | None
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Grey levels uint8 [h, w, 3] and mask bool [h, w] of band values."""
    grey = values if stretch is None else stretch.apply(values, valid)
    mask = valid[..., 0]
    if valid.strides[2] != 0:  # not one validity for all bands
        for band in range(1, valid.shape[2]):  # ten times faster than any(axis=2)
            mask = mask | valid[..., band]
    return to_rgb(grey), mask


class ArrayScene(Scene):
    """A scene whose pixels are in memory."""

    in_memory = True

    def __init__(
        self,
        pixels: NDArray[Any],
        mask: NDArray[np.bool_] | None,
        *,
        name: str,
        bands: Sequence[int] | None = None,
        stretch: StretchChoice = "auto",
        display_ready: bool | None = None,
    ) -> None:
        """pixels: [H, W] or [H, W, C], any real dtype; mask: bool [H, W] or None (all valid)."""
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        if pixels.dtype == np.bool_:
            pixels = pixels.astype(np.uint8) * np.uint8(255)
        pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
        self.name, (self.height, self.width, self.count), self.dtype = name, pixels.shape, str(pixels.dtype)
        chosen = choose_bands(bands, self.count, (1, 2, 3) if self.count >= 3 else (1,), name)
        # a slice keeps a view; a list of indices copies
        first = chosen[0] - 1
        consecutive = chosen == tuple(range(first + 1, first + 1 + len(chosen)))
        self._pixels = pixels[..., first : first + len(chosen)] if consecutive else pixels[..., [band - 1 for band in chosen]]
        self._mask, self.num_shown = mask, len(chosen)
        self.all_valid = mask is None and pixels.dtype.kind != "f"
        photo = pixels.dtype == np.uint8 and self.count <= 4
        self._display_ready = photo if display_ready is None else display_ready and pixels.dtype == np.uint8
        self._stretch_choice = check_stretch(stretch, self.dtype, len(chosen), name)

    def _read_raw(
        self, row_off: float, col_off: float, height: float, width: float, out_height: int, out_width: int
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        top = int(row_off)
        rows = slice(top, min(self.height, math.ceil(row_off + height)))
        cols = slice(int(col_off), int(col_off + width))
        values = self._pixels[rows, cols]
        valid = np.broadcast_to(True if self._mask is None else self._mask[rows, cols, None], values.shape)
        if values.dtype.kind == "f":
            valid = valid & np.isfinite(values)
        return area_average(values, valid, out_height, out_width, (row_off - top, min(row_off - top + height, values.shape[0])))


def open_scene(
    source: object,
    *,
    bands: Sequence[int] | None = None,
    stretch: StretchChoice = "auto",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_ram_bytes: int = DEFAULT_MAX_RAM,
    allow_drivers: Sequence[str] = (),
    allow_vsi: bool = False,
) -> Scene:
    """A scene from anything that holds an image.

    Args:
        source: path (str or Path), encoded bytes, `PIL.Image.Image`, numpy array [H, W] or [H, W, C] (channels last, a
            fourth channel is a band, not alpha), or an open rasterio dataset (stays open).
        bands: 1 or 3 band numbers, 1-based. Default: RGB by colour interpretation or band names, else the usual order of a
            known sensor's band count, else bands 1, 2, 3, or the single band as grey.
        stretch: "auto" shows 8-bit RGB (and 8-bit grey of plain images) as it is and maps the 2-98 percentiles of anything
            else to 0..255; "percentile" always does; "none" never (8-bit only); (low, high) sets the range by hand, each one number
            or one for each shown band.
        max_pixels: refuse a plain image with more pixels (decompression bomb). Rasters are read by windows and have no limit.
        max_ram_bytes: what reading one raster may hold; a raster whose blocks do not fit is refused.
        allow_drivers: GDAL drivers that may open a file besides GeoTIFF and JPEG 2000; allow them for files that you trust.
        allow_vsi: whether source may be one of GDAL's `/vsi` paths, which reach archives and the network.

    Raises:
        InputError: an argument is out of this contract.
        ImageReadError: missing, damaged, unsupported, not allowed or too large.
        MissingDependencyError: a TIFF that only rasterio can read.
    """
    how = _How(bands, stretch, max_pixels, max_ram_bytes, Access(tuple(allow_drivers), allow_vsi))
    with within_memory(str(source) if isinstance(source, (str, Path)) else "image"):
        return _open(source, how)


@dataclass(frozen=True)
class _How:
    """The options of `open_scene`."""

    bands: Sequence[int] | None
    stretch: StretchChoice
    max_pixels: int
    max_ram_bytes: int
    access: Access

    def raster(self, source: object, name: str = "", drivers: Sequence[str] = ()) -> Scene:
        """Through rasterio."""
        from .geo import open_raster

        return open_raster(
            source,
            name=name,
            drivers=drivers,
            bands=self.bands,
            stretch=self.stretch,
            max_ram_bytes=self.max_ram_bytes,
            options=self.access.options,
        )


@contextmanager
def within_memory(name: str) -> Iterator[None]:
    """Running out of memory over one image becomes its ImageReadError, so that the other images of a run still get theirs."""
    try:
        yield
    except MemoryError:
        raise ImageReadError(
            f"{name} needs more memory than is free; lower max_pixels to refuse images of this size, choose one band with "
            "bands=(1,), or save it as a tiled GeoTIFF, which is read by windows"
        ) from None


def _open(source: object, how: _How) -> Scene:
    if isinstance(source, np.ndarray):
        return _from_array(source, how.bands, how.stretch)
    if isinstance(source, Image.Image):
        return _from_pillow(source, "image", how)
    if type(source).__module__.partition(".")[0] == "rasterio":
        return how.raster(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_encoded(bytes(source), "bytes", how)
    if isinstance(source, (str, Path)):
        found = find_source(source, how.access)
        if isinstance(found, str):
            return _by_rasterio(found, how)
        return _from_encoded(found, str(source), how)
    raise InputError(
        "source must be a path, bytes, a PIL image, a numpy array [H, W] or [H, W, C] or an open rasterio dataset, "
        f"got {type(source).__name__}; convert it to one of these"
    )


def choose_bands(bands: Sequence[int] | None, count: int, default: tuple[int, ...], name: str) -> tuple[int, ...]:
    """The bands to show, 1-based: `bands` when given and valid, else `default`. Raises InputError."""
    if bands is None:
        return default
    chosen = tuple(bands)
    if len(chosen) not in (1, 3) or not all(isinstance(band, (int, np.integer)) and 1 <= band <= count for band in chosen):
        raise InputError(
            f"bands must be 1 or 3 numbers in 1..{count} ({name} has {count} bands, counted from 1), got {list(chosen)}; "
            "choose e.g. bands=(1,)"
        )
    return tuple(int(band) for band in chosen)


def check_stretch(stretch: StretchChoice, dtype: str, num_shown: int, name: str) -> StretchChoice:
    """`stretch` when it is valid for `num_shown` bands of `dtype`. Raises InputError."""
    if isinstance(stretch, (tuple, list)):
        if len(stretch) == 2:
            low, high = (_edge(edge, num_shown) for edge in stretch)
            if len(low) == len(high) == num_shown and all(a < b for a, b in zip(low, high, strict=True)):
                return (low, high)
    elif stretch in ("auto", "percentile") or (stretch == "none" and dtype == "uint8"):
        return stretch
    raise InputError(
        'stretch must be "auto", "percentile", (low, high) with low < high (numbers, or one for each of the '
        f'{num_shown} shown bands), or for uint8 values "none", got {stretch!r} for {name} with {dtype} values; use "auto"'
    )


def _edge(edge: Any, num_shown: int) -> tuple[float, ...]:
    return tuple(float(value) for value in edge) if isinstance(edge, (tuple, list)) else (float(edge),) * num_shown


def _from_array(array: NDArray[Any], bands: Sequence[int] | None, stretch: StretchChoice) -> Scene:
    if array.ndim not in (2, 3) or array.size == 0 or array.dtype.kind not in "buif":
        raise InputError(
            f"source array must be a non-empty real array [H, W] or [H, W, C], got {array.dtype} {list(array.shape)}; "
            "reshape it, or take the magnitude of complex values"
        )
    if array.ndim == 3 and array.shape[2] > 64 and array.shape[0] <= 64:
        raise InputError(
            f"source array must have its channels last [H, W, C], got {list(array.shape)}; use array.transpose(1, 2, 0)"
        )
    return ArrayScene(array, None, name="array", bands=bands, stretch=stretch)


def _by_rasterio(source: str, how: _How) -> Scene:
    """A name that only GDAL can resolve."""
    try:
        return how.raster(source, source, how.access.drivers)
    except ImportError:
        raise MissingDependencyError(
            f"{source} needs rasterio, which is not installed; pip install 'rsvlm-infer[geo]'"
        ) from None


def _from_encoded(source: Path | bytes, name: str, how: _How) -> Scene:
    """A file or its bytes: rasters go to rasterio when it is installed, everything else to Pillow."""
    try:
        if isinstance(source, Path):
            with source.open("rb") as file:
                head = file.read(16)
        else:
            head = source[:16]
    except OSError as error:
        raise ImageReadError(f"{name} cannot be opened ({error.strerror}); check the file's permissions") from None
    if not head:
        raise ImageReadError(f"{name} is empty (0 bytes), expected an image; restore it from its source")
    driver = driver_of(head)
    if driver:
        try:
            return how.raster(source, name, (driver,))
        except ImportError:
            _log.info("%s: rasterio is not installed, reading through Pillow without georeference or nodata", name)
    try:
        with open_plain(source, name, how.max_pixels) as image:
            return _from_pillow(image, name, how)
    except ImageReadError as error:
        if driver:
            raise MissingDependencyError(
                f"{name} is a raster that needs rasterio, which is not installed ({error}); pip install 'rsvlm-infer[geo]'"
            ) from None
        if how.access.allow_drivers:
            return how.raster(source, name, how.access.allow_drivers)
        raise ImageReadError(f"{error}{allowance(name, how.access.allow_drivers)}") from None


def _from_pillow(image: Image.Image, name: str, how: _How) -> Scene:
    pixels, mask = decode_plain(image, name, how.max_pixels)
    display_ready = not (image.format == "TIFF" and pixels.ndim == 2)  # grey TIFFs are stretched, with rasterio or without
    return ArrayScene(pixels, mask, name=name, bands=how.bands, stretch=how.stretch, display_ready=display_ready)
