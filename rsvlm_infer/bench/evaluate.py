"""One evaluation from a labelled set to its scores: resumes, predicts, scores. Knows no terminal and no metric itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, RsvlmError
from ..evaluation.predictions import Predictions, PredictionWriter, header_differences, read_predictions
from ..evaluation.scoring import score_set
from ..evaluation.sets import EvaluationSet, Item
from ..models.checkpoint import folder_digest
from .output import write_atomically
from .predict import ANSWER_TOKENS, CAPTION_TOKENS, CLOSED_ANSWERS, PredictSettings, predict

SCHEMA = "rsvlm-eval/1"
LISTED_ERRORS = 20


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model on one set. `errors`: item key -> why it has no prediction; `missing`: images left out beforehand."""

    data: EvaluationSet
    header: dict[str, Any]
    scores: dict[str, Any]
    errors: dict[str, str]
    missing: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "schema": SCHEMA,
            "task": self.data.task,
            "set": describe_set(self.data),
            "model": self.header.get("model"),
            "settings": self.header.get("settings"),
            "items": len(self.data.items),
            "scored": len(self.data.items) - len(self.errors),
            "failed": len(self.errors),
            "missing_images": self.missing,
            "errors": dict(list(self.errors.items())[:LISTED_ERRORS]),
            **self.scores,
        }

    def to_text(self) -> str:
        """Lines of name and values with tabs between; confusions by how frequent they are."""
        values = self.to_dict()
        what = values["set"]
        lines = [f"set\t{what['name']}" + (f"\t{what['split']}" if what["split"] else ""), f"items\t{values['scored']}"]
        lines += [f"{name}\t{values[name]}" for name in ("failed", "missing_images") if values[name]]
        lines += [f"{name}\t{values[name]}" for name in ("tokenizer", "matcher", "protocol") if name in values]
        lines += [f"{name}\t{value:.4f}" for name, value in values["metrics"].items()]
        for group, word in (("kinds", "kind"), ("classes", "class")):
            lines += [
                f"{word}\t{name}\t{each['accuracy']:.4f}\t{each['items']}" for name, each in values.get(group, {}).items()
            ]
        if "confusion" in values:
            columns = values["confusion"]["columns"]
            wrong = [
                (count, truth, guess or "no class")
                for truth, row in values["confusion"]["counts"].items()
                for guess, count in zip(columns, row, strict=True)
                if count and guess != truth
            ]
            lines += [
                f"confused\t{truth}\t{guess}\t{count}" for count, truth, guess in sorted(wrong, key=lambda each: -each[0])
            ]
        return "\n".join(lines)

    def write(self, file: Path) -> None:
        """The values of `to_dict` as a file, never half of it."""
        write_atomically(file, json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")


def describe_set(data: EvaluationSet) -> dict[str, Any]:
    """What identifies a set in a header and in a result."""
    return {"name": data.name, "reader": data.reader, "split": data.split, "items": len(data.items), "digest": data.digest}


def checkpoint_digest(folder: Path) -> str:
    """Short hash of all files of a checkpoint that make up the model: config, weights, tokenizer, knowledge."""
    return folder_digest(folder)[:16]


def settings_to_dict(data: EvaluationSet, settings: PredictSettings) -> dict[str, Any]:
    """What changes a prediction of this task beside the model; batches do not."""
    values: dict[str, Any] = {name: value for name, value in sorted(settings.scene.items()) if value is not None}
    if data.task == "caption":
        values |= {"prompt": settings.prompt, "max_new_tokens": settings.max_new_tokens or CAPTION_TOKENS}
    elif data.task == "vqa":
        closed = {kind: list(CLOSED_ANSWERS[kind]) for kind in sorted(set(data.kinds) & CLOSED_ANSWERS.keys())}
        values |= {"max_new_tokens": settings.max_new_tokens or ANSWER_TOKENS, "closed_answers": closed}
    elif data.task == "classify":
        values |= {"method": settings.method}
    return values


def require_images(data: EvaluationSet, *, skip_missing: bool) -> tuple[EvaluationSet, int]:
    """The set to predict, and how many items were left out because their image is absent.

    Raises:
        InputError: images are absent and must not be, or all of them are, or the set has none at all.
    """
    if all(item.image is None for item in data.items):
        raise InputError(f"{data.name} holds answers but no images; add --score-only to score these answers")
    missing = data.missing()
    if missing and not (skip_missing and len(missing) < len(data.items)):
        step = "pass their folder with --images" + ("" if skip_missing else ", or leave such items out with --skip-missing")
        raise InputError(
            f"{len(missing)} of {len(data.items)} images of {data.name} are absent, the first is {missing[0].image}; {step}"
        )
    return data.without(missing), len(missing)


def predict_set(
    data: EvaluationSet,
    file: Path,
    checkpoint: Path,
    load: Callable[[], Any],
    settings: PredictSettings,
    progress: Callable[[int], Callable[[], None]],
) -> Predictions:
    """Predicts what `file` lacks, writes each prediction as it comes, and gives all of them.

    load: makes the model; not called when nothing is left to do · progress: given the number of items to come, gives what counts one.

    Raises:
        InputError: the file belongs to another set, model or setting. RsvlmError: the model cannot be loaded.
    """
    if not checkpoint.is_dir():
        load()  # says what to do about it
    header: dict[str, Any] = {
        "task": data.task,
        "set": describe_set(data),
        "model": {"checkpoint": checkpoint.name, "digest": checkpoint_digest(checkpoint)},
        "settings": settings_to_dict(data, settings),
    }
    found = read_predictions(file) if file.exists() else None
    if found is not None:
        _require_same(file, found, header)
    left = [item for item in data.items if found is None or item.key not in found.values]
    if left:
        model = load()
        header["model"] |= {"backend": model.backend.name, "precision": model.backend.precision}
        if found is not None:
            _require_same(file, found, header)
        step = progress(len(left))
        with PredictionWriter(file, header, found) as writer:
            for item, value in predict(model, data, left, settings):
                if isinstance(value, RsvlmError):
                    writer.fail(item.key, str(value))
                else:
                    writer.add(item.key, value)
                step()
    return read_predictions(file)


def score_predictions(data: EvaluationSet, predictions: Predictions, *, missing: int = 0) -> Evaluation:
    """The scores of predictions; those of a file with a header must be of this very set.

    Raises:
        InputError: predictions of another set, of unknown items, or of only a part of the items. RsvlmError: every item failed.
    """
    if predictions.header is not None:
        different = header_differences(predictions.header, {"task": data.task, "set": {"digest": data.digest}})
        if different:
            raise InputError(
                f"predictions must be of the same set and task: {'; '.join(different)}; pass the options of the run that made them"
            )
    keys = {item.key for item in data.items}
    unknown = sorted((predictions.values.keys() | predictions.errors.keys()) - keys)
    if unknown:
        raise InputError(
            f"predictions must be of items of {data.name}, got {len(unknown)} others such as {unknown[:3]}; check the file"
        )
    lacking = _lacking(data, predictions)
    if lacking:
        raise InputError(
            f"predictions must cover all {len(data.items)} items of {data.name}, {len(lacking)} lack one, the first is "
            f"{lacking[0].key!r}; run without --score-only to finish them"
        )
    if not predictions.values:
        raise RsvlmError(f"all {len(data.items)} items failed, the first with: {next(iter(predictions.errors.values()))}")
    header = predictions.header or {}
    return Evaluation(data, header, score_set(data, predictions.values), predictions.errors, missing)


def _lacking(data: EvaluationSet, predictions: Predictions) -> list[Item]:
    return [item for item in data.items if item.key not in predictions.values and item.key not in predictions.errors]


def _require_same(file: Path, found: Predictions, header: dict[str, Any]) -> None:
    if found.header is None:
        if found.end:
            raise InputError(
                f"--predictions {file} was not begun by this command; score it with --score-only, or choose another file"
            )
        return
    different = header_differences(found.header, header)
    # a setting that only the file has is a difference too
    ours = header["settings"]
    different += [
        f"settings.{name} was {value!r}, is not set" for name, value in found.header["settings"].items() if name not in ours
    ]
    if different:
        raise InputError(
            f"--predictions {file} belongs to another run: {'; '.join(different)}; choose another file, or delete this one to begin anew"
        )
