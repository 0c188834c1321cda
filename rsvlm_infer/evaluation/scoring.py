"""Predictions of a whole labelled set to its numbers, one function per task. Knows no model and no file.

Every result names how strings were compared, because that decides the number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import InputError
from .answers import MATCHER, class_scores, matches
from .captions import TOKENIZER, caption_scores
from .retrieval import PROTOCOL, retrieval_scores, retrieval_texts
from .sets import EvaluationSet, Item


def score_set(data: EvaluationSet, predictions: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of the items that have a prediction, as JSON values with at least `metrics`, all of them fractions.

    predictions: item key -> text; for retrieval the similarity with every text of `candidate_texts`.

    Raises:
        InputError: no item has a prediction, or one is of the wrong form. MissingDependencyError: the extra [eval] is missing.
    """
    items = [item for item in data.items if item.key in predictions]
    if not items:
        raise InputError(f"predictions must hold at least one of the {len(data.items)} items of {data.name}, got none of them")
    if data.task == "retrieval":
        return _retrieval(data, items, predictions)
    odd = [item.key for item in items if not isinstance(predictions[item.key], str)]
    if odd:
        raise InputError(f"predictions must be texts for the task {data.task!r}, got something else for {odd[:3]}")
    if data.task == "caption":
        return _captions(items, predictions)
    return _classes(data, items, predictions) if data.task == "classify" else _answers(items, predictions)


def candidate_texts(data: EvaluationSet) -> list[str]:
    """The distinct sentences of a set, capitalised, in the order of their first image: what each image is compared with."""
    texts, _ = retrieval_texts({item.key: item.truths for item in data.items})
    return list(dict.fromkeys(texts))


def _captions(items: list[Item], predictions: Mapping[str, str]) -> dict[str, Any]:
    truths = {item.key: item.truths for item in items}
    scores = caption_scores({key: predictions[key] for key in truths}, truths)
    return {"tokenizer": TOKENIZER, "metrics": scores.to_dict()}


def _classes(data: EvaluationSet, items: list[Item], predictions: Mapping[str, str]) -> dict[str, Any]:
    truths = [item.truths[0] for item in items]
    scores = class_scores([predictions[item.key] for item in items], truths, data.labels)
    return {
        "matcher": MATCHER,
        "metrics": {"class_accuracy": scores.accuracy, "class_accuracy_mean": scores.mean_accuracy},
        "classes": {name: {"accuracy": value, "items": truths.count(name)} for name, value in scores.by_class.items()},
        "confusion": {
            "rows": "true class",
            "columns": [*scores.classes, None],  # None: an answer that is no class
            "counts": dict(zip(scores.classes, map(list, scores.confusion), strict=True)),
        },
    }


def _answers(items: list[Item], predictions: Mapping[str, str]) -> dict[str, Any]:
    hits = matches([predictions[item.key] for item in items], [item.truths[0] for item in items])
    by_kind: dict[str, list[bool]] = {}
    for item, hit in zip(items, hits, strict=True):
        by_kind.setdefault(item.kind or "unnamed", []).append(hit)
    kinds = {
        kind: {"accuracy": sum(by_kind[kind]) / len(by_kind[kind]), "items": len(by_kind[kind])} for kind in sorted(by_kind)
    }
    mean = sum(kind["accuracy"] for kind in kinds.values()) / len(kinds)
    return {
        "matcher": MATCHER,
        "metrics": {"answer_accuracy": sum(hits) / len(hits), "answer_accuracy_mean": mean},
        "kinds": kinds,
    }


def _retrieval(data: EvaluationSet, items: list[Item], predictions: Mapping[str, Any]) -> dict[str, Any]:
    columns = {text: column for column, text in enumerate(candidate_texts(data))}
    texts, positives = retrieval_texts({item.key: item.truths for item in items})
    chosen = [columns[text] for text in texts]
    rows = []
    for item in items:
        row = predictions[item.key]
        if not isinstance(row, list) or len(row) != len(columns):
            got = len(row) if isinstance(row, list) else row
            raise InputError(
                f"the prediction of {item.key!r} must be {len(columns)} similarities, one for each distinct text, got {got!r:.40}"
            )
        try:
            rows.append(np.array(row, dtype=np.float64)[chosen])
        except (TypeError, ValueError):
            raise InputError(f"the prediction of {item.key!r} must hold numbers only; make it again") from None
    scores = retrieval_scores(np.stack(rows), positives)
    return {"protocol": PROTOCOL, "metrics": scores.to_dict(), "texts": len(texts), "distinct_texts": len(columns)}
