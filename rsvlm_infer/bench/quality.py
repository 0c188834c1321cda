"""How right a model's answers are on labelled images. Knows RSVLM's public calls and the metrics, no backend and no clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..evaluation.answers import exact_match, match_by_class
from ..evaluation.captions import caption_scores
from ..evaluation.retrieval import retrieval_scores, retrieval_texts
from .images import Sample
from .predict import Candidates, answer_question, classify_image

Step = Callable[[], None]


def caption_quality(captions: Mapping[str, str], samples: Sequence[Sample]) -> dict[str, float]:
    """BLEU-4, ROUGE-L and CIDEr of the samples that have reference sentences; nothing when none has.

    Raises:
        MissingDependencyError: the extra [eval] is not installed.
    """
    references = {sample.name: sample.captions for sample in samples if sample.captions and sample.name in captions}
    if not references:
        return {}
    scores = caption_scores({name: captions[name] for name in references}, references)
    return {"bleu_4": scores.bleu_4, "rouge_l": scores.rouge_l, "cider": scores.cider}


def classify_samples(
    model: Any, samples: Sequence[Sample], labels: Mapping[str, str], options: Mapping[str, Any], step: Step
) -> dict[str, str]:
    """Predicted class of every sample that has a true one, by sample name. `options`: how to read an image, here and below."""
    predicted = {}
    for sample in samples:
        if sample.label is not None:
            predicted[sample.name] = classify_image(model, sample.path, labels, **options)
            step()
    return predicted


def class_quality(predicted: Mapping[str, str], samples: Sequence[Sample]) -> dict[str, float]:
    """`class_accuracy` over all, and the mean of the classes' own; nothing without labels."""
    truths = {sample.name: sample.label for sample in samples if sample.label is not None and sample.name in predicted}
    if not truths:
        return {}
    guesses = [predicted[name] for name in truths]
    expected = list(truths.values())
    by_class = match_by_class(guesses, expected)
    return {"class_accuracy": exact_match(guesses, expected), "class_accuracy_mean": sum(by_class.values()) / len(by_class)}


def question_quality(model: Any, samples: Sequence[Sample], options: Mapping[str, Any], step: Step) -> dict[str, float]:
    """Exact match of the answers, over all questions and by kind; nothing without questions."""
    kinds, answers, truths = [], [], []
    for sample in samples:
        for question in sample.questions:
            kinds.append(question.kind)
            answers.append(answer_question(model, sample.path, question.question, question.kind, **options))
            truths.append(question.answer)
            step()
    if not truths:
        return {}
    scores = {"answer_accuracy": exact_match(answers, truths)}
    for kind in sorted(set(kinds)):
        chosen = [i for i, each in enumerate(kinds) if each == kind]
        scores[f"answer_accuracy_{kind}"] = exact_match([answers[i] for i in chosen], [truths[i] for i in chosen])
    return scores


def retrieval_quality(model: Any, samples: Sequence[Sample], options: Mapping[str, Any], step: Step) -> dict[str, float]:
    """Recalls both ways over the samples that have sentences; nothing when none has."""
    captioned = [sample for sample in samples if sample.captions]
    if not captioned:
        return {}
    texts, positives = retrieval_texts({sample.name: sample.captions for sample in captioned})
    candidates = Candidates(model, texts)
    rows = []
    for sample in captioned:
        rows.append(candidates.similarity(sample.path, **options)[candidates.columns])
        step()
    return retrieval_scores(np.stack(rows), positives).to_dict()
