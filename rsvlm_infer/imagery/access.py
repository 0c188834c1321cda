"""Owns what may be opened: local files, two self-contained raster formats, and what a user allows besides. Opens nothing itself.

GeoTIFF and JPEG 2000 hold their own pixels. Other formats may name further files or addresses (a VRT is a list of them), so a driver
must be allowed by name, by somebody who trusts the file. GDAL's virtual file systems (`/vsizip/`, `/vsicurl/`, `/vsis3/` ...) are allowed
all at once or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ImageReadError

SAFE_DRIVERS = ("GTiff", "JP2OpenJPEG")
RASTER_MAGIC = {  # first bytes -> GDAL driver
    b"II*\0": "GTiff",
    b"MM\0*": "GTiff",
    b"II+\0": "GTiff",
    b"MM\0+": "GTiff",
    b"\0\0\0\x0cjP  ": "JP2OpenJPEG",
    b"\xff\x4f\xff\x51": "JP2OpenJPEG",
}
_USUAL_DRIVERS = {  # by the end of a name, to say which driver to allow
    ".vrt": "VRT",
    ".img": "HFA",
    ".nc": "netCDF",
    ".h5": "HDF5",
    ".hdf5": "HDF5",
    ".ntf": "NITF",
    ".nitf": "NITF",
    ".grib": "GRIB",
    ".grb2": "GRIB",
    ".asc": "AAIGrid",
    ".dat": "ENVI",
    ".bil": "EHdr",
    ".hgt": "SRTMHGT",
    ".dt2": "DTED",
    ".mbtiles": "MBTiles",
    ".gpkg": "GPKG",
    ".zarr": "Zarr",
    ".safe": "SENTINEL2",
    ".xml": "DIMAP",
}
_ADDRESS = re.compile(r"^[A-Za-z][A-Za-z0-9+.\-]+:/")  # two letters or more: "C:/" is a path
_SUBDATASET = re.compile(r"^([A-Za-z][A-Za-z0-9_]+):")


@dataclass(frozen=True)
class Access:
    """What a user allows beyond local GeoTIFF and JPEG 2000: GDAL drivers by name, and `/vsi` paths."""

    allow_drivers: tuple[str, ...] = ()
    allow_vsi: bool = False

    @property
    def drivers(self) -> tuple[str, ...]:
        """Every driver that may open a file."""
        return tuple(dict.fromkeys((*SAFE_DRIVERS, *self.allow_drivers)))

    @property
    def options(self) -> dict[str, str]:
        """GDAL options that hold a reader to it: an allowed VRT may still not reach the network without `allow_vsi`."""
        if self.allow_vsi:  # a server that does not answer must not hold a job for ever
            return {"GDAL_HTTP_CONNECTTIMEOUT": "20", "GDAL_HTTP_TIMEOUT": "120"}
        return {"CPL_VSIL_CURL_ALLOWED_FILENAME": "/vsicurl/none"}


def find_source(source: str | Path, access: Access) -> Path | str:
    """A local file as a Path, or a name that only GDAL can resolve as a str: a `/vsi` path, or a subdataset of an allowed driver.

    Raises:
        ImageReadError: an address, a folder, nothing there, or a name that was not allowed; the message says what would allow it.
    """
    text = str(source)
    if text.startswith("/vsi"):
        if access.allow_vsi:
            return text
        raise ImageReadError(
            f"source must be a local file, got the address {text!r}; download it and pass the file's path, or allow it with "
            "allow_vsi=True (--allow-vsi)"
        )
    named = _SUBDATASET.match(text)
    if named and named.group(1).upper() in (driver.upper() for driver in access.allow_drivers):
        if not access.allow_vsi and ("/vsi" in text or "://" in text):
            raise ImageReadError(f"source {text!r} leads beyond local files; allow that with allow_vsi=True (--allow-vsi)")
        return text
    if _ADDRESS.match(text):
        raise ImageReadError(
            f"source must be a local file, got the address {text!r}; download it and pass the file's path, or write it as /vsicurl/... "
            "and allow that with allow_vsi=True (--allow-vsi)"
        )
    path = Path(source)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise ImageReadError(f"{path} cannot be opened ({error.strerror}); check the path and its permissions") from None
    if is_folder:
        if access.allow_drivers:
            return text  # some formats are folders
        raise ImageReadError(f"{path} is a folder, expected an image file; pass one of the files in it")
    if not is_file:
        raise ImageReadError(f"{path} does not exist; check the path")
    return path


def driver_of(head: bytes) -> str | None:
    """The self-contained raster format that a file begins like."""
    return next((driver for magic, driver in RASTER_MAGIC.items() if head.startswith(magic)), None)


def allowance(name: str, allowed: Sequence[str]) -> str:
    """What to add to a message about a file of an unknown format: the driver that its name points to, unless that is allowed."""
    driver = _USUAL_DRIVERS.get(Path(name).suffix.lower())
    if driver is None or driver in allowed:
        return ""
    return (
        f"; its name is one for GDAL's driver {driver}: if you trust it, read it with "
        f'allow_drivers=("{driver}",) (--allow-driver {driver})'
    )
