"""Owns rasters with a georeference: windows, bands, masks and ground metres through rasterio. Knows no plan or model.

Imported only when a raster is opened; rasterio is the extra `[geo]`.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile
from rasterio.warp import transform as warp_transform
from rasterio.windows import Window

from ..errors import ImageReadError, InputError
from .source import Scene, StretchChoice, check_stretch, choose_bands

_CACHE_MB = (256, 768)  # GDAL's default is 5 % of the machine's memory
_CACHE_ROWS = 1024  # rows of a leaf window; a cache below one row of blocks decodes every block again and again

# the usual RGB bands of sensors that write nothing about their bands, by band count
KNOWN_ORDERS: dict[int, tuple[int, int, int]] = {
    6: (3, 2, 1),  # Landsat TM / HLS: blue, green, red, ...
    7: (4, 3, 2),  # Landsat 8 surface reflectance: coastal, blue, green, red, ...
    10: (3, 2, 1),  # Sentinel-2 10 m and 20 m bands: B02, B03, B04, ...
    11: (4, 3, 2),  # Landsat 8 level 1
    12: (4, 3, 2),  # Sentinel-2 level 2A: B01, B02, B03, B04, ...
    13: (4, 3, 2),  # Sentinel-2 level 1C
}
_BAND_NAMES = tuple(
    re.compile(rf"^(?:{pattern})$", re.IGNORECASE)
    for pattern in (r"red|b0?4(?:[ _-].*)?|sr_b4", r"green|b0?3(?:[ _-].*)?|sr_b3", r"blue|b0?2(?:[ _-].*)?|sr_b2")
)


def open_raster(
    source: object,
    *,
    name: str = "",
    driver: str = "GTiff",
    bands: Sequence[int] | None = None,
    stretch: StretchChoice = "auto",
) -> RasterScene:
    """A scene from a raster file, its bytes, or an open rasterio dataset (which stays the caller's to close).

    driver: the only GDAL driver that may open a file; VRT and the like could point at other files and at the network.

    Raises:
        InputError: `bands` or `stretch` do not fit the raster.
        ImageReadError: damaged, unsupported, complex or without bands.
    """
    memory: MemoryFile | None = None
    owned = isinstance(source, (str, Path, bytes))
    name = name or str(getattr(source, "name", source))
    with _reading(name, _CACHE_MB[0]), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        if isinstance(source, bytes):
            memory = MemoryFile(source)
            dataset = memory.open(driver=driver)
        else:
            dataset = rasterio.open(source, driver=driver) if isinstance(source, (str, Path)) else source
    try:
        return RasterScene(dataset, name, bands, stretch, owned=[dataset, memory] if owned else [])
    except BaseException:
        if owned:
            dataset.close()
        if memory is not None:
            memory.close()
        raise


class RasterScene(Scene):
    """A scene read by windows; GDAL's overviews and masks are used where there are any."""

    def __init__(
        self, dataset: Any, name: str, bands: Sequence[int] | None, stretch: StretchChoice, *, owned: list[Any]
    ) -> None:
        if not hasattr(dataset, "read_masks"):
            raise InputError(f"source must be an open rasterio dataset, got {type(dataset).__name__}; use rasterio.open")
        if dataset.closed:
            raise InputError(f"source must be an open rasterio dataset, {name} is closed; open it again")
        if dataset.count < 1:
            raise ImageReadError(f"{name} holds no bands of its own, expected at least 1; export one of its subdatasets")
        self._dataset, self._owned = dataset, owned
        self.name, self.height, self.width, self.count = name, dataset.height, dataset.width, dataset.count
        interpretation = list(dataset.colorinterp)
        self._bands = choose_bands(bands, self.count, default_bands(interpretation, dataset.descriptions), name)
        dtypes = [dataset.dtypes[band - 1] for band in self._bands]
        if any(dtype.startswith("complex") for dtype in dtypes):
            raise ImageReadError(
                f"{name} has complex values ({dtypes[0]}), expected real ones; write its magnitude to a new file first"
            )
        self._palette = _palette(dataset, self._bands)
        self.dtype = "uint8" if self._palette is not None else dtypes[0]
        self._stretch_choice = check_stretch(stretch, self.dtype, name)
        known_rgb = self.count == 3 or {ColorInterp.red, ColorInterp.green, ColorInterp.blue} <= set(interpretation)
        self._display_ready = self._palette is not None or (self.dtype == "uint8" and known_rgb)
        self._flags = [dataset.mask_flag_enums[band - 1] for band in self._bands]
        masked = self._palette is not None or dtypes[0].startswith("float")
        self.all_valid = not masked and all(MaskFlags.all_valid in flags for flags in self._flags)
        row_bytes = dataset.width * dataset.count * np.dtype(dtypes[0]).itemsize
        block_rows = max(dataset.block_shapes[0][0], _CACHE_ROWS)
        self._cache_mb = min(max(_CACHE_MB[0], row_bytes * block_rows * 5 // 4 >> 20), _CACHE_MB[1])
        georeferenced = dataset.crs is not None or not dataset.transform.is_identity
        if georeferenced:
            self.transform = tuple(dataset.transform)[:6]
            corners = ((0, 0), (self.width, 0), (0, self.height), (self.width, self.height))
            xs, ys = zip(*(_place(dataset.transform, *corner) for corner in corners), strict=True)
            self.bounds = (min(xs), min(ys), max(xs), max(ys))
        if dataset.crs is not None:
            self.crs = dataset.crs.to_string()
            self.gsd_native_m = ground_sampling_distance(dataset)

    def close(self) -> None:
        """Closes the file when this scene opened it."""
        for item in self._owned:
            if item is not None:
                item.close()

    def _read_raw(
        self, row_off: float, col_off: float, height: float, width: float, out_height: int, out_width: int
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        if self._dataset.closed:
            raise InputError(f"scene {self.name} is closed, expected an open one; read inside the `with` block")
        window = Window(col_off, row_off, width, height)
        count = len(self._bands)
        # a class number has no mean: palettes take the most frequent class
        resampling = Resampling.average if self._palette is None else Resampling.mode
        with _reading(self.name, self._cache_mb):
            values = self._dataset.read(
                list(self._bands), window=window, out_shape=(count, out_height, out_width), resampling=resampling
            ).transpose(1, 2, 0)  # [oh, ow, C]
            valid = self._read_valid(window, out_height, out_width)  # [oh, ow, C]
        if self._palette is not None:
            colours = self._palette[np.minimum(values[..., 0], len(self._palette) - 1)]  # [oh, ow, 4]
            values = colours[..., :3]
            valid = np.broadcast_to(valid[..., :1] & (colours[..., 3:] > 0), values.shape)
        if values.dtype.kind == "f":
            valid = valid & np.isfinite(values)
        return values, valid

    def _read_valid(self, window: Window, out_height: int, out_width: int) -> NDArray[np.bool_]:
        """bool [oh, ow, C], True where any valid pixel lies below."""
        shape = (out_height, out_width, len(self._bands))
        if all(MaskFlags.all_valid in flags for flags in self._flags):
            return np.broadcast_to(np.True_, shape)
        shared = all(MaskFlags.per_dataset in flags for flags in self._flags)  # one mask for all bands
        bands = [self._bands[0]] if shared else list(self._bands)
        masks = self._dataset.read_masks(
            bands, window=window, out_shape=(len(bands), out_height, out_width), resampling=Resampling.average
        )
        return np.broadcast_to((masks > 0).transpose(1, 2, 0), shape)


def default_bands(interpretation: Sequence[Any], descriptions: Sequence[str | None]) -> tuple[int, ...]:
    """The bands to show when nobody chose, 1-based: 3 for RGB or 1 for grey.

    In order: colour interpretation, band names (red / green / blue, B04 / B03 / B02), the usual order of a known band
    count, bands 1-2-3, the first band. Alpha is never shown.
    """
    colours = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
    if all(colour in interpretation for colour in colours):
        return tuple(interpretation.index(colour) + 1 for colour in colours)
    named = [
        next((index + 1 for index, text in enumerate(descriptions) if text and pattern.match(text.strip())), 0)
        for pattern in _BAND_NAMES
    ]
    if all(named):
        return tuple(named)
    shown = [index + 1 for index, colour in enumerate(interpretation) if colour != ColorInterp.alpha]
    if len(shown) < 3:
        return (shown[0] if shown else 1,)
    return tuple(shown[band - 1] for band in KNOWN_ORDERS.get(len(shown), (1, 2, 3)))


def ground_sampling_distance(dataset: Any) -> float | None:
    """Side in metres of the square that has one pixel's ground area at the scene's centre; None without a usable crs.

    Projected systems: crs units times their metre factor, on Mercator also times cos(latitude), because there a crs metre
    is longer than a metre on the ground. Geographic systems: degrees times the length of a degree at that latitude.
    """
    transform, crs = dataset.transform, dataset.crs
    x, y = _place(transform, dataset.width / 2, dataset.height / 2)
    try:
        if crs.is_geographic:
            latitude = math.radians(max(-90.0, min(90.0, y)))
            metres_x = 111412.84 * math.cos(latitude) - 93.5 * math.cos(3 * latitude)
            metres_y = 111132.954 - 559.822 * math.cos(2 * latitude) + 1.175 * math.cos(4 * latitude)
        elif crs.is_projected:
            metres_x = metres_y = float(crs.linear_units_factor[1])
            if crs.to_dict().get("proj") in ("merc", "webmerc"):
                latitude = math.radians(warp_transform(crs, "EPSG:4326", [x], [y])[1][0])
                metres_x = metres_y = metres_x * math.cos(latitude)
        else:
            return None
    except RasterioError:  # a local or damaged crs without units
        return None
    column = math.hypot(transform.a * metres_x, transform.d * metres_y)
    row = math.hypot(transform.b * metres_x, transform.e * metres_y)
    distance = math.sqrt(column * row)
    return distance if math.isfinite(distance) and distance > 0 else None


def _place(transform: Any, col: float, row: float) -> tuple[float, float]:
    """Pixel corner -> crs coordinates; affine 2 writes this product `*`, affine 3 `@`."""
    return transform.a * col + transform.b * row + transform.c, transform.d * col + transform.e * row + transform.f


def _palette(dataset: Any, bands: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """uint8 [N, 4] colours of a palette band, or None."""
    if len(bands) != 1 or dataset.colorinterp[bands[0] - 1] != ColorInterp.palette:
        return None
    try:
        colours = dataset.colormap(bands[0])
    except ValueError:
        return None
    table = np.zeros((max(colours) + 1, 4), dtype=np.uint8)
    for index, colour in colours.items():
        table[index] = colour
    return table


@contextmanager
def _reading(name: str, cache_mb: int) -> Iterator[None]:
    """GDAL with a bounded cache, its messages in Python's logging; its errors become one ImageReadError."""
    try:
        with rasterio.Env(GDAL_CACHEMAX=cache_mb, GDAL_DISABLE_READDIR_ON_OPEN="TRUE"):
            yield
    except (RasterioError, ValueError) as error:
        cause = error.__cause__ or error
        reason = " ".join(str(getattr(cause, "errmsg", cause)).split()) or type(error).__name__
        raise ImageReadError(f"{name} cannot be read as a raster ({reason}); restore the file from its source") from None
