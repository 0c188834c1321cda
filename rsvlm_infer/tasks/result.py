"""Owns what a user gets back: answers, classifications, timings, token counts. Knows no model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..engine.request import FinishReason
from ..errors import RsvlmError
from ..imagery.plan import TilePlan


@dataclass(frozen=True)
class Timings:
    """Milliseconds by perf_counter.

    read: opening and decoding, or the overview of a large raster · plan: DRIS, with the coarse pass when it is query-aware ·
    preprocess: windows to packed patches · encode, augment: visual tokens · prefill, decode: language model, shared by a batch ·
    ttft: from the start of this image's batch to its first token · tpot: decode per token after the first.
    """

    read_ms: float = 0.0
    plan_ms: float = 0.0
    preprocess_ms: float = 0.0
    encode_ms: float = 0.0
    augment_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    ttft_ms: float = 0.0
    tpot_ms: float = 0.0


@dataclass(frozen=True)
class TokenCounts:
    """prompt: text tokens of the prompt · visual: image tokens · generated: tokens that the model chose, its end token included."""

    prompt: int = 0
    visual: int = 0
    generated: int = 0


@dataclass(frozen=True, kw_only=True)
class SceneReport:
    """What is known of the scene behind a result. `error` is set, and the rest empty, when the image could not be used."""

    source: str
    plan: TilePlan | None = None
    timings: Timings = field(default_factory=Timings)
    gsd_native_m: float | None = None
    gsd_effective_m: float | None = None
    warnings: tuple[str, ...] = ()
    cues: tuple[str, ...] = ()
    error: RsvlmError | None = None

    @property
    def ok(self) -> bool:
        return self.error is None

    def to_dict(self, *, plan: bool = False) -> dict[str, Any]:
        """JSON values; the plan, which can be long, only when asked for."""
        if self.error is not None:
            return {"source": self.source, "error": str(self.error)}
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("plan", "timings", "error")}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        values["timings"] = {name: round(value, 3) for name, value in asdict(self.timings).items()}
        if plan and self.plan is not None:
            values["plan"] = self.plan.to_dict()
        return values


@dataclass(frozen=True, kw_only=True)
class Answer(SceneReport):
    """Generated text. `token_ids` leave out the end token."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    tokens: TokenCounts = field(default_factory=TokenCounts)
    finish_reason: FinishReason | None = None

    def to_dict(self, *, plan: bool = False) -> dict[str, Any]:
        values = super().to_dict(plan=plan)
        return values if self.error is not None else values | {"tokens": asdict(self.tokens)}


@dataclass(frozen=True, kw_only=True)
class Classification(SceneReport):
    """The best label and the probability of each, best first (ties in the order given); `raw_scores` before the softmax."""

    label: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    raw_scores: dict[str, float] = field(default_factory=dict)
    method: str = ""
