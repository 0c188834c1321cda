"""Exact match of short answers and class names. Knows no model and no task.

Case, spaces and punctuation do not count: "Storage tanks." is "storagetanks". This is how the published classification
numbers of the golden predictions are counted. Inside numbers a mark does count: 1.5 is not 15, and 1-10 is not 110.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import InputError

# Named in every output: another matcher gives another number.
MATCHER = "exact match of the lower-case letters and digits; spaces and punctuation do not count, except . - / : between digits"

_IGNORED = re.compile(r"(?<!\d)[\W_]|[\W_](?!\d)|[^\w.\-/:]|_")


def normalize_answer(text: str) -> str:
    """Lower-case letters and digits, of any script, and the marks inside numbers; a text of marks only stays as it is."""
    return _IGNORED.sub("", text.lower()) or text.strip()


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


@dataclass(frozen=True)
class ClassScores:
    """Closed-set classification. confusion [C, C + 1]: row = true class, column = predicted; the last column is none of them."""

    accuracy: float
    mean_accuracy: float
    by_class: dict[str, float]
    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]


def class_scores(predictions: Sequence[str], truths: Sequence[str], labels: Mapping[str, str]) -> ClassScores:
    """Scores predictions, each a class of `labels` or the words that describe it.

    `mean_accuracy` and `by_class` (recall) are over the classes that occur among the truths.

    Raises:
        InputError: as in `matches`, or a truth is no class.
    """
    names = {normalize_answer(words): name for name, words in labels.items()} | {
        normalize_answer(name): name for name in labels
    }
    odd = sorted(set(truths) - labels.keys())
    if odd:
        raise InputError(f"truths must be among the {len(labels)} classes, got {odd[:3]}; add these to the labels")
    named = [names.get(normalize_answer(guess), guess) for guess in predictions]
    by_class = match_by_class(named, truths)
    classes = tuple(sorted(labels))
    rows = {name: [0] * (len(classes) + 1) for name in classes}
    columns = {name: column for column, name in enumerate(classes)}
    for guess, truth in zip(named, truths, strict=True):
        rows[truth][columns.get(guess, len(classes))] += 1
    return ClassScores(
        accuracy=exact_match(named, truths),
        mean_accuracy=sum(by_class.values()) / len(by_class),
        by_class=by_class,
        classes=classes,
        confusion=tuple(tuple(rows[name]) for name in classes),
    )
