"""Owns the settings of a generated answer and the step from a prompt to an engine request. Knows no backend and no raster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..backends.base import ImageFeatures
from ..config import RsvlmConfig
from ..engine.checks import check_text, check_texts
from ..engine.request import Request, check_sampling
from ..errors import InputError
from ..text.chat import encode_prompt
from ..text.tokenizer import Tokenizer
from .text_stream import TextStream


@dataclass(frozen=True)
class GenerationSettings:
    """How to continue a prompt; temperature 0 is greedy, `seed` fixes the draws otherwise, `stop` strings end the text.

    Raises:
        InputError: any value of the wrong type or out of its range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        check_sampling(self.max_new_tokens, self.temperature, self.top_p, self.seed)
        object.__setattr__(self, "stop", tuple(check_texts("stop", [self.stop] if isinstance(self.stop, str) else self.stop)))
        if not all(self.stops):
            raise InputError(f"stop strings must not be empty, got {list(self.stops)}; remove the empty one")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, also when `stop` is a lone one."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def prompt_ids(tokenizer: Tokenizer, config: RsvlmConfig, prompt: str, num_image_tokens: int) -> npt.NDArray[np.int32]:
    """The checkpoint's chat form of one question about one image, int32 [n].

    Raises:
        InputError: a prompt that is no text, or a blank one where the template needs one.
    """
    check_text("prompt", prompt)
    if config.chat_template != "plain" and not prompt.strip():
        raise InputError("prompt must hold a question, got only blanks; pass a question, or leave it out for the default")
    return encode_prompt(tokenizer, config.chat_template, prompt, num_image_tokens, config.image_token_id, config.bos_token_id)


def build_request(
    tokenizer: Tokenizer,
    config: RsvlmConfig,
    prompt: str,
    features: ImageFeatures,
    settings: GenerationSettings,
    choices: Sequence[str] | None = None,
) -> tuple[Request, TextStream]:
    """A request and the text that its tokens write. With `choices` the answer is exactly one of them."""
    text = TextStream(tokenizer, settings.stops)
    allowed = None if choices is None else choice_ids(tokenizer, choices)
    request = Request(
        token_ids=prompt_ids(tokenizer, config, prompt, features.num_tokens),
        images=(features,),
        max_new_tokens=settings.max_new_tokens if allowed is None else max(map(len, allowed)),
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
        stop_ids=config.eos_token_ids,
        on_token=text.accept,
        allowed=allowed,
        hints=tuple(tuple(tokenizer.encode(f" {cue}")) for cue in features.cues),  # as words inside of a sentence
    )
    return request, text


def choice_ids(tokenizer: Tokenizer, choices: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Token ids of each allowed answer.

    Raises:
        InputError: fewer than two choices, a repeated or a blank one.
    """
    return tuple(tuple(tokenizer.encode(choice.strip())) for choice in check_labels(choices, "choices"))


def check_labels(labels: Sequence[str], name: str) -> list[str]:
    """The labels as a list.

    Raises:
        InputError: fewer than two texts, a repeated or a blank one.
    """
    given = check_texts(name, labels)
    texts = [label.strip() for label in given]
    if len(texts) < 2:
        raise InputError(f"{name} must hold at least two texts, got {texts}; add another")
    if not all(texts):
        raise InputError(f"{name} must not be blank, got {given}; remove the blank one")
    repeated = sorted({text for text in texts if texts.count(text) > 1})
    if repeated:
        raise InputError(f"{name} must differ, got {repeated} more than once; remove the repeated ones")
    return given
