"""Owns the reading of a plan's tiles and their packing into one array of patches. Knows no weights and no text.

Memory stays bounded: tiles are packed in chunks, and a raster of more than 33 Mpx is read at 2 to 3 times the resolution that
the encoder gets, not natively.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..config import RsvlmConfig
from ..errors import InputError
from ..ops.pack_tiles import RESAMPLES
from ..ops.registry import resolve
from .plan import Tile, TilePlan, count_tokens
from .source import Scene

EXACT_SCENE_PX = 1 << 25  # rasters up to 33 Mpx are read natively, so that their tiles equal the published processors'
EXACT_MEMORY_PX = 1 << 28  # images in memory cost no decoding; only square padding of a thin strip can exceed this
CANVAS_PX = 1 << 26  # largest canvas: 192 MiB
_CHUNK_BYTES = 1 << 26  # source pixels that wait for one call of pack_tiles


@dataclass(frozen=True, eq=False)
class PackedScene:
    """One scene, ready for the vision encoder.

    Attributes:
        patches: float32 [S, 3 * p * p], normalised; tiles in plan order, patches row-major, (channel, y, x) inside a patch;
            [0, 3 * p * p] where only the rest is needed, because the vision encoder has seen them.
        cu_seqlens: int32 [T + 1], patch offsets of the tiles.
        grids: int32 [T, 2], patch rows and columns of the tiles.
        boxes: float32 [T, 4], (cx, cy, w, h) of the tiles as shares of the scene.
        plan: what was packed.
        num_tokens: visual tokens that the language model gets.
        scene: name, height, width, gsd_native_m, gsd_effective_m (metres per encoded pixel, the mean over the scene as
            `TilePlan.scale` has it; None when the source does not say).
    """

    patches: NDArray[np.float32]
    cu_seqlens: NDArray[np.int32]
    grids: NDArray[np.int32]
    boxes: NDArray[np.float32]
    plan: TilePlan
    num_tokens: int
    scene: dict[str, Any]


def pack_scene(scene: Scene, plan: TilePlan, config: RsvlmConfig, implementation: str = "auto") -> PackedScene:
    """Reads every tile of `plan` from `scene` and packs it.

    Rasters up to 33 Mpx and all images in memory are read natively, so each tile is resampled exactly as the published image
    processors do it. Of larger rasters, a tile is first reduced by area means to at least twice its canvas; where the whole
    scene at the finest of these reductions has at most 33 Mpx it is read once for all tiles, whose rims are then rounded to
    its pixels (half a pixel at most, a quarter of an encoded one).

    Args:
        implementation: of the op `pack_tiles`: "auto", "eager" or "native".

    Raises:
        InputError: the plan is not of this scene, or its canvas is too large (very thin scenes with fit "crop").
        ImageReadError: the scene cannot be decoded.
    """
    if (plan.scene_height, plan.scene_width) != (scene.height, scene.width):
        raise InputError(
            f"plan must be made for this scene of {scene.height} x {scene.width} px, got one for {plan.scene_height} x "
            f"{plan.scene_width}; call plan_scene with the scene's size"
        )
    pack_tiles = resolve("pack_tiles", implementation)
    preprocess, patch = config.preprocess, config.vision.patch_size
    fill = (0, 0, 0) if plan.tiling == "anyres" else preprocess.pad_value  # LLaVA-NeXT pads with raw zeros
    offsets = plan.cu_seqlens
    patches = np.empty((int(offsets[-1]), 3 * patch * patch), dtype=np.float32)  # [S, 3*p*p]

    reduced = _read_once(scene, plan)
    images: list[NDArray[np.uint8]] = []
    start = 0

    def flush(stop: int) -> None:
        tiles = plan.tiles[start:stop]
        patches[offsets[start] : offsets[stop]] = pack_tiles(
            images,
            np.array([tile.canvas for tile in tiles], dtype=np.int64),
            np.array([tile.crop for tile in tiles], dtype=np.int64),
            np.array([tile.grid for tile in tiles], dtype=np.int64),
            patch,
            preprocess.mean,
            preprocess.std,
            preprocess.resample,
            fill,
        )
        images.clear()

    for index, tile in enumerate(plan.tiles):
        if tile.canvas[0] * tile.canvas[1] > CANVAS_PX:
            raise InputError(
                f"scene {scene.name} of {scene.height} x {scene.width} px is too thin for a canvas of {tile.canvas[0]} x "
                f'{tile.canvas[1]} px; use tiling "dris", or cut the scene'
            )
        if index > 0 and _same_source(tile, plan.tiles[index - 1]):
            images.append(images[-1])  # anyres: all tiles but the base are cut from one canvas
        else:
            if sum(image.nbytes for image in images) > _CHUNK_BYTES:
                flush(index)
                start = index
            pixels = _read_tile(scene, reduced, tile, preprocess.pad_value)
            if index + 1 < len(plan.tiles) and _same_source(tile, plan.tiles[index + 1]):
                pixels = _resized(pixels, tile.canvas, preprocess.resample)  # once for all of them
            images.append(pixels)
    flush(len(plan.tiles))

    return dataclasses.replace(without_patches(plan, config, scene.name, scene.gsd_native_m), patches=patches)


def without_patches(plan: TilePlan, config: RsvlmConfig, name: str, gsd_native_m: float | None) -> PackedScene:
    """What `pack_scene` says of a plan, without reading anything: for a scene whose taps were kept."""
    return PackedScene(
        patches=np.zeros((0, 3 * plan.patch_size**2), np.float32),
        cu_seqlens=plan.cu_seqlens,
        grids=plan.grids,
        boxes=plan.boxes,
        plan=plan,
        num_tokens=count_tokens(plan, config),
        scene={
            "name": name,
            "height": plan.scene_height,
            "width": plan.scene_width,
            "gsd_native_m": gsd_native_m,
            "gsd_effective_m": None if gsd_native_m is None else gsd_native_m * plan.scale,
        },
    )


def _same_source(tile: Tile, other: Tile) -> bool:
    """Whether two tiles are crops of the same canvas of the same window."""
    corner = (tile.row_off, tile.col_off, tile.height, tile.width, tile.canvas)
    return corner == (other.row_off, other.col_off, other.height, other.width, other.canvas)


@dataclass(frozen=True, eq=False)
class _Reduced:
    """The whole scene with `reduction` native pixels per pixel and side: uint8 [h, w, 3].

    cells: its pixels are squares of exactly so many native ones, the last of a row or column cut; else they divide the scene evenly.
    """

    rgb: NDArray[np.uint8]
    reduction: float
    cells: bool

    def window(self, scene: Scene, top: int, left: int, bottom: int, right: int) -> NDArray[np.uint8]:
        """A native rectangle, its rims rounded to pixels of this copy, at least one of them."""
        y0, y1 = self._span(top, bottom, scene.height, self.rgb.shape[0])
        x0, x1 = self._span(left, right, scene.width, self.rgb.shape[1])
        return self.rgb[y0:y1, x0:x1]

    def _span(self, start: int, stop: int, native: int, out: int) -> tuple[int, int]:
        scale = 1 / self.reduction if self.cells else out / native
        first = min(round(start * scale), out - 1)
        return first, max(first + 1, out if stop == native else round(stop * scale))


def _read_once(scene: Scene, plan: TilePlan) -> _Reduced | None:
    """The whole scene reduced as far as its finest tile allows, or its coarse copy; None where reading by windows is better.

    Leaves lie side by side, so windows of a striped file without overviews would decode the same rows again and again.
    """
    if (copy := scene.coarse) is not None:
        return _Reduced(*copy, cells=True)
    reduction = min(_reduction(scene, tile) for tile in plan.tiles)
    height, width = math.ceil(scene.height / reduction), math.ceil(scene.width / reduction)
    if reduction == 1 or height * width > EXACT_SCENE_PX:
        return None
    rgb, _ = scene.read(0, 0, scene.height, scene.width, height, width)
    return _Reduced(rgb, max(scene.height / height, scene.width / width), cells=False)


def _read_tile(scene: Scene, reduced: _Reduced | None, tile: Tile, pad_value: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The tile's window, native or reduced, padded where it reaches beyond the scene: uint8 [h, w, 3]."""
    top, bottom = max(tile.row_off, 0), min(tile.row_off + tile.height, scene.height)
    left, right = max(tile.col_off, 0), min(tile.col_off + tile.width, scene.width)
    reduction: float = _reduction(scene, tile)
    if reduced is not None and (not reduced.cells or reduced.reduction <= reduction):
        rgb, reduction = reduced.window(scene, top, left, bottom, right), reduced.reduction
    else:
        height, width = bottom - top, right - left
        rgb, _ = scene.read(top, left, height, width, math.ceil(height / reduction), math.ceil(width / reduction))
    above, below = round((top - tile.row_off) / reduction), round((tile.row_off + tile.height - bottom) / reduction)
    before, after = round((left - tile.col_off) / reduction), round((tile.col_off + tile.width - right) / reduction)
    if not (above or below or before or after):
        return rgb
    padded = np.empty((above + rgb.shape[0] + below, before + rgb.shape[1] + after, 3), dtype=np.uint8)
    padded[:] = np.asarray(pad_value, dtype=np.uint8)
    padded[above : above + rgb.shape[0], before : before + rgb.shape[1]] = rgb
    return padded


def _reduction(scene: Scene, tile: Tile) -> int:
    """Native pixels per read pixel along each side; 1 = native."""
    limit = EXACT_MEMORY_PX if scene.in_memory else EXACT_SCENE_PX
    if max(scene.height * scene.width, tile.height * tile.width) <= limit:
        return 1
    return max(1, min(tile.height // tile.canvas[0], tile.width // tile.canvas[1]) // 2)


def _resized(pixels: NDArray[np.uint8], canvas: tuple[int, int], resample: str) -> NDArray[np.uint8]:
    image = Image.fromarray(pixels).resize((canvas[1], canvas[0]), RESAMPLES[resample])
    return np.asarray(image)
