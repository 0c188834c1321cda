"""Owns the definition of pack_tiles: uint8 tiles -> normalised patches. Knows no scenes, plans or files.

Pillow's `Image.resize` is the definition of the resampling, because every published checkpoint was trained through it.
Another implementation must give the same uint8 canvas, in the pass order of the installed Pillow (`vertical_first`);
the normalisation may differ by TOLERANCE (float32 rounding order).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from ..errors import InputError

TOLERANCE = 1e-6  # absolute, on normalised values of order 1: a few float32 roundings
RESAMPLES = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR, "lanczos": Image.Resampling.LANCZOS}
MAX_SIDE = 1 << 24  # beyond this Pillow's float32 box is not exact
_PILLOW = tuple(int(part) for part in PIL.__version__.split(".")[:2])


def check_pack_tiles(
    images: Sequence[NDArray[np.uint8]],
    canvases: ArrayLike,
    crops: ArrayLike,
    grids: ArrayLike,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    resample: str,
    fill: Sequence[int],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The contract of `pack_tiles`, checked once. Returns (canvases, crops, grids) as int64 [T, 2]; raises InputError."""
    for index, image in enumerate(images):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape) < 1:
            raise InputError(
                f"images[{index}] must be a non-empty uint8 array [h, w, 3], got {image.dtype} {list(image.shape)}; "
                "convert it to RGB first"
            )
    canvas_pairs, crop_pairs, grid_pairs = (
        _pairs(name, value, len(images)) for name, value in (("canvases", canvases), ("crops", crops), ("grids", grids))
    )
    for name, pairs in (("canvases", canvas_pairs), ("grids", grid_pairs)):
        if pairs.size and pairs.min() < 1:
            raise InputError(f"{name} must be at least 1 in height and width, got {pairs.min()}; check the plan's tiles")
    if patch < 1:
        raise InputError(f"patch must be at least 1 pixel, got {patch}; pass the vision encoder's patch_size")
    largest = max(int(canvas_pairs.max(initial=1)), int(abs(crop_pairs).max(initial=0)), int(grid_pairs.max(initial=1)) * patch)
    if largest > MAX_SIDE:
        raise InputError(
            f"canvases, crops and grids * patch must stay below {MAX_SIDE} pixels, got {largest}; cut smaller tiles"
        )
    for name, numbers in (("mean", mean), ("std", std), ("fill", fill)):
        if len(numbers) != 3:
            raise InputError(f"{name} must hold 3 numbers (R, G, B), got {len(numbers)}; check preprocess in config.json")
    if min(std) <= 0:
        raise InputError(f"std must be positive, got {tuple(std)}; check preprocess.std in config.json")
    if min(fill) < 0 or max(fill) > 255:
        raise InputError(f"fill must be in 0..255, got {tuple(fill)}; check preprocess.pad_value in config.json")
    if resample not in RESAMPLES:
        raise InputError(
            f"resample must be one of {sorted(RESAMPLES)}, got {resample!r}; check preprocess.resample in config.json"
        )
    return canvas_pairs, crop_pairs, grid_pairs


def vertical_first(shape: Sequence[int], canvas: Sequence[int]) -> bool:
    """Whether the installed Pillow resamples (height, width) -> canvas vertically first.

    The first pass rounds to 8 bits, so the order shows in the last bit. Up to Pillow 12.2 it was always horizontal first;
    12.3 turned it round for images a hundred times taller than wide, 13 when the height shrinks much more than the width.
    """
    height, width = shape[:2]
    if _PILLOW >= (13, 0):
        return height - canvas[0] > max(0, 2 * (width - canvas[1]))
    return _PILLOW >= (12, 3) and height > 100 * width and canvas[0] < height


