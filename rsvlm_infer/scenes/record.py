"""Owns what is said about a scene: its header, its windows, one record for each. Knows no model, no raster reader, no file format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from ..tasks.result import Timings

Mode = Literal["describe", "ask", "classify", "find"]


@dataclass(frozen=True)
class PixelWindow:
    """A rectangle of native pixels, inside its scene."""

    row_off: int
    col_off: int
    height: int
    width: int


@dataclass(frozen=True)
class GridWindow:
    """One window of a grid. `window` is what the model sees; `core` is the part that its record answers for: the cores of a grid
    cover the scene once, without overlap."""

    index: int
    window: PixelWindow
    core: PixelWindow


@dataclass(frozen=True, kw_only=True)
class SceneHeader:
    """What holds for a whole scene.

    content_hash: sha256 that changes when the file's pixels or georeference may have changed. crs: WKT2, None without one.
    transform: affine (a, b, c, d, e, f) from (column, row) to crs coordinates. stretch_low, stretch_high: the scene's one stretch per
    shown band, empty when uint8 values are shown as they are. prompt_hash, config_hash, model_hash: sha256 in hex.
    empty_px, uniform_px: native pixels in windows that were skipped. lost: sentences about what the georeference does not say.
    acquired: when the scene was taken by its own tags, ISO 8601 in UTC, None when they do not say.
    """

    source: str
    content_hash: str
    height: int
    width: int
    count: int
    dtype: str
    crs: str | None
    transform: tuple[float, float, float, float, float, float] | None
    gsd_native_m: float | None
    stretch_low: tuple[float, ...]
    stretch_high: tuple[float, ...]
    mode: Mode
    query: str
    model_hash: str
    prompt_hash: str
    config_hash: str
    empty_px: int = 0
    uniform_px: int = 0
    lost: tuple[str, ...] = ()
    acquired: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class WindowRecord:
    """What the model said about one window.

    score: probability of `label` (classify), or the alignment score (find). scores: of every label. cited: windows that the text
    rests on. valid_share: of the window's pixels. timings: what it took; they differ from run to run, so no output file holds them.
    """

    place: GridWindow
    text: str = ""
    label: str | None = None
    score: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    cited: tuple[PixelWindow, ...] = ()
    gsd_effective_m: float | None = None
    valid_share: float = 1.0
    num_visual_tokens: int = 0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    finish_reason: str | None = None
    warnings: tuple[str, ...] = ()
    timings: Timings = field(default_factory=Timings)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the timings."""
        values = asdict(self)
        del values["timings"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], timings: Timings | None = None) -> WindowRecord:
        """The reverse of `to_dict`."""
        place = values["place"]
        return cls(
            **{
                **values,
                "place": GridWindow(place["index"], PixelWindow(**place["window"]), PixelWindow(**place["core"])),
                "cited": tuple(PixelWindow(**window) for window in values["cited"]),
                "warnings": tuple(values["warnings"]),
                "timings": timings or Timings(),
            }
        )


class SceneRun(Protocol):
    """One opened scene with its windows decided. `answer` depends on nothing but the window, so windows may be answered in any order,
    again, or on another machine, with the same result."""

    header: SceneHeader
    windows: Sequence[GridWindow]

    def answer(self, windows: Sequence[GridWindow]) -> list[WindowRecord]:
        """Records of these windows, in their order, as one micro-batch."""
        ...

    def close(self) -> None:
        """Frees what is held open."""
        ...
