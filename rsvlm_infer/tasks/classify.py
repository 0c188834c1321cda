"""Owns zero-shot classification: label prompts and the two ways to score them. Knows embeddings and token ids, not their models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..config import RsvlmConfig
from ..engine.checks import check_text
from ..errors import InputError
from .result import Classification
from .retrieve import softmax_scores

LABEL_TEMPLATE = "a satellite image of {label}"
CHOICE_PROMPT = "Classify this remote sensing image as one of: {labels}. Answer with the label only."

Method = Literal["alignment", "language", "auto"]


def choose_method(method: Method, config: RsvlmConfig) -> Literal["alignment", "language"]:
    """`auto` takes the alignment heads when the checkpoint has them.

    Raises:
        InputError: an unknown method, or one that the checkpoint has no parts for.
    """
    able = {"alignment": config.alignment is not None, "language": config.language is not None}
    if method == "auto":
        return "alignment" if able["alignment"] else "language"
    if method not in able:
        raise InputError(f'method must be "alignment", "language" or "auto", got {method!r}; choose one of them')
    if not able[method]:
        other = [name for name, present in able.items() if present]
        raise InputError(f'method "{method}" needs parts that this checkpoint lacks, available: {other}; choose one of these')
    return method


def label_prompts(labels: Sequence[str], template: str) -> list[str]:
    """One text per label.

    Raises:
        InputError: a template that is no text, or without the field {label}.
    """
    check_text("template", template)
    if "{label}" not in template:
        raise InputError(f"template must contain {{label}}, got {template!r}; write for example {LABEL_TEMPLATE!r}")
    return [template.replace("{label}", label.strip()) for label in labels]


def choice_prompt(labels: Sequence[str]) -> str:
    """The question that a language model answers with one label."""
    return CHOICE_PROMPT.replace("{labels}", ", ".join(label.strip() for label in labels))


def classification(
    labels: Sequence[str], raw: npt.NDArray[np.floating], scale: float, method: str, **report: Any
) -> Classification:
    """Ranks labels by raw scores [N]; probabilities are their softmax at `scale`. Ties keep the given order."""
    probabilities = softmax_scores(raw, scale)
    order = np.argsort(-raw, kind="stable")
    return Classification(
        label=labels[order[0]],
        scores={labels[i]: float(probabilities[i]) for i in order},
        raw_scores={labels[i]: float(raw[i]) for i in order},
        method=method,
        **report,
    )
