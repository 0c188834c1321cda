"""Accuracy of one checkpoint over a whole labelled set, without clocks. Knows the labelled images and RSVLM's public calls.

RSICD's protocol: one greedy caption per image against its five sentences; the theme among all themes by zero-shot
classification; retrieval with every sentence of every image. The answers are kept, so that a number can be traced to an image.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .measure import Workload, load_model
from .output import write_atomically
from .quality import caption_quality, class_quality, classify_samples, question_quality, retrieval_quality
from .runner import describe
from .schema import Report
from .tables import Table, metric_title, quality_text, summary_lines

SCHEMA = "rsvlm-accuracy/1"


@dataclass(frozen=True)
class Prediction:
    """What the model said about one image, beside the truth; a line of predictions.jsonl."""

    image: str
    caption: str | None
    references: tuple[str, ...]
    label: str | None
    predicted_label: str | None


@dataclass(frozen=True)
class AccuracyResult:
    """Metrics of one checkpoint on one set."""

    environment: dict[str, Any]
    workload: dict[str, Any]
    backend: str
    precision: str
    metrics: dict[str, float]
    wall_s: float
    predictions: tuple[Prediction, ...]

    def table(self) -> Table:
        """Metric and value."""
        cells = tuple((metric_title(name), quality_text(name, value)) for name, value in self.metrics.items())
        title = f"Accuracy on {self.workload['image_set']}, {self.workload['images']} images ({self.backend} {self.precision})"
        return Table(title, ("metric", "value"), cells)

    def to_markdown(self) -> str:
        """The result as Markdown."""
        lines = summary_lines(Report(self.environment, self.workload, ()))
        return (
            "\n\n".join(["# Accuracy", "\n".join(f"- {name}: {value}" for name, value in lines), self.table().to_markdown()])
            + "\n"
        )

    def write(self, folder: Path) -> list[Path]:
        """accuracy.json, accuracy.md and predictions.jsonl in `folder`."""
        values = {"schema": SCHEMA, **dataclasses.asdict(self)}
        del values["predictions"], values["workload"]["references"]
        lines = (json.dumps(dataclasses.asdict(each), ensure_ascii=False) + "\n" for each in self.predictions)
        files = {
            "accuracy.json": json.dumps(values, indent=1, ensure_ascii=False) + "\n",
            "accuracy.md": self.to_markdown(),
            "predictions.jsonl": "".join(lines),
        }
        for name, text in files.items():
            write_atomically(folder / name, text)
        return [folder / name for name in files]


def measure_accuracy(
    work: Workload, backend: str, precision: str, environment: dict[str, Any], console: Console
) -> AccuracyResult:
    """Captions, classifies, asks and retrieves, as far as the images are labelled.

    Raises:
        RsvlmError: the model cannot be loaded, an image cannot be read, or an extra is missing.
    """
    samples = work.images.samples
    started = time.perf_counter()
    model = load_model(work, backend, precision)
    captioned = [sample for sample in samples if sample.captions]
    labelled = [sample for sample in samples if sample.label is not None]
    questions = sum(len(sample.questions) for sample in samples)
    scene_options = work.scene_options
    options: dict[str, Any] = {"max_new_tokens": work.max_new_tokens, **scene_options}

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    captions: dict[str, str] = {}
    metrics: dict[str, float] = {}
    predicted: dict[str, str] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:

        def steps(title: str, total: int) -> Any:
            task = bar.add_task(title, total=total)
            return lambda: bar.advance(task)

        if captioned:
            step = steps("captions", len(captioned))
            paths = [sample.path for sample in captioned]
            answers: Iterator[Any] = model.caption_many(paths, batch_size=work.offline_batch, strict=True, **options)
            for sample, answer in zip(captioned, answers, strict=True):
                captions[sample.name] = answer.text
                step()
            metrics |= caption_quality(captions, captioned)
        if labelled:
            predicted = classify_samples(model, labelled, work.images.labels, scene_options, steps("classes", len(labelled)))
            metrics |= class_quality(predicted, labelled)
        if questions:
            metrics |= question_quality(model, samples, scene_options, steps("questions", questions))
        if captioned and model.config.alignment is not None:
            metrics |= retrieval_quality(model, captioned, scene_options, steps("retrieval", len(captioned)))
    predictions = tuple(
        Prediction(sample.name, captions.get(sample.name), sample.captions, sample.label, predicted.get(sample.name))
        for sample in samples
    )
    wall_s = time.perf_counter() - started
    return AccuracyResult(
        environment, describe(work, ()), model.backend.name, model.backend.precision, metrics, round(wall_s, 1), predictions
    )
