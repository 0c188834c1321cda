"""Owns the command `rsvlm eval`: options in, one evaluation, its scores out. Knows no metric and no format of a set."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from ..evaluation.sets import READERS, EvaluationSet, read_set
from ..pipeline import RSVLM, default_checkpoint
from . import options as opt
from .console import exit_code, terminal

RESULTS = Path("eval-results")
_SET, _RESULT = "Set", "Result"


class TaskChoice(StrEnum):
    caption = "caption"
    retrieval = "retrieval"
    classify = "classify"
    vqa = "vqa"


def evaluate(
    task: Annotated[TaskChoice, typer.Argument(help="What to score.", show_default=False)],
    source: Annotated[Path, typer.Argument(metavar="SET", help="File or folder of a labelled set.", show_default=False)],
    reader: Annotated[
        str, typer.Option("--reader", help=f"Its format: auto, {', '.join(READERS)}.", rich_help_panel=_SET)
    ] = "auto",
    split: Annotated[
        str | None, typer.Option("--split", help="Default is test, where the set has splits.", rich_help_panel=_SET)
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Folder of the images, when not beside the file.", rich_help_panel=_SET)
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option("--kind", help="Only questions of this type; repeatable.", rich_help_panel=_SET)
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="At most so many items, drawn with a fixed seed.", rich_help_panel=_SET)
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out items whose image is absent.", rich_help_panel=_SET)
    ] = False,
    predictions: Annotated[
        Path | None,
        typer.Option(
            "--predictions",
            help="JSON lines, written as they come; an interrupted run goes on from them. Default is in eval-results.",
            rich_help_panel=_RESULT,
        ),
    ] = None,
    score_only: Annotated[
        bool, typer.Option("--score-only", help="Score the predictions that are there; no model.", rich_help_panel=_RESULT)
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Also write the scores as JSON to this file.", rich_help_panel=_RESULT),
    ] = None,
    output_format: opt.OutputFormat = opt.Format.text,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What to ask for (caption).")] = None,
    method: Annotated[
        opt.MethodChoice, typer.Option("--method", help="Embeddings, or the language model (classify).")
    ] = opt.MethodChoice.auto,
    checkpoint: opt.Checkpoint = None,
    backend: opt.Backend = "auto",
    precision: opt.Precision = "auto",
    batch_size: opt.BatchSize = 4,
    bands: opt.Bands = None,
    max_pixels: opt.MaxPixels = None,
    tiling: opt.Tiling = None,
    max_tiles: opt.MaxTiles = None,
    max_visual_tokens: opt.MaxVisualTokens = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", min=1, help="Longest answer; default 32 (caption), 16 (vqa).", rich_help_panel="Model"
        ),
    ] = None,
) -> int:
    """Score a model on a labelled set: captions, retrieval, classes or answers. Greedy; goes on where a killed run stopped."""
    from ..bench.evaluate import predict_set, require_images, score_predictions
    from ..bench.predict import PredictSettings
    from ..evaluation.predictions import Predictions, read_predictions

    scene = opt.scene_options(bands, max_pixels, tiling, max_tiles, max_visual_tokens)
    data = _chosen(read_set(source, task.value, reader=reader, split=split, images=images), kind, limit)
    missing = 0
    if score_only and predictions is None:
        if not data.answers:
            raise InputError(
                "--score-only needs predictions to score; add --predictions FILE, or name a set with answers inside"
            )
        keys = {item.key for item in data.items}
        found = Predictions(None, {key: answer for key, answer in data.answers.items() if key in keys})
    elif score_only:
        assert predictions is not None
        if skip_missing:
            data, missing = require_images(data, skip_missing=True)
        found = read_predictions(predictions)
    else:
        data, missing = require_images(data, skip_missing=skip_missing)
        given = {name: value for name, value in scene.items() if value is not None}
        settings = PredictSettings(max_new_tokens, batch_size, prompt, method.value, given)
        file = predictions or RESULTS / f"{_slug(data)}.jsonl"
        folder = default_checkpoint() if checkpoint is None else checkpoint.expanduser()
        terminal.note(f"predictions go to {file}")

        def load() -> RSVLM:
            with terminal.working("loading the checkpoint"):
                return RSVLM.from_pretrained(checkpoint, backend, precision)

        with _Counting(task.value) as counting:
            found = predict_set(data, file, folder, load, settings, counting.start)
    result = score_predictions(data, found, missing=missing)
    for key, reason in result.errors.items():
        terminal.problem(f"{key}: {reason}")
    if output is not None:
        result.write(output)
        terminal.note(f"wrote {output}")
    terminal.json(result.to_dict()) if output_format is opt.Format.json else terminal.data(result.to_text())
    return exit_code(len(result.errors), len(data.items))


class _Counting:
    """A bar that starts when it is known how many items are left."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._working: Any = None

    def __enter__(self) -> _Counting:
        return self

    def __exit__(self, *problem: Any) -> None:
        if self._working is not None:
            self._working.__exit__(*problem)

    def start(self, total: int) -> Callable[[], None]:
        self._working = terminal.working(self._label, total)
        advance: Callable[[], None] = self._working.__enter__().advance
        return advance


def _chosen(data: EvaluationSet, kinds: list[str] | None, limit: int | None) -> EvaluationSet:
    if kinds:
        data = data.of_kinds(kinds)
    return data if limit is None else data.limited(limit)


def _slug(data: EvaluationSet) -> str:
    """A file name: task, set and split."""
    words = " ".join(filter(None, (data.task, data.name, data.split)))
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
