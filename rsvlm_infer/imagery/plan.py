"""Owns the decision which windows of a scene become tiles, at which length. Knows sizes and complexity, no pixels, no weights.

Pure and deterministic: the same scene size, complexity and config give the same plan on every run and machine.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from ..config import DrisConfig, RsvlmConfig, Tiling
from ..errors import ConfigError, InputError
from .anyres import best_resolution, fit_inside, kept_window
from .complexity import ComplexityMap

_DECIMALS = 9  # gains that differ only by rounding tie, and ties go by (depth, row, col)
_LONG = 1.5  # a window longer than 3:2 is halved across its length, not quartered


@dataclass(frozen=True)
class Window:
    """A rectangle of scene pixels."""

    row_off: int
    col_off: int
    height: int
    width: int


@dataclass(frozen=True)
class Tile(Window):
    """One crop for the vision encoder.

    The window (which LLaVA's square padding lets reach beyond the scene) is resampled to `canvas` (height, width) pixels, and
    the encoder gets the `grid` (rows, columns) of patches that begins at `crop` (y, x) on that canvas.
    """

    grid: tuple[int, int]
    depth: int
    complexity: float
    canvas: tuple[int, int]
    crop: tuple[int, int] = (0, 0)

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class TilePlan:
    """What was decided about one scene.

    `tiles[0]` is the base tile, the whole scene. In "dris", the leaves follow in raster order of their top-left corners, and
    leaves + `dropped` partition the scene. A plan with the base tile alone means that no split was worth it or none fitted:
    the whole scene is the single leaf, and the base tile is its encoding. `layout` is the anyres grid (rows, columns) of
    tiles, else (0, 0). `budget` reports what was used, the limits, and why splitting stopped.
    """

    scene_height: int
    scene_width: int
    tiling: Tiling
    tiles: tuple[Tile, ...]
    patch_size: int
    layout: tuple[int, int] = (0, 0)
    dropped: tuple[Window, ...] = ()
    budget: dict[str, int | str] = field(default_factory=dict)

    @property
    def num_patches(self) -> int:
        """S, patches of all tiles."""
        return sum(tile.num_patches for tile in self.tiles)

    @property
    def cu_seqlens(self) -> NDArray[np.int32]:
        """Patch offsets of the tiles, int32 [T + 1]."""
        return np.cumsum([0, *(tile.num_patches for tile in self.tiles)], dtype=np.int32)

    @property
    def grids(self) -> NDArray[np.int32]:
        """Patch rows and columns of the tiles, int32 [T, 2]."""
        return np.array([tile.grid for tile in self.tiles], dtype=np.int32)

    @property
    def boxes(self) -> NDArray[np.float32]:
        """The part of the scene that each tile shows, (cx, cy, w, h) as shares of the scene, float32 [T, 4]."""
        boxes = []
        for tile in self.tiles:
            y0, y1 = self._shown(tile, 0, tile.row_off, tile.height, self.scene_height)
            x0, x1 = self._shown(tile, 1, tile.col_off, tile.width, self.scene_width)
            boxes.append(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0))
        return np.array(boxes, dtype=np.float32)

    @property
    def scale(self) -> float:
        """Native pixels per encoded pixel, the mean over the scene's kept area; 1.0 = native detail everywhere.

        Each part of the scene counts with the tile that shows it best: its leaf or grid tile, or the base tile where the plan
        has no other. A tile's scale is that of its worse side and never below 1.0: enlarging adds no detail.
        """
        scales = self._scales()
        mean = sum(scale * area for scale, area in scales) / sum(area for _, area in scales)
        best, worst = self.scale_range
        return min(max(mean, best), worst)  # rounding must not leave the range

    @property
    def scale_range(self) -> tuple[float, float]:
        """`scale` of the best and of the worst resolved part of the scene."""
        scales = [scale for scale, _ in self._scales()]
        return min(scales), max(scales)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values: dict[str, Any] = _listed(dataclasses.asdict(self))
        return values | {"num_patches": self.num_patches}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TilePlan:
        """The reverse of `to_dict`."""
        given = {name: value for name, value in values.items() if name != "num_patches"}
        pairs = ("grid", "canvas", "crop")
        given["tiles"] = tuple(Tile(**{**tile, **{name: tuple(tile[name]) for name in pairs}}) for tile in values["tiles"])
        given["dropped"] = tuple(Window(**window) for window in values["dropped"])
        return cls(**{**given, "layout": tuple(values["layout"])})

    def _scales(self) -> list[tuple[float, int]]:
        """(native pixels per encoded pixel, native pixels) of each tile that represents a part of the scene."""
        return [
            (max(1.0, tile.height / tile.canvas[0], tile.width / tile.canvas[1]), tile.height * tile.width)
            for tile in self.tiles[1:] or self.tiles
        ]

    def _shown(self, tile: Tile, axis: int, offset: int, length: int, scene_side: int) -> tuple[float, float]:
        """Start and stop of a tile along one axis as shares of the scene, cut at the scene's rim."""
        scale = length / tile.canvas[axis]
        start = offset + tile.crop[axis] * scale
        stop = start + tile.grid[axis] * self.patch_size * scale
        return min(max(start / scene_side, 0.0), 1.0), min(max(stop / scene_side, 0.0), 1.0)


def plan_scene(
    height: int,
    width: int,
    config: RsvlmConfig,
    *,
    tiling: Tiling | None = None,
    complexity: ComplexityMap | None = None,
    relevance: NDArray[Any] | None = None,
) -> TilePlan:
    """Decides the tiles of a scene.

    Args:
        height, width: scene pixels.
        config: the model; `config.tiling`, `config.preprocess`, `config.grid_pinpoints` and `config.dris` matter here.
        tiling: instead of `config.tiling`.
        complexity: map of the scene, for "dris". None: every window is valid and of complexity 1 (the longest plan).
        relevance: real [h, w] in [0, 1] over the whole scene, for "dris": a window's gain is multiplied by the largest value
            inside it.

    Raises:
        InputError: sizes, tiling or relevance are out of this contract.
        ConfigError: the config cannot do this tiling, or its budget does not hold the base tile.
    """
    if height < 1 or width < 1:
        raise InputError(f"height and width must be at least 1, got {height} x {width}; pass the scene's size in pixels")
    tiling = config.tiling if tiling is None else tiling
    if tiling == "fixed":
        return TilePlan(height, width, tiling, (_fixed_tile(height, width, config),), config.vision.patch_size)
    if tiling == "anyres":
        return _plan_anyres(height, width, config)
    if tiling == "dris":
        if relevance is not None and (relevance.ndim != 2 or relevance.size == 0):
            raise InputError(f"relevance must be a non-empty array [h, w], got shape {list(relevance.shape)}; pass one map")
        return _plan_dris(height, width, config, complexity, relevance)
    raise InputError(f"tiling must be one of {list(get_args(Tiling))}, got {tiling!r}; choose one of them")


def count_tokens(plan: TilePlan, config: RsvlmConfig) -> int:
    """Visual tokens Nv that the language model gets for `plan`: the only source of placeholder counts."""
    if plan.tiling == "anyres":
        row_start, row_stop, col_start, col_stop = anyres_kept_window(plan, config)
        base = plan.tiles[0].num_patches // _patches_per_token(config)
        return base + (row_stop - row_start) * (col_stop - col_start + 1)  # one newline token after each row
    return plan.num_patches // _patches_per_token(config)


def anyres_kept_window(plan: TilePlan, config: RsvlmConfig) -> tuple[int, int, int, int]:
    """Tokens of the assembled anyres canvas that show the scene: row_start, row_stop, col_start, col_stop.

    The canvas has `layout` x (`config.tile_grid` / pixel_shuffle) tokens per side.
    """
    if plan.tiling != "anyres":
        raise InputError(f'plan.tiling must be "anyres", got "{plan.tiling}"; other plans have no canvas')
    side = config.tile_grid // (config.projector.pixel_shuffle if config.projector else 1)
    return kept_window(plan.scene_height, plan.scene_width, plan.layout[0] * side, plan.layout[1] * side)


def _patches_per_token(config: RsvlmConfig) -> int:
    return config.projector.pixel_shuffle**2 if config.projector else 1


def _fixed_tile(height: int, width: int, config: RsvlmConfig) -> Tile:
    """The single square tile of LLaVA-1.5 and CLIP, made as `preprocess.fit` says."""
    side, grid = config.preprocess.tile_px, (config.tile_grid, config.tile_grid)
    if config.preprocess.fit == "pad":  # LLaVA's expand2square
        square = max(height, width)
        return Tile(-((square - height) // 2), -((square - width) // 2), square, square, grid, 0, 1.0, (side, side))
    if config.preprocess.fit == "crop":  # CLIP: shortest edge to `side`, then the centre
        canvas = (int(side * height / width), side) if width <= height else (side, int(side * width / height))
        crop = ((canvas[0] - side) // 2, (canvas[1] - side) // 2)
        return Tile(0, 0, height, width, grid, 0, 1.0, canvas, crop)
    return Tile(0, 0, height, width, grid, 0, 1.0, (side, side))


def _plan_anyres(height: int, width: int, config: RsvlmConfig) -> TilePlan:
    side, grid = config.preprocess.tile_px, (config.tile_grid, config.tile_grid)
    bad = [pinpoint for pinpoint in config.grid_pinpoints if pinpoint[0] % side or pinpoint[1] % side or min(pinpoint) < side]
    if bad or not config.grid_pinpoints:
        raise ConfigError(
            f'tiling "anyres" needs grid_pinpoints (height, width) that are multiples of preprocess.tile_px {side}, '
            f'got {list(config.grid_pinpoints)}; fix config.json or use tiling "fixed" or "dris"'
        )
    target = best_resolution(height, width, config.grid_pinpoints)
    canvas = fit_inside(height, width, target)
    top, left = (target[0] - canvas[0]) // 2, (target[1] - canvas[1]) // 2
    layout = (target[0] // side, target[1] // side)
    tiles = [Tile(0, 0, height, width, grid, 0, 1.0, (side, side))]
    for row in range(layout[0]):
        for col in range(layout[1]):
            tiles.append(Tile(0, 0, height, width, grid, 1, 1.0, canvas, (row * side - top, col * side - left)))
    return TilePlan(height, width, "anyres", tuple(tiles), config.vision.patch_size, layout=layout)


def _plan_dris(
    height: int, width: int, config: RsvlmConfig, complexity: ComplexityMap | None, relevance: NDArray[Any] | None
) -> TilePlan:
    """Best-first quadtree. The order of splits does not depend on the budget, so a larger one refines."""
    dris, patch = config.dris, config.vision.patch_size
    complexity = None if complexity is None else complexity.scaled_to(height, width)
    per_token = _patches_per_token(config)
    side = config.tile_grid * patch
    c = 1.0 if complexity is None else complexity.window(0, 0, height, width)
    base = Tile(0, 0, height, width, (config.tile_grid, config.tile_grid), 0, c, (side, side))
    limits = {"tiles": dris.max_tiles, "patches": dris.max_patches, "visual_tokens": dris.max_visual_tokens}

    def usage(tiles: int, patches: int) -> dict[str, int]:
        return {"tiles": tiles, "patches": patches, "visual_tokens": patches // per_token}

    def exceeded(used: dict[str, int]) -> str | None:
        return next((f"max_{name}" for name, limit in limits.items() if used[name] > limit), None)

    tiles, patches = 1, base.num_patches
    if reason := exceeded(usage(tiles, patches)):
        raise ConfigError(
            f"dris.{reason} must hold the base tile ({patches} patches, {patches // per_token} visual tokens), "
            f"got {limits[reason.removeprefix('max_')]}; raise it or use a smaller preprocess.tile_px"
        )

    heap: list[tuple[float, int, int, int, Tile]] = []

    def offer(tile: Tile) -> None:
        unresolved = 1.0 - _resolved(tile.height, tile.canvas[0]) * _resolved(tile.width, tile.canvas[1])
        if unresolved > 0.0:
            weight = 1.0 if relevance is None else _largest(relevance, tile, height, width)
            gain = round(tile.complexity * unresolved * weight, _DECIMALS)
            heapq.heappush(heap, (-gain, tile.depth, tile.row_off, tile.col_off, tile))

    offer(base)
    leaves: set[Tile] = set()
    dropped: list[Window] = []
    stopped = "resolved"
    while heap:
        negative_gain, depth, _, _, leaf = heapq.heappop(heap)
        if -negative_gain < dris.min_gain:
            stopped = "min_gain"
            break
        if depth >= dris.max_depth:
            stopped = "max_depth"
            continue
        parts = _split(leaf)
        if complexity is None:
            kept = parts
        else:
            kept = [
                part
                for part in parts
                if complexity.valid_fraction(part.row_off, part.col_off, part.height, part.width) >= dris.min_valid_fraction
            ]
        children = [_leaf(part, depth + 1, dris, patch, complexity) for part in kept]
        own = (0, 0) if leaf is base else (1, leaf.num_patches)  # the base tile stays
        grown = (tiles - own[0] + len(children), patches - own[1] + sum(child.num_patches for child in children))
        if reason := exceeded(usage(*grown)):
            stopped = reason
            break
        tiles, patches = grown
        leaves.discard(leaf)
        leaves.update(children)
        dropped.extend(part for part in parts if part not in kept)
        for child in children:
            offer(child)

    ordered = sorted(leaves, key=lambda tile: (tile.row_off, tile.col_off))
    dropped.sort(key=lambda window: (window.row_off, window.col_off))
    report: dict[str, int | str] = dict(usage(tiles, patches))
    report |= {f"max_{name}": limit for name, limit in limits.items()} | {"stopped": stopped}
    return TilePlan(height, width, "dris", (base, *ordered), patch, dropped=tuple(dropped), budget=report)


def _leaf(window: Window, depth: int, dris: DrisConfig, patch: int, complexity: ComplexityMap | None) -> Tile:
    """A leaf whose length follows its complexity, but never finer than its native pixels need."""
    row, col, height, width = window.row_off, window.col_off, window.height, window.width
    c = 1.0 if complexity is None else complexity.window(row, col, height, width)
    chosen = dris.leaf_grids[sum(c >= threshold for threshold in dris.leaf_thresholds)]

    def needed(side: int) -> int:
        return next((grid for grid in dris.leaf_grids if grid >= chosen or grid * patch >= side), chosen)

    grid = (needed(height), needed(width))
    return Tile(row, col, height, width, grid, depth, c, (grid[0] * patch, grid[1] * patch))


def _split(window: Window) -> list[Window]:
    """2 x 2 parts, or 2 x 1 / 1 x 2 across the length of a window longer than 3:2, in raster order."""
    row_cuts = [0, window.height]
    col_cuts = [0, window.width]
    if window.width <= _LONG * window.height and window.height > 1:
        row_cuts.insert(1, (window.height + 1) // 2)
    if window.height <= _LONG * window.width and window.width > 1:
        col_cuts.insert(1, (window.width + 1) // 2)
    return [
        Window(window.row_off + top, window.col_off + left, bottom - top, right - left)
        for top, bottom in itertools.pairwise(row_cuts)
        for left, right in itertools.pairwise(col_cuts)
    ]


def _resolved(native: int, encoded: int) -> float:
    """Share of the native pixels along one side that the encoding keeps apart."""
    return min(1.0, encoded / native)


def _largest(relevance: NDArray[Any], window: Window, height: int, width: int) -> float:
    """Largest relevance under a window; cells are touched in exact integers."""
    rows, cols = relevance.shape
    top, bottom = window.row_off * rows // height, -(-(window.row_off + window.height) * rows // height)
    left, right = window.col_off * cols // width, -(-(window.col_off + window.width) * cols // width)
    return min(1.0, max(0.0, float(relevance[top:bottom, left:right].max())))


def _listed(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value
