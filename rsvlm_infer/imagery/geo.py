"""Owns rasters with a georeference: windows, bands, masks and ground metres through rasterio. Knows no plan or model.

Imported only when a raster is opened; rasterio is the extra `[geo]`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, Interleaving, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile
from rasterio.windows import Window

from ..errors import ImageReadError, InputError
from .access import SAFE_DRIVERS
from .acquired import acquired_time
from .coarse import Blocks, Chunk, Coarse, ReadChunk, apart, chunks, coarse_factor, make_coarse, pass_threads, step_cache_bytes
from .georeference import georeference
from .source import COARSE_FROM_PX, DEFAULT_MAX_RAM, Scene, StretchChoice, check_stretch, choose_bands

_CACHE_LEAST = 64 << 20  # bytes; GDAL's default is 5 % of the machine's memory

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


@dataclass(frozen=True)
class Reading:
    """How GDAL reads one raster: what messages call it, its options, its block cache in bytes."""

    name: str
    options: dict[str, str]
    cache_bytes: int

    def environment(self) -> Any:
        """GDAL with a bounded cache, its messages in Python's logging: for the thread that enters it."""
        return rasterio.Env(GDAL_CACHEMAX=self.cache_bytes, GDAL_DISABLE_READDIR_ON_OPEN="TRUE", **self.options)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """`environment`, and its errors `told`."""
        with self.told(), self.environment():
            yield

    @contextmanager
    def told(self) -> Iterator[None]:
        """GDAL's errors become one ImageReadError."""
        try:
            yield
        except (RasterioError, ValueError) as error:
            cause = error.__cause__ or error
            reason = " ".join(str(getattr(cause, "errmsg", cause)).split()) or type(error).__name__
            raise ImageReadError(
                f"{self.name} cannot be read as a raster ({reason}); restore the file from its source"
            ) from None


def open_raster(
    source: object,
    *,
    name: str = "",
    drivers: Sequence[str] = SAFE_DRIVERS,
    bands: Sequence[int] | None = None,
    stretch: StretchChoice = "auto",
    max_ram_bytes: int = DEFAULT_MAX_RAM,
    options: Mapping[str, str] | None = None,
) -> RasterScene:
    """A scene from a raster file, its bytes, or an open rasterio dataset (which stays the caller's to close).

    drivers: the only GDAL drivers that may open a file; VRT and the like could point at other files and at the network.
    max_ram_bytes: as in `open_scene`. options: GDAL options that hold while this scene is read.

    Raises:
        InputError: `bands` or `stretch` do not fit the raster.
        ImageReadError: damaged, unsupported, complex or without bands.
    """
    name = name or str(getattr(source, "name", source))
    reading = Reading(name, dict(options or {}), _CACHE_LEAST)
    handle = _Handle.open(source, list(drivers), reading)
    try:
        return RasterScene(handle, name, bands, stretch, max_ram_bytes, reading)
    except BaseException:
        handle.close()
        raise


@dataclass(frozen=True)
class _Handle:
    """An open dataset and how to open another one like it. `owned` is what closes with it."""

    dataset: Any
    source: object
    drivers: list[str]
    owned: tuple[Any, ...]

    @classmethod
    def open(cls, source: object, drivers: list[str], reading: Reading) -> _Handle:
        """A path, bytes, or a dataset that stays its owner's to close."""
        if not isinstance(source, (str, Path, bytes)):
            return cls(source, source, drivers, ())
        with reading.guarded(), warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            if not isinstance(source, bytes):
                # not shared: two threads must never meet in one GDAL dataset
                dataset = _first_open(drivers, lambda driver: rasterio.open(source, driver=driver, sharing=False))
                return cls(dataset, source, drivers, (dataset,))
            memory = MemoryFile(source)
            try:
                dataset = _first_open(drivers, lambda driver: memory.open(driver=driver))
            except BaseException:
                memory.close()
                raise
            return cls(dataset, source, drivers, (dataset, memory))

    def again(self, reading: Reading) -> _Handle:
        """Another handle on the same raster."""
        source = self.source if self.owned else self.dataset.name
        return _Handle.open(source, self.drivers if self.owned else [self.dataset.driver], reading)

    def close(self) -> None:
        for item in self.owned:
            item.close()


def _first_open(drivers: Sequence[str], opening: Callable[[str], Any]) -> Any:
    """The dataset of the first driver that knows the file; else the error that says most."""
    errors: list[RasterioError] = []
    for driver in drivers:
        try:
            return opening(driver)
        except RasterioError as error:
            errors.append(error)
    raise next((error for error in errors if "not recognized" not in str(error)), errors[-1])


