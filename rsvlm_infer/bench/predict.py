"""What a model says about labelled images, one item at a time. Knows RSVLM's public calls; knows no truth, no metric and no clock.

The bench and `rsvlm eval` both predict through these functions, so that their numbers mean the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RsvlmError
from ..evaluation.scoring import candidate_texts
from ..evaluation.sets import EvaluationSet, Item
from ..tasks.retrieve import alignment_scores, require_alignment

CAPTION_TOKENS, ANSWER_TOKENS = 32, 16
# Questions with a closed set of answers are asked as constrained choices, as RSVQA's own baselines classify them.
CLOSED_ANSWERS = {"presence": ("yes", "no"), "comp": ("yes", "no"), "rural_urban": ("rural", "urban")}


@dataclass(frozen=True)
class PredictSettings:
    """How to predict; None and empty leave it to the model. `scene`: keyword options such as tiling and budgets."""

    max_new_tokens: int | None = None
    batch_size: int = 4
    prompt: str | None = None
    method: str = "auto"
    scene: Mapping[str, Any] = field(default_factory=dict)


class Candidates:
    """The texts that images are compared with, each distinct one embedded once. `columns` [M]: text -> distinct text."""

    def __init__(self, model: Any, texts: Sequence[str]) -> None:
        distinct = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        self.columns = [distinct[text] for text in texts]
        self._model = model
        self._alignment = require_alignment(model.config)
        self._embedded = model.embed_text(list(distinct))  # [N, De]

    def similarity(self, image: Path, **scene: Any) -> npt.NDArray[np.float32]:
        """Alignment scores [N] with the distinct texts."""
        return alignment_scores(self._model.embed_levels(image, **scene), self._embedded, self._alignment)


def classify_image(model: Any, image: Path, labels: Mapping[str, str], **options: Any) -> str:
    """The class whose words fit an image best."""
    classes = {words: name for name, words in labels.items()}
    return classes[model.classify(image, list(classes), **options).label]


def answer_question(
    model: Any, image: Path, question: str, kind: str, max_new_tokens: int = ANSWER_TOKENS, **scene: Any
) -> str:
    """The answer to a question, one of the closed answers where its kind has them."""
    choices = CLOSED_ANSWERS.get(kind)
    text: str = model.ask(image, question, choices=choices, max_new_tokens=max_new_tokens, **scene).text
    return text


def predict(model: Any, data: EvaluationSet, items: Sequence[Item], settings: PredictSettings) -> Iterator[tuple[Item, Any]]:
    """Each item, in order, with its prediction: a text, a list of similarities, or the RsvlmError that it met."""
    if data.task == "caption":
        return _captions(model, items, settings)
    scene = dict(settings.scene)
    if data.task == "retrieval":
        candidates = Candidates(model, candidate_texts(data))
        return _attempts(items, lambda item: _numbers(candidates.similarity(_image(item), **scene)))
    if data.task == "classify":
        options = scene if settings.method == "auto" else {**scene, "method": settings.method}
        return _attempts(items, lambda item: classify_image(model, _image(item), data.labels, **options))
    longest = settings.max_new_tokens or ANSWER_TOKENS
    return _attempts(items, lambda item: answer_question(model, _image(item), item.question, item.kind, longest, **scene))


def _captions(model: Any, items: Sequence[Item], settings: PredictSettings) -> Iterator[tuple[Item, Any]]:
    options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens or CAPTION_TOKENS, **settings.scene}
    if settings.prompt is not None:
        options["prompt"] = settings.prompt
    images = [_image(item) for item in items]
    answers = model.caption_many(images, batch_size=settings.batch_size, strict=False, **options)
    for item, answer in zip(items, answers, strict=True):
        yield item, answer.text if answer.error is None else answer.error


def _attempts(items: Sequence[Item], call: Any) -> Iterator[tuple[Item, Any]]:
    for item in items:
        try:
            yield item, call(item)
        except RsvlmError as error:
            yield item, error


def _image(item: Item) -> Path:
    assert item.image is not None  # sets without images are refused before a model is loaded
    return item.image


def _numbers(row: npt.NDArray[np.float32]) -> list[float]:
    """The shortest decimals that give the same float32 again."""
    return [float(str(value)) for value in row]
