"""Owns the way from an image source to packed patches, with the times it took and what was lost. Knows no model, only its config."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import RsvlmConfig, Tiling
from ..engine.checks import check_integer, check_integers
from ..errors import ImageReadError, InputError
from ..imagery.complexity import ComplexityMap
from ..imagery.pack import PackedScene, pack_scene
from ..imagery.plan import TilePlan, count_tokens, plan_scene
from ..imagery.source import DEFAULT_MAX_PIXELS, Scene, open_scene, within_memory
from .retrieve import relevance_map

COARSE_DEPTH = 2  # a coarse pass of at most 4 x 4 leaves tells where a query points, at a small share of the cost
SCALED_DOWN = 1.01  # native pixels per encoded pixel from which a scene counts as scaled down; below it is rounding

BUDGETS = ("max_tiles", "max_visual_tokens")

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
            object.__setattr__(self, "bands", check_integers("bands", self.bands, "bands=(3, 2, 1)"))
        if self.tiling not in (None, "fixed", "anyres", "dris"):
            raise InputError(f'tiling must be "fixed", "anyres" or "dris", got {self.tiling!r}; choose one of them')
        for name in ("max_pixels", "max_tiles", "max_visual_tokens"):
            value = getattr(self, name)
            if value is None:
                continue
            check_integer(name, value)
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}; raise it")

    def apply(self, config: RsvlmConfig) -> RsvlmConfig:
        """The config that plans this image.

        Raises:
            InputError: anyres tiling on a checkpoint that was not made for it.
        """
        if self.tiling == "anyres" and not config.grid_pinpoints:
            raise InputError(
                f'tiling "anyres" needs a checkpoint with grid_pinpoints, this one is made for "{config.tiling}"; '
                'use "fixed" or "dris"'
            )
        budgets = {name: getattr(self, name) for name in BUDGETS}
        dris = dataclasses.replace(config.dris, **{name: value for name, value in budgets.items() if value is not None})
        return dataclasses.replace(config, tiling=self.tiling or config.tiling, dris=dris)


@dataclass(frozen=True)
class ScenePlan:
    """What DRIS decided about one image, what that loses, and what it took.

    gsd_native_m, gsd_effective_m: ground metres per native pixel and per encoded pixel, the latter the mean over the scene
    (`TilePlan.scale`); None when the source does not say. valid_share: of the scene's area, as its overview shows it.
    """

    source: str
    plan: TilePlan
    num_tokens: int
    read_ms: float
    plan_ms: float
    gsd_native_m: float | None
    gsd_effective_m: float | None
    warnings: tuple[str, ...]
    valid_share: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = {
            item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name not in ("plan", "warnings")
        }
        return values | {"warnings": list(self.warnings), "plan": self.plan.to_dict()}


@dataclass(frozen=True)
class PreparedScene(ScenePlan):
    """A planned image, ready for the vision encoder."""

    packed: PackedScene = field(kw_only=True)
    preprocess_ms: float = field(kw_only=True)


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
        ImageReadError: the image cannot be read or has no valid pixel. InputError: settings that do not fit the checkpoint.
    """
    planned = settings.apply(config)
    started = time.perf_counter()
    with _open(source, settings) as scene:
        return _Planner(scene, planned, config, settings).report(source_name(source), started)


def prepare_scene(
    source: Any, config: RsvlmConfig, settings: SceneSettings, region_scores: RegionScores | None = None
) -> PreparedScene:
    """Reads, plans and packs one image.

    region_scores: scores of a packed coarse plan's tiles against a query, [T]; when given and tiling is dris, the image is
    planned twice, and the second plan refines where the query points.

    Raises:
        ImageReadError: the image cannot be read or has no valid pixel. InputError: settings that do not fit the checkpoint.
    """
    settings.apply(config)  # refused before anything is opened
    started = time.perf_counter()
    with _open(source, settings) as scene:
        return prepare_opened(scene, source_name(source), config, settings, region_scores, started)


def prepare_opened(
    scene: Scene,
    source: str,
    config: RsvlmConfig,
    settings: SceneSettings,
    region_scores: RegionScores | None = None,
    started: float | None = None,
) -> PreparedScene:
    """`prepare_scene` for a scene that is open and stays so; its bands and its limit on pixels were chosen when it was opened.

    source: what reports call it. started: when the reading began, by perf_counter; default now.
    """
    started = time.perf_counter() if started is None else started
    planned = settings.apply(config)
    report = _Planner(scene, planned, config, settings, region_scores).report(source, started)
    packing = time.perf_counter()
    packed = _pack(scene, report.plan, planned)
    preprocess_ms = (time.perf_counter() - packing) * 1e3
    values = {item.name: getattr(report, item.name) for item in dataclasses.fields(report)}
    return PreparedScene(**values, packed=packed, preprocess_ms=preprocess_ms)


def _open(source: Any, settings: SceneSettings) -> Scene:
    return open_scene(source, bands=settings.bands, max_pixels=settings.max_pixels or DEFAULT_MAX_PIXELS)


def _pack(scene: Scene, plan: TilePlan, config: RsvlmConfig) -> PackedScene:
    with within_memory(scene.name):
        return pack_scene(scene, plan, config)