class RasterScene(Scene):
    """A scene read by windows; GDAL's overviews and masks are used where there are any."""

    def __init__(
        self,
        handle: _Handle,
        name: str,
        bands: Sequence[int] | None,
        stretch: StretchChoice,
        max_ram_bytes: int,
        reading: Reading,
    ) -> None:
        dataset = handle.dataset
        if not hasattr(dataset, "read_masks"):
            raise InputError(f"source must be an open rasterio dataset, got {type(dataset).__name__}; use rasterio.open")
        if dataset.closed:
            raise InputError(f"source must be an open rasterio dataset, {name} is closed; open it again")
        if dataset.count < 1:
            raise ImageReadError(f"{name} holds no bands of its own, expected at least 1; export one of its subdatasets")
        self._handle, self._dataset, self._max_ram_bytes = handle, dataset, max_ram_bytes
        self.name, self.height, self.width, self.count = name, dataset.height, dataset.width, dataset.count
        interpretation = list(dataset.colorinterp)
        self._bands = choose_bands(bands, self.count, default_bands(interpretation, dataset.descriptions), name)
        dtypes = [dataset.dtypes[band - 1] for band in self._bands]
        if any(dtype.startswith("complex") for dtype in dtypes):
            raise ImageReadError(
                f"{name} has complex values ({dtypes[0]}), expected real ones; write its magnitude to a new file first"
            )
        self._palette = _palette(dataset, self._bands)
        self.num_shown = 3 if self._palette is not None else len(self._bands)
        self.dtype = "uint8" if self._palette is not None else dtypes[0]
        self._stretch_choice = check_stretch(stretch, self.dtype, self.num_shown, name)
        known_rgb = self.count == 3 or {ColorInterp.red, ColorInterp.green, ColorInterp.blue} <= set(interpretation)
        self._display_ready = self._palette is not None or (self.dtype == "uint8" and known_rgb)
        self._flags = [dataset.mask_flag_enums[band - 1] for band in self._bands]
        masked = self._palette is not None or dtypes[0].startswith("float")
        self.all_valid = not masked and all(MaskFlags.all_valid in flags for flags in self._flags)
        self._blocks = self._stored()
        self._reading = replace(reading, cache_bytes=self._blocks.cache_bytes)
        self._georeference = georeference(dataset)
        self.transform, self.lost = self._georeference.transform, self._georeference.lost
        self.bounds = self._georeference.bounds(self.height, self.width)
        if self._georeference.crs is not None:
            self.crs, self.crs_wkt = self._georeference.crs.to_string(), self._georeference.wkt
        self.gsd_native_m = self.gsd_at(self.height / 2, self.width / 2)
        acquired = acquired_time(dataset)
        self.acquired = None if acquired is None else acquired.isoformat()

    def gsd_at(self, row: float, col: float) -> float | None:
        return self._georeference.gsd(row, col)

    def twin(self) -> RasterScene:
        """Another handle on the file. The stretch is this scene's, also when it was fitted."""
        stretch: StretchChoice = "none" if self.stretch is None else (self.stretch.low, self.stretch.high)
        handle = self._handle.again(self._reading)
        try:
            return RasterScene(handle, self.name, self._bands, stretch, self._max_ram_bytes, self._reading)
        except BaseException:
            handle.close()
            raise

    def close(self) -> None:
        """Closes the file when this scene opened it."""
        self._handle.close()

    def _stored(self) -> Blocks:
        """How the file is stored, with a cache for two rows of blocks: what decodes each block once in a pass over the raster.

        Raises:
            ImageReadError: not even one block fits.
        """
        dataset = self._dataset
        block_height, block_width = dataset.block_shapes[self._bands[0] - 1]
        itemsize = np.dtype(dataset.dtypes[self._bands[0] - 1]).itemsize
        # pixel-interleaved files decode all bands of a block together
        together = dataset.count if dataset.interleaving is Interleaving.pixel else len(self._bands)
        most, block_bytes = self._max_ram_bytes // 2, block_height * block_width * itemsize * together
        if block_bytes > most:
            raise ImageReadError(
                f"{self.name} stores {block_height} x {block_width} pixels in one block, {block_bytes / 2**20:.0f} MiB that must be "
                f"decoded at once, more than half of max_ram_bytes={self._max_ram_bytes:,}; raise it to {2 * block_bytes:,} "
                "(--max-ram), or save the file as a tiled GeoTIFF"
            )
        rows_of_blocks = 2 * dataset.width * block_height * itemsize * together
        cache_bytes = int(min(max(_CACHE_LEAST, rows_of_blocks), most))
        return Blocks(block_height, block_width, itemsize * len(self._bands), itemsize * together, cache_bytes)

    @property
    def _costly(self) -> bool:
        """Without overviews, whatever is asked of the whole raster decodes the whole raster."""
        return (
            self.height * self.width > COARSE_FROM_PX and self._palette is None and not self._dataset.overviews(self._bands[0])
        )

    def _read_coarse(self) -> Coarse:
        dtype = np.dtype(self.dtype)
        factor = coarse_factor(self.height, self.width, len(self._bands), dtype.itemsize)
        spans = list(apart(chunks(self.height, self.width, self._blocks, factor), self._blocks))
        fills = None if self._nodata is None else self._nodata.tolist()
        cache_bytes = self._blocks.cache_bytes
        if fills is not None or self._unmasked:  # a mask has blocks of its own
            cache_bytes = step_cache_bytes(spans[0][0], self.width, self._blocks)
        threads = pass_threads(spans, self._blocks, cache_bytes, self._max_ram_bytes // 2)
        reading = replace(self._reading, cache_bytes=threads * cache_bytes)
        own = self._handle.owned  # a caller's dataset may not be one that can be opened again
        turn = Lock()
        readers = [partial(self._open_reader, reading, None if own and index else turn) for index in range(threads)]
        return make_coarse(self.height, self.width, len(self._bands), dtype, factor, spans, readers, fills)

    @contextmanager
    def _open_reader(self, reading: Reading, turn: Lock | None) -> Iterator[ReadChunk]:
        """What one thread of the coarse pass reads with: this scene's handle when it is its turn, or without `turn` one of its own."""
        with ExitStack() as stack:
            handle = self._handle
            if turn is None:
                handle = stack.enter_context(closing(handle.again(reading)))
            stack.enter_context(reading.environment())  # takes a tenth of a step's time
            yield partial(self._read_step, handle.dataset, reading, turn or Lock())

    def _read_step(
        self, dataset: Any, reading: Reading, turn: Lock, step: Chunk, cells: NDArray[Any]
    ) -> NDArray[np.bool_] | None:
        """Fills `cells` [C, h, w] with native values; what masks them [C or 1, h, w], None where nothing or nodata alone does."""
        window = Window(step.col_off, step.row_off, step.width, step.height)
        with turn, reading.told():
            dataset.read(list(self._bands), window=window, out=cells)
            if self._nodata is not None or self._unmasked:
                return None
            valid = self._read_valid(dataset, window, step.height, step.width).transpose(2, 0, 1)
        return valid[:1] if valid.strides[0] == 0 else valid  # one mask for all bands

    @property
    def _unmasked(self) -> bool:
        """Nothing but NaN can make a pixel invalid."""
        return all(MaskFlags.all_valid in flags for flags in self._flags)

    @cached_property
    def _nodata(self) -> NDArray[Any] | None:
        """[C], the one value of each shown band that is no measurement, where nothing else masks an integer raster."""
        values = [self._dataset.nodatavals[band - 1] for band in self._bands]
        dtype = np.dtype(self.dtype)
        if dtype.kind not in "iu" or any(flags != [MaskFlags.nodata] for flags in self._flags):
            return None
        limits = np.iinfo(dtype)
        if any(value is None or value != int(value) or not limits.min <= int(value) <= limits.max for value in values):
            return None
        return np.array([int(value) for value in values], dtype=dtype)

    def _read_raw(
        self, row_off: float, col_off: float, height: float, width: float, out_height: int, out_width: int
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        if self._dataset.closed:
            raise InputError(f"scene {self.name} is closed, expected an open one; read inside the `with` block")
        window = Window(col_off, row_off, width, height)
        count = len(self._bands)
        # a class number has no mean: palettes take the most frequent class
        resampling = Resampling.average if self._palette is None else Resampling.mode
        with self._reading.guarded():
            values = self._dataset.read(
                list(self._bands), window=window, out_shape=(count, out_height, out_width), resampling=resampling
            ).transpose(1, 2, 0)  # [oh, ow, C]
            valid = self._read_valid(self._dataset, window, out_height, out_width)  # [oh, ow, C]
        if self._palette is not None:
            colours = self._palette[np.minimum(values[..., 0], len(self._palette) - 1)]  # [oh, ow, 4]
            values = colours[..., :3]
            valid = np.broadcast_to(valid[..., :1] & (colours[..., 3:] > 0), values.shape)
        if values.dtype.kind == "f":
            valid = valid & np.isfinite(values)
        return values, valid

    def _read_valid(self, dataset: Any, window: Window, out_height: int, out_width: int) -> NDArray[np.bool_]:
        """bool [oh, ow, C], True where any valid pixel lies below."""
        shape = (out_height, out_width, len(self._bands))
        if self._unmasked:
            return np.broadcast_to(np.True_, shape)
        shared = all(MaskFlags.per_dataset in flags for flags in self._flags)  # one mask for all bands
        bands = [self._bands[0]] if shared else list(self._bands)
        masks = dataset.read_masks(
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
    """`Georeference.gsd` at a dataset's centre."""
    return georeference(dataset).gsd(dataset.height / 2, dataset.width / 2)


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
