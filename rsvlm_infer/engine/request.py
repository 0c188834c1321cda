"""Owns what one generation is asked for and what it reports. Knows token ids and opaque image features, no text and no backend.

A request is frozen and checked when it is made, so that a batch can never fail half way because of a bad setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..backends.base import ImageFeatures, Prompt
from ..errors import InputError
from .checks import check_integer, check_real
from .choices import ChoiceTrie

FinishReason = Literal["stop_id", "stop_text", "length", "choice"]


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt and how to continue it.

    token_ids: int32 [n], every image placeholder already expanded; images in order of appearance.
    temperature 0 is greedy (ties to the lowest id). `seed` alone decides the draws: not the batch, not the other requests.
    stop_ids end the answer and are not part of it. `on_token` sees every other token and returns True to stop after it;
    this is how stop strings work without the engine knowing text.
    allowed: when given, the answer is exactly one of these token sequences.
    hints: token ids of texts whose words the answer may repeat; they change its speed at most, never the answer.

    Raises:
        InputError: any value out of its range.
    """

    token_ids: npt.NDArray[np.int32]
    images: tuple[ImageFeatures, ...] = ()
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    on_token: Callable[[int], bool] | None = None
    allowed: tuple[tuple[int, ...], ...] | None = None
    hints: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.token_ids.ndim != 1 or self.token_ids.size == 0:
            raise InputError(f"token_ids must be a non-empty vector, got shape {self.token_ids.shape}; pass an encoded prompt")
        check_sampling(self.max_new_tokens, self.temperature, self.top_p, self.seed)
        if self.allowed is not None:
            trie = ChoiceTrie(self.allowed)
            if self.max_new_tokens < trie.longest:
                raise InputError(
                    f"max_new_tokens must cover the longest choice of {trie.longest} tokens, got {self.max_new_tokens}; raise it"
                )
            if trie.needs_end and not self.stop_ids:
                raise InputError(
                    "stop_ids must hold an end token when one choice begins with another, got none; pass the model's end token"
                )

    @property
    def greedy(self) -> bool:
        """Whether every token is the most likely one of the whole vocabulary: nothing drawn, nothing left out."""
        return self.temperature == 0 and self.allowed is None

    @property
    def prompt(self) -> Prompt:
        """What a backend has to prefill."""
        return Prompt(self.token_ids, self.images)


def check_sampling(max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Raises InputError when a sampling setting has the wrong type or is out of its range."""
    check_integer("max_new_tokens", max_new_tokens)
    check_real("temperature", temperature)
    check_real("top_p", top_p)
    check_integer("seed", seed)
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}; raise it")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature must be a finite number of at least 0, got {temperature}; use 0 for greedy decoding")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be in (0, 1], got {top_p}; use 1 to keep every token")
    if seed < 0:
        raise InputError(f"seed must be at least 0, got {seed}; pass a non-negative integer")


@dataclass(frozen=True)
class TokenEvent:
    """One chosen token of one request.

    A stop id is reported too (finish_reason "stop_id") and is not part of the answer. `step_ms` is the time of the prefill
    (first event) or decode step that made the token, shared by the whole batch, without the caller's own time between events.
    `queue_ms` is the wall time from the call of `generate` to the start of this request's prefill: other requests went first.
    """

    request_index: int
    token_id: int
    step_ms: float
    finish_reason: FinishReason | None = None
    queue_ms: float = 0.0

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, eq=False)
class ChoiceScores:
    """Mean log-probability per token of each choice, float64 [N], and what it took in milliseconds."""

    log_probs: npt.NDArray[np.float64]
    prefill_ms: float
    decode_ms: float
