"""Owns what a scene is asked and how: mode, words, windows, budgets, reading. Knows no model and no file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args

from ..config import RsvlmConfig, Tiling
from ..engine.checks import check_integer, check_text, check_texts
from ..errors import InputError
from ..imagery.source import DEFAULT_MAX_PIXELS, DEFAULT_MAX_RAM, Scene, StretchChoice, open_scene
from ..tasks.caption import CAPTION_PROMPT
from ..tasks.classify import LABEL_TEMPLATE, Method, choice_prompt, label_prompts
from ..tasks.generation import GenerationSettings, check_labels
from ..tasks.scene import SceneSettings
from .record import Mode
from .windows import GridSpec

_READING = (
    "max_pixels",
    "max_ram_bytes",
    "allow_drivers",
    "allow_vsi",
)  # they decide whether there is an answer, not which one


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One question to one or many scenes. Plain values, so that it can be written as JSON and sent to another process.

    mode: "describe" (query: another prompt than the usual one), "ask" (query: the question; choices: the only answers), "classify"
    (labels, method, template as in `RSVLM.classify`), "find" (query: what to look for).
    window_px, overlap_px: a grid, one record for each window; None: one record for the whole scene.
    bands, stretch: as in `open_scene`. tiling, max_tiles, max_visual_tokens: budget of each record.
    query_aware: plan by the question; None: for a whole scene in "ask" and "find", else as the checkpoint says.
    deterministic: nothing but a window's own pixels may change its answer: the stretch must not come from the scene, and windows run
    through the model one by one.
    max_ram_bytes, allow_drivers, allow_vsi, max_pixels: as in `open_scene`.

    Raises:
        InputError: any value out of its range, or words that the mode needs and are not there.
    """

    mode: Mode = "describe"
    query: str = ""
    labels: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    method: Method = "auto"
    template: str = LABEL_TEMPLATE
    window_px: int | None = None
    overlap_px: int = 0
    bands: tuple[int, ...] | None = None
    stretch: StretchChoice = "auto"
    tiling: Tiling | None = None
    max_tiles: int | None = None
    max_visual_tokens: int | None = None
    max_new_tokens: int = 64
    query_aware: bool | None = None
    deterministic: bool = False
    max_pixels: int = DEFAULT_MAX_PIXELS
    max_ram_bytes: int = DEFAULT_MAX_RAM
    allow_drivers: tuple[str, ...] = ()
    allow_vsi: bool = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise InputError(f"mode must be one of {list(get_args(Mode))}, got {self.mode!r}; choose one of them")
        check_text("query", self.query)
        for name in ("labels", "choices", "allow_drivers"):
            object.__setattr__(self, name, tuple(check_texts(name, getattr(self, name))))
        object.__setattr__(self, "stretch", _frozen(self.stretch))
        self._check_words()
        object.__setattr__(self, "bands", self.scene.bands)
        GenerationSettings(max_new_tokens=self.max_new_tokens)
        if self.window_px is None and self.overlap_px:
            raise InputError(f"overlap_px needs window_px, got overlap_px={self.overlap_px} alone; give both or neither")
        check_integer("max_ram_bytes", self.max_ram_bytes)
        _ = self.grid

    @property
    def scene(self) -> SceneSettings:
        """Budget and bands of one image."""
        return SceneSettings(
            bands=self.bands,
            max_pixels=self.max_pixels,
            tiling=self.tiling,
            max_tiles=self.max_tiles,
            max_visual_tokens=self.max_visual_tokens,
        )

    @property
    def grid(self) -> GridSpec | None:
        """The grid of windows, None for one answer about the whole scene."""
        return None if self.window_px is None else GridSpec(self.window_px, self.overlap_px)

    @property
    def words(self) -> str:
        """What the scene is asked, as the header reports it."""
        if self.mode == "classify":
            return ", ".join(self.labels)
        return self.query if self.mode != "describe" else self.query or CAPTION_PROMPT

    def prompts(self, method: str) -> tuple[str, ...]:
        """All words that reach the model. method: "alignment" or "language", what `classify` uses."""
        if self.mode == "classify":
            by_language = (choice_prompt(self.labels), *self.labels)
            return tuple(label_prompts(self.labels, self.template)) if method == "alignment" else by_language
        return (self.words, *self.choices)

    def open(self, source: Any) -> Scene:
        """The scene, read as these settings say."""
        return open_scene(
            source,
            bands=self.bands,
            stretch=self.stretch,
            max_pixels=self.max_pixels,
            max_ram_bytes=self.max_ram_bytes,
            allow_drivers=self.allow_drivers,
            allow_vsi=self.allow_vsi,
        )

    def planning(self, config: RsvlmConfig) -> RsvlmConfig:
        """The checkpoint's config with its planner query-aware or not."""
        wanted = self.window_px is None and self.mode in ("ask", "find") if self.query_aware is None else self.query_aware
        if self.query_aware is None and not wanted:
            return config
        return dataclasses.replace(config, dris=dataclasses.replace(config.dris, query_aware=wanted))

    def identity(self) -> dict[str, Any]:
        """JSON values of everything that can change an answer."""
        return {name: value for name, value in self.to_dict().items() if name not in _READING}

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `RunSettings(**values)` is the reverse."""
        return dataclasses.asdict(self)

    def _check_words(self) -> None:
        if self.mode in ("ask", "find") and not self.query.strip():
            what = "the question" if self.mode == "ask" else "what to look for"
            raise InputError(f'query must hold {what} in mode "{self.mode}", got {self.query!r}; write some words')
        if self.mode == "classify":
            check_labels(self.labels, "labels")
            label_prompts(self.labels, self.template)
            if self.query:
                raise InputError(f'query has no meaning in mode "classify", got {self.query!r}; give labels instead')
        elif self.labels:
            raise InputError(f'labels belong to mode "classify", got {list(self.labels)} in mode "{self.mode}"; leave them out')
        if self.choices:
            if self.mode != "ask":
                raise InputError(
                    f'choices belong to mode "ask", got {list(self.choices)} in mode "{self.mode}"; leave them out'
                )
            check_labels(self.choices, "choices")


def _frozen(value: Any) -> Any:
    """Lists as tuples, as they were before JSON."""
    return tuple(_frozen(each) for each in value) if isinstance(value, (list, tuple)) else value