def pack_tiles(
    images: Sequence[NDArray[np.uint8]],
    canvases: ArrayLike,
    crops: ArrayLike,
    grids: ArrayLike,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    resample: str,
    fill: Sequence[int],
) -> NDArray[np.float32]:
    """Resamples each tile like Pillow, crops or pads it, normalises it and cuts it into patches.

    Args:
        images: T arrays uint8 [h, w, 3].
        canvases: int [T, 2], (height, width) in pixels that image t is resampled to.
        crops: int [T, 2], (y, x) of the crop's corner on the canvas; may be negative or reach beyond, that part is `fill`.
        grids: int [T, 2], (gh, gw) patches; the crop is gh * patch by gw * patch pixels.
        patch: side of a patch in pixels.
        mean: 3 means of the values x / 255.
        std: 3 standard deviations of the values x / 255.
        resample: "bicubic", "bilinear" or "lanczos", all antialiased.
        fill: 3 grey levels 0..255 outside the canvas.

    Returns:
        float32 [S, 3 * patch * patch], S = sum of gh * gw; tiles in order, patches row-major inside a tile, (channel, y, x)
        inside a patch, which is the flattened layout of a Conv2d weight.

    Raises:
        InputError: an argument is out of this contract.
    """
    canvases, crops, grids = check_pack_tiles(images, canvases, crops, grids, patch, mean, std, resample, fill)
    table = normalisation_table(mean, std)  # [3, 256]
    patches = np.empty((int((grids[:, 0] * grids[:, 1]).sum()), 3 * patch * patch), dtype=np.float32)  # [S, 3*p*p]
    start = 0
    for image, canvas, crop, (gh, gw) in zip(images, canvases.tolist(), crops.tolist(), grids.tolist(), strict=True):
        pixels = _crop(_resize(image, canvas, resample), crop, (gh * patch, gw * patch), fill)  # [gh*p, gw*p, 3]
        cut = pixels.reshape(gh, patch, gw, patch, 3).transpose(0, 2, 4, 1, 3)  # [gh, gw, 3, p, p]
        target = patches[start : start + gh * gw].reshape(gh, gw, 3, patch, patch)
        for channel in range(3):
            target[:, :, channel] = table[channel][cut[:, :, channel]]
        start += gh * gw
    return patches


def normalisation_table(mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """(x / 255 - mean) / std for every grey level x, in float32 like the reference processors: [3, 256]."""
    levels = np.arange(256, dtype=np.float32) / np.float32(255.0)
    table: NDArray[np.float32] = (levels[None] - np.asarray(mean, np.float32)[:, None]) / np.asarray(std, np.float32)[:, None]
    return table


def _pairs(name: str, value: ArrayLike, count: int) -> NDArray[np.int64]:
    array = np.asarray(value)
    if array.size == 0 and count == 0:
        return np.zeros((0, 2), dtype=np.int64)
    if array.shape != (count, 2) or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"{name} must be an integer array [T, 2] with one row per image (T = {count}), got {array.dtype} {list(array.shape)}; "
            "pass one (height, width) pair per tile"
        )
    return np.ascontiguousarray(array, dtype=np.int64)


def _resize(image: NDArray[np.uint8], canvas: Sequence[int], resample: str) -> NDArray[np.uint8]:
    """uint8 [h, w, 3] -> uint8 [canvas height, canvas width, 3]."""
    if image.shape[:2] == tuple(canvas):
        return image
    resized: Any = Image.fromarray(np.ascontiguousarray(image)).resize((canvas[1], canvas[0]), RESAMPLES[resample])
    return np.asarray(resized)


def _crop(pixels: NDArray[np.uint8], corner: Sequence[int], shape: tuple[int, int], fill: Sequence[int]) -> NDArray[np.uint8]:
    """The rectangle of `shape` at `corner` (y, x); what lies outside of `pixels` is `fill`."""
    height, width = pixels.shape[:2]
    y0, x0 = corner
    y1, x1 = y0 + shape[0], x0 + shape[1]
    if y0 >= 0 and x0 >= 0 and y1 <= height and x1 <= width:
        return pixels[y0:y1, x0:x1]
    out = np.empty((*shape, 3), dtype=np.uint8)
    out[:] = np.asarray(fill, dtype=np.uint8)
    top, left, bottom, right = max(y0, 0), max(x0, 0), min(y1, height), min(x1, width)
    if top < bottom and left < right:
        out[top - y0 : bottom - y0, left - x0 : right - x0] = pixels[top:bottom, left:right]
    return out
