"""Owns the way from an image source to packed patches, with the times it took and what was lost. Knows no model, only its config."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import RsvlmConfig, Tiling
from ..errors import InputError
from ..imagery.complexity import ComplexityMap
from ..imagery.pack import PackedScene, pack_scene
from ..imagery.plan import TilePlan, count_tokens, plan_scene
from ..imagery.source import DEFAULT_MAX_PIXELS, Scene, open_scene
from .retrieve import relevance_map

COARSE_DEPTH = 2  # a coarse pass of at most 4 x 4 leaves tells where a query points, at a small share of the cost
SCALED_DOWN = 1.01  # native pixels per encoded pixel from which a scene counts as scaled down; below it is rounding

RegionScores = Callable[[PackedScene], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class SceneSettings:
    """How to read and plan one image; None keeps the checkpoint's own value.

    bands: 1-based, three of them or one · max_pixels: decompression-bomb limit · max_tiles, max_visual_tokens: budget.

    Raises:
        InputError: any value out of its range.
    """

    bands: tuple[int, ...] | None = None
    max_pixels: int | None = None
    tiling: Tiling | None = None
    max_tiles: int | None = None
    max_visual_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.bands is not None:
            object.__setattr__(self, "bands", tuple(self.bands))
        if self.tiling not in (None, "fixed", "anyres", "dris"):
            raise InputError(f'tiling must be "fixed", "anyres" or "dris", got {self.tiling!r}; choose one of them')
        for name in ("max_pixels", "max_tiles", "max_visual_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}; raise it")

    def apply(self, config: RsvlmConfig) -> RsvlmConfig:
        """The config that plans this image.

        Raises:
            InputError: anyres tiling on a checkpoint that was not made for it.
        """
        if self.tiling == "anyres" and config.tiling != "anyres":
            raise InputError(
                f'tiling "anyres" needs a LLaVA-NeXT checkpoint with grid_pinpoints, this one is made for "{config.tiling}"; '
                'use "fixed" or "dris"'
            )
        budgets = {name: getattr(self, name) for name in ("max_tiles", "max_visual_tokens")}
        dris = dataclasses.replace(config.dris, **{name: value for name, value in budgets.items() if value is not None})
        return dataclasses.replace(config, tiling=self.tiling or config.tiling, dris=dris)


@dataclass(frozen=True)
class ScenePlan:
    """What DRIS decided about one image, what that loses, and what it took."""

    source: str
    plan: TilePlan
    num_tokens: int
    read_ms: float
    plan_ms: float
    gsd_native_m: float | None
    gsd_effective_m: float | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = {
            item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name not in ("plan", "warnings")
        }
        return values | {"warnings": list(self.warnings), "plan": self.plan.to_dict()}


@dataclass(frozen=True)
class PreparedScene(ScenePlan):
    """A planned image, ready for the vision encoder."""

    packed: PackedScene
    preprocess_ms: float


def source_name(source: Any) -> str:
    """What to call an image source in reports."""
    if isinstance(source, (bytes, bytearray)):
        return "<bytes>"
    if isinstance(source, np.ndarray):
        return "<array>"
    if isinstance(source, str) or hasattr(source, "__fspath__"):
        return str(source)
    return str(getattr(source, "filename", "") or getattr(source, "name", "") or f"<{type(source).__name__}>")


def plan_image(source: Any, config: RsvlmConfig, settings: SceneSettings) -> ScenePlan:
    """Plans one image without encoding it; needs no weights.

    Raises:
        ImageReadError: the image cannot be read. InputError: settings that do not fit the checkpoint.
    """
    config = settings.apply(config)
    started = time.perf_counter()
    with _open(source, settings) as scene:
        planner = _Planner(scene, config, settings)
        return planner.report(source_name(source), started)


def prepare_scene(
    source: Any, config: RsvlmConfig, settings: SceneSettings, region_scores: RegionScores | None = None
) -> PreparedScene:
    """Reads, plans and packs one image.

    region_scores: scores of a packed coarse plan's tiles against a query, [T]; when given and tiling is dris, the image is
    planned twice, and the second plan refines where the query points.

    Raises:
        ImageReadError: the image cannot be read. InputError: settings that do not fit the checkpoint.
    """
    config = settings.apply(config)
    started = time.perf_counter()
    with _open(source, settings) as scene:
        report = _Planner(scene, config, settings, region_scores).report(source_name(source), started)
        packing = time.perf_counter()
        packed = pack_scene(scene, report.plan, config)
        preprocess_ms = (time.perf_counter() - packing) * 1e3
    values = {item.name: getattr(report, item.name) for item in dataclasses.fields(report)}
    return PreparedScene(**values, packed=packed, preprocess_ms=preprocess_ms)


def _open(source: Any, settings: SceneSettings) -> Scene:
    return open_scene(source, bands=settings.bands, max_pixels=settings.max_pixels or DEFAULT_MAX_PIXELS)


class _Planner:
    """The planning of one open scene; the overview is read once, also for a query-aware second plan."""

    def __init__(
        self, scene: Scene, config: RsvlmConfig, settings: SceneSettings, region_scores: RegionScores | None = None
    ) -> None:
        self.scene = scene
        self.config = config
        self.settings = settings
        self.region_scores = region_scores

    def report(self, source: str, started: float) -> ScenePlan:
        scene, config = self.scene, self.config
        overview = scene.overview() if config.tiling == "dris" else None
        read_ms = (time.perf_counter() - started) * 1e3

        started = time.perf_counter()
        complexity = None if overview is None else ComplexityMap(*overview, config=config.dris)
        relevance = None if complexity is None or self.region_scores is None else self._relevance(complexity)
        plan = plan_scene(scene.height, scene.width, config, complexity=complexity, relevance=relevance)
        num_tokens = count_tokens(plan, config)
        plan_ms = (time.perf_counter() - started) * 1e3

        limit = self.settings.max_visual_tokens
        if limit is not None and num_tokens > limit:
            raise InputError(
                f'max_visual_tokens must be at least {num_tokens} with tiling "{config.tiling}", got {limit}; raise it or use '
                'tiling "dris"'
            )
        scale = plan.scale
        native = scene.gsd_native_m
        effective = None if native is None else native * scale
        return ScenePlan(
            source, plan, num_tokens, read_ms, plan_ms, native, effective, scale_warnings(scale, native, config.tiling)
        )

    def _relevance(self, complexity: ComplexityMap) -> npt.NDArray[np.float32] | None:
        """A coarse pass, or None when it does not divide the scene."""
        scene = self.scene
        dris = dataclasses.replace(self.config.dris, max_depth=min(COARSE_DEPTH, self.config.dris.max_depth))
        config = dataclasses.replace(self.config, dris=dris)
        plan = plan_scene(scene.height, scene.width, config, complexity=complexity)
        if len(plan.tiles) < 3 or self.region_scores is None:
            return None
        packed = pack_scene(scene, plan, config)
        return relevance_map(packed.boxes, self.region_scores(packed), scene.height, scene.width)


def scale_warnings(scale: float, gsd_native_m: float | None, tiling: Tiling) -> tuple[str, ...]:
    """Says so when even the finest tile lost native detail."""
    if scale <= SCALED_DOWN:
        return ()
    advice = "raise max_tiles and max_visual_tokens" if tiling == "dris" else 'use tiling "dris"'
    if gsd_native_m is None:
        return (f"scene was scaled down {scale:.2f} times, so details smaller than that are lost; {advice} to keep more",)
    return (
        f"scene was scaled down: effective ground sampling distance {gsd_native_m * scale:.3g} m is coarser than the native "
        f"{gsd_native_m:.3g} m; {advice} to keep more",
    )
