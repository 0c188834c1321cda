"""Exact match of short answers and class names. Knows no model and no task.

Case, spaces and punctuation do not count: "Storage tanks." is "storagetanks". This is how the published classification
numbers of the golden predictions are counted.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from ..errors import InputError

_IGNORED = re.compile(r"[^a-z0-9]+")


def normalize_answer(text: str) -> str:
    """Lower-case letters and digits only."""
    return _IGNORED.sub("", text.lower())


def matches(predictions: Sequence[str], truths: Sequence[str]) -> list[bool]:
    """Per item, whether the normalised strings are equal.

    Raises:
        InputError: the lists are empty or differ in length.
    """
    if len(predictions) != len(truths) or not truths:
        raise InputError(
            f"predictions and truths must have the same non-zero length, got {len(predictions)} and {len(truths)}; "
            "pass one prediction for each item"
        )
    return [normalize_answer(guess) == normalize_answer(truth) for guess, truth in zip(predictions, truths, strict=True)]


def exact_match(predictions: Sequence[str], truths: Sequence[str]) -> float:
    """Fraction of items whose normalised strings are equal; errors as in `matches`."""
    hits = matches(predictions, truths)
    return sum(hits) / len(hits)


def match_by_class(predictions: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
    """Recall of each class, in the order of the class names; errors as in `matches`."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for truth, hit in zip(truths, matches(predictions, truths), strict=True):
        hits[truth].append(hit)
    return {name: sum(hits[name]) / len(hits[name]) for name in sorted(hits)}
