"""Retrieval metrics: recall at 1, 5, 10 both ways and their mean, from a similarity matrix. Knows no model.

Protocol: every caption of every image is one text, its first letter capitalised. Remote-sensing captions repeat: a text is right
for every image that carries the same text, so a hit on any of them counts. Ties keep the order of the columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InputError

PROTOCOL = "every sentence of every image, first letter capitalised; a hit is any image that carries the same text"


@dataclass(frozen=True)
class RetrievalScores:
    """Recalls as fractions; `mean_recall` is the mean of the six."""

    text_to_image_r1: float
    text_to_image_r5: float
    text_to_image_r10: float
    image_to_text_r1: float
    image_to_text_r5: float
    image_to_text_r10: float
    mean_recall: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def retrieval_texts(captions: Mapping[str, Sequence[str]]) -> tuple[list[str], npt.NDArray[np.bool_]]:
    """The texts to embed, M of them, and which of them are right for which image: positives [N, M].

    `captions` maps each image, in the order of the similarity's rows, to its sentences.
    """
    texts = [_capitalized(text) for sentences in captions.values() for text in sentences]
    columns: dict[str, list[int]] = {}
    for column, text in enumerate(texts):
        columns.setdefault(text, []).append(column)
    positives = np.zeros((len(captions), len(texts)), dtype=np.bool_)
    for row, sentences in enumerate(captions.values()):
        for text in sentences:
            positives[row, columns[_capitalized(text)]] = True
    return texts, positives


def retrieval_scores(similarity: npt.NDArray[np.floating], positives: npt.NDArray[np.bool_]) -> RetrievalScores:
    """Recalls of similarity [N images, M texts] against positives [N, M].

    Raises:
        InputError: shapes differ, a value is not finite, or a row or column has no positive.
    """
    if similarity.shape != positives.shape or similarity.ndim != 2 or similarity.size == 0:
        raise InputError(
            f"similarity and positives must be equal non-empty [images, texts], got {similarity.shape} and {positives.shape}; "
            "build positives with retrieval_texts"
        )
    if not np.isfinite(similarity).all():
        raise InputError("similarity must be finite, got NaN or infinity; check the embeddings")
    if not (positives.any(axis=0).all() and positives.any(axis=1).all()):
        raise InputError("positives must name at least one match for each image and each text; drop those without any")
    to_image = _first_hit(similarity.T, positives.T)
    to_text = _first_hit(similarity, positives)
    recalls = {
        f"{way}_r{k}": float((ranks < k).mean())
        for way, ranks in (("text_to_image", to_image), ("image_to_text", to_text))
        for k in (1, 5, 10)
    }
    return RetrievalScores(**recalls, mean_recall=sum(recalls.values()) / len(recalls))


def _capitalized(text: str) -> str:
    stripped = text.strip()
    return stripped[:1].upper() + stripped[1:]


def _first_hit(similarity: npt.NDArray[np.floating], positives: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Rank (0 = best) of the first positive of each row."""
    order = np.argsort(-similarity, axis=1, kind="stable")
    first: npt.NDArray[np.int64] = np.argmax(np.take_along_axis(positives, order, axis=1), axis=1)
    return first