class _Planner:
    """The planning of one open scene; the overview is read once, also for a query-aware second plan."""

    def __init__(
        self,
        scene: Scene,
        config: RsvlmConfig,
        checkpoint: RsvlmConfig,
        settings: SceneSettings,
        region_scores: RegionScores | None = None,
    ) -> None:
        """config: the checkpoint's with `settings` applied."""
        self.scene = scene
        self.config = config
        self.checkpoint = checkpoint
        self.settings = settings
        self.region_scores = region_scores

    def report(self, source: str, started: float) -> ScenePlan:
        scene, config = self.scene, self.config
        overview = None
        if config.tiling == "dris" or not scene.all_valid:
            with within_memory(scene.name):
                overview = scene.overview()
        warnings = () if overview is None else validity_warnings(scene.name, overview[1], config.dris.min_valid_fraction)
        read_ms = (time.perf_counter() - started) * 1e3

        started = time.perf_counter()
        complexity = None
        if overview is not None and config.tiling == "dris":
            complexity = ComplexityMap(*overview, config=config.dris)
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
        native = scene.gsd_native_m
        effective = None if native is None else native * plan.scale
        warnings += budget_warnings(self.settings, self.checkpoint)
        warnings += scale_warnings(plan, native, self.checkpoint)
        valid_share = 1.0 if overview is None else float(overview[1].mean())
        return ScenePlan(source, plan, num_tokens, read_ms, plan_ms, native, effective, warnings, valid_share)

    def _relevance(self, complexity: ComplexityMap) -> npt.NDArray[np.float32] | None:
        """A coarse pass, or None when it does not divide the scene."""
        scene = self.scene
        dris = dataclasses.replace(self.config.dris, max_depth=min(COARSE_DEPTH, self.config.dris.max_depth))
        config = dataclasses.replace(self.config, dris=dris)
        plan = plan_scene(scene.height, scene.width, config, complexity=complexity)
        if len(plan.tiles) < 3 or self.region_scores is None:
            return None
        packed = _pack(scene, plan, config)
        return relevance_map(packed.boxes, self.region_scores(packed), scene.height, scene.width)


def validity_warnings(name: str, mask: npt.NDArray[np.bool_], min_valid_fraction: float) -> tuple[str, ...]:
    """Says so when little of the scene can be seen.

    mask: bool [h, w] of the scene's overview, True where any valid pixel lies below.

    Raises:
        ImageReadError: nothing is valid, so that any sentence about the scene would be made up.
    """
    share = float(mask.mean())
    if share == 0.0:
        raise ImageReadError(
            f"{name} has no valid pixel: all are nodata, transparent or not finite; check its nodata value and mask, or pass "
            "another scene"
        )
    if share >= min_valid_fraction:
        return ()
    return (
        f"only {share:.2g} of the scene's area is valid, less than the checkpoint's min_valid_fraction {min_valid_fraction:g}, so "
        "the result may have little to do with it; check its nodata value, or crop the scene to its valid part",
    )


def budget_warnings(settings: SceneSettings, checkpoint: RsvlmConfig) -> tuple[str, ...]:
    """Says so when a dris plan may grow beyond what the checkpoint was made for."""
    own = checkpoint.dris
    asked = {name: getattr(settings, name) for name in BUDGETS}
    beyond = [f"{name}={value}" for name, value in asked.items() if value is not None and value > getattr(own, name)]
    if not beyond or (settings.tiling or checkpoint.tiling) != "dris":
        return ()
    return (
        f"{' and '.join(beyond)} asked for, but the checkpoint was made for at most {own.max_visual_tokens} visual tokens in "
        f"{own.max_tiles} tiles, so the text may degrade; lower the budget, or crop the scene to keep more detail",
    )


def scale_warnings(plan: TilePlan, gsd_native_m: float | None, checkpoint: RsvlmConfig) -> tuple[str, ...]:
    """Says so when any part of the scene lost native detail, how much at best, at worst and on average, and what helps."""
    best, worst = plan.scale_range
    if worst <= SCALED_DOWN:
        return ()
    if gsd_native_m is None:
        times = f"{worst:.2f} times"
        if best < worst:
            times = f"{best:.2f} to {worst:.2f} times in the tiles ({plan.scale:.2f} on average over the scene)"
        return (f"scene was scaled down {times}, so details smaller than that are lost; {_advice(plan, checkpoint)}",)
    distance = f"{gsd_native_m * worst:.3g} m"
    if best < worst:
        distance = f"{gsd_native_m * best:.3g} to {distance} in the tiles ({gsd_native_m * plan.scale:.3g} m on average over the scene)"
    return (
        f"scene was scaled down: ground sampling distance {distance}, native {gsd_native_m:.3g} m; {_advice(plan, checkpoint)}",
    )


def _advice(plan: TilePlan, checkpoint: RsvlmConfig) -> str:
    """The next step to more detail that stays within what the checkpoint was made for."""
    if plan.tiling != "dris":
        return 'use tiling "dris" to keep more'
    own = {name: int(getattr(checkpoint.dris, name)) for name in BUDGETS}
    lowered = [name for name, limit in own.items() if int(plan.budget[name]) < limit]
    if plan.budget["stopped"] in lowered:
        return f"raise {' and '.join(f'{name} (up to {own[name]})' for name in lowered)} to keep more"
    return "crop the scene, or ask about a part of it, to keep more"
