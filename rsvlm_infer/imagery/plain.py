"""Owns plain images through Pillow: opening them within a limit on pixels, and their upright pixels. Knows no raster and no scene."""

from __future__ import annotations

import io
import logging
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import ImageReadError

_STRIP_PX = 1 << 23  # pixels that one step of the decoding copies
_log = logging.getLogger(__name__)
_pillow_limit = threading.Lock()  # Pillow keeps its bomb limit in a module global
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP")  # JPEG opens MPO too; all that Pillow knows would run Ghostscript
_GEO_TAGS = (33550, 33922, 34264, 34735)


def open_plain(source: Path | bytes, name: str, max_pixels: int) -> Image.Image:
    """Opens the header only. Pillow's own limit steps aside while ours is checked, because ours can be raised."""
    stream: Path | io.BytesIO = source if isinstance(source, Path) else io.BytesIO(source)
    with _pillow_limit, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(stream, formats=_FORMATS)
        except MemoryError:
            raise
        except Exception as error:
            raise _unreadable(name, error) from None
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    if image.width * image.height > max_pixels:
        image.close()
        raise ImageReadError(
            f"{name} has {image.height * image.width:,} pixels, more than max_pixels={max_pixels:,}; "
            "if you trust it raise max_pixels, or save it as a tiled GeoTIFF, which is read by windows"
        )
    return image


def decode_plain(image: Image.Image, name: str, max_pixels: int) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Pixels as `_decode` gives them.

    Raises:
        ImageReadError: more pixels than the limit, or an image that cannot be decoded.
    """
    if image.width * image.height > max_pixels:
        raise ImageReadError(
            f"{name} has {image.height * image.width:,} pixels, more than max_pixels={max_pixels:,}; raise max_pixels"
        )
    try:
        pixels, mask = _decode(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, zlib.error ...
        raise _unreadable(name, error) from None
    if image.format == "TIFF" and any(tag in getattr(image, "tag_v2", {}) for tag in _GEO_TAGS):
        _log.info("%s: its georeference is not read without rasterio; pip install 'rsvlm-infer[geo]'", name)
    return pixels, mask


def _decode(image: Image.Image) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Upright pixels, uint8 [H, W] or [H, W, 3] or a wider grey [H, W], and the mask of its transparency (None = all valid)."""
    image.load()
    upright = ImageOps.exif_transpose(image) if _orientation(image) != 1 else image
    transparency = upright.info.get("transparency")
    mask: NDArray[np.bool_] | None = None
    if upright.mode.startswith(("I", "F")):
        wide = np.asarray(upright)
        return wide, wide != transparency if isinstance(transparency, int) else None
    if upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or transparency is not None:
        mode = "LA" if upright.mode == "LA" else "RGBA"
        upright = upright.convert(mode)
        mask = np.asarray(upright.getchannel("A")) > 0
    mode = "L" if upright.mode in ("1", "L", "LA") else "RGB"
    upright = upright if upright.mode == mode else upright.convert(mode)
    out = np.empty((upright.height, upright.width) + ((3,) if mode == "RGB" else ()), dtype=np.uint8)
    rows = max(1, _STRIP_PX // upright.width)
    for start in range(0, upright.height, rows):  # one np.asarray of the whole would hold three copies
        stop = min(upright.height, start + rows)
        out[start:stop] = np.asarray(upright.crop((0, start, upright.width, stop)))
    return out, mask


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation 1..8; 1 when the EXIF block is damaged, because the pixels are not."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception as error:
        _log.info("EXIF ignored, it cannot be read (%s)", error)
        return 1


def _unreadable(name: str, error: Exception) -> ImageReadError:
    if isinstance(error, UnidentifiedImageError):
        reason = "not a JPEG, PNG, WebP, TIFF, GIF or BMP image"
    else:
        reason = " ".join(str(error).split()) or type(error).__name__
    return ImageReadError(f"{name} cannot be read as an image ({reason}); restore the file or convert it to PNG or GeoTIFF")
