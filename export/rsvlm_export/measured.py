"""What a model says about a labelled sample, and a file that keeps it. Knows no gate and no precision."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsvlm_infer import __version__
from rsvlm_infer.bench.images import ImageSet, Sample
from rsvlm_infer.bench.output import write_atomically
from rsvlm_infer.bench.quality import caption_quality, class_quality, classify_samples, retrieval_quality
from rsvlm_infer.errors import InputError
from rsvlm_infer.pipeline import RSVLM

FORMAT, VERSION = "rsvlm-measured", 1
NEW_TOKENS = 32


@dataclass(frozen=True)
class Measured:
    """What a model says about the sample: metrics by name, and each image's greedy tokens."""

    metrics: dict[str, float]
    tokens: dict[str, list[int]]


def measure(model: RSVLM, images: ImageSet, step: Callable[[str], None], who: str) -> Measured:
    """Captions, classes and recalls as the bench measures them, as far as model and labels allow."""
    metrics: dict[str, float] = {}
    tokens: dict[str, list[int]] = {}
    samples = list(images.samples)
    if model.config.language is not None:
        step(f"captions of the {who}")
        answers = model.caption_many([sample.path for sample in samples], max_new_tokens=NEW_TOKENS, strict=True)
        texts = {}
        for sample, answer in zip(samples, answers, strict=True):
            texts[sample.name], tokens[sample.name] = answer.text, [int(token) for token in answer.token_ids]
        if any(sample.captions for sample in samples):
            metrics |= caption_quality(texts, samples)
    if _labelled(samples) and (model.config.alignment is not None or model.config.language is not None):
        step(f"classes of the {who}")
        predicted = classify_samples(model, samples, images.labels, {}, lambda: None)
        metrics |= class_quality(predicted, samples)
    if model.config.alignment is not None:
        step(f"recalls of the {who}")
        metrics |= retrieval_quality(model, samples, {}, lambda: None)
    return Measured(metrics, tokens)


def _labelled(samples: Sequence[Sample]) -> bool:
    return any(sample.label is not None for sample in samples)


def write_measured(file: Path, identity: Mapping[str, Any], measured: Measured) -> None:
    """Keeps it. identity: the model and the sample, as JSON values.

    Raises:
        InputError: the folder cannot be written.
    """
    values = {**_header(identity), "metrics": measured.metrics, "tokens": measured.tokens}
    write_atomically(file, json.dumps(values) + "\n")


def read_measured(file: Path, identity: Mapping[str, Any]) -> Measured | None:
    """What was kept of this model and sample; None when there is no file yet.

    Raises:
        InputError: the file is damaged, or of another model, sample or release.
    """
    if not file.exists():
        return None
    try:
        values = json.loads(file.read_text())
        metrics = {str(name): float(value) for name, value in values["metrics"].items()}
        tokens = {str(name): [int(token) for token in ids] for name, ids in values["tokens"].items()}
        differs = [name for name, expected in _header(identity).items() if values.get(name) != expected]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"--reference {file} must be a file that verify wrote, it is not ({reason}); name another file"
        ) from None
    if differs:
        raise InputError(
            f"--reference {file} must be of this checkpoint, sample and release, it differs in {', '.join(differs)}; name another file"
        )
    return Measured(metrics, tokens)


def _header(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, "rsvlm_infer": __version__, "new_tokens": NEW_TOKENS, **identity}
