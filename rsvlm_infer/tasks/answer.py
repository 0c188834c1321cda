"""Owns the collection of one answer: events of the engine in, an `Answer` out. Knows no backend."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..backends.base import ImageFeatures
from ..engine.request import FinishReason, Request, TokenEvent
from .result import Answer, Timings, TokenCounts
from .scene import PreparedScene
from .text_stream import TextStream


@dataclass
class AnswerDraft:
    """One answer while its tokens arrive. `waited_ms` is the batch's time before the engine, then also the queue in it."""

    prepared: PreparedScene
    features: ImageFeatures
    request: Request
    text: TextStream
    waited_ms: float
    token_ids: list[int] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def record(self, event: TokenEvent) -> None:
        """Adds one engine event of this request; the text itself came through the request's `on_token`."""
        if not self.step_ms:
            self.waited_ms += event.queue_ms  # a batch larger than the engine's runs in groups, one after the other
        self.step_ms.append(event.step_ms)
        self.finish_reason = event.finish_reason
        if event.finish_reason != "stop_id":
            self.token_ids.append(event.token_id)
        if event.finished:
            self.text.finish()

    def answer(self) -> Answer:
        """The finished answer."""
        prefill_ms, decode_ms = self.step_ms[0], sum(self.step_ms[1:], 0.0)
        prepared = self.prepared
        return Answer(
            source=prepared.source,
            plan=prepared.packed.plan,
            timings=Timings(
                read_ms=prepared.read_ms,
                plan_ms=prepared.plan_ms,
                preprocess_ms=prepared.preprocess_ms,
                encode_ms=self.features.encode_ms,
                augment_ms=self.features.augment_ms,
                prefill_ms=prefill_ms,
                decode_ms=decode_ms,
                ttft_ms=self.waited_ms + prefill_ms,
                tpot_ms=decode_ms / max(1, len(self.step_ms) - 1),
            ),
            gsd_native_m=prepared.gsd_native_m,
            gsd_effective_m=prepared.gsd_effective_m,
            warnings=prepared.warnings,
            cues=self.features.cues,
            text=self.text.text,
            token_ids=tuple(self.token_ids),
            tokens=TokenCounts(
                prompt=self.request.token_ids.size - self.features.num_tokens,
                visual=self.features.num_tokens,
                generated=len(self.step_ms),
            ),
            finish_reason=self.finish_reason,
        )
