"""Owns the options that several commands share, and their way into settings. Knows typer, no model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..engine.checks import check_text
from ..errors import InputError
from ..pipeline import AnswerOptions, SceneOptions
from ..tasks.generation import GenerationSettings
from ..tasks.scene import SceneSettings


class Format(StrEnum):
    text = "text"
    json = "json"


class TilingChoice(StrEnum):
    fixed = "fixed"
    anyres = "anyres"
    dris = "dris"


class MethodChoice(StrEnum):
    auto = "auto"
    alignment = "alignment"
    language = "language"


_MODEL, _IMAGE, _TEXT = "Model", "Image", "Generation"

Images = Annotated[
    list[str], typer.Argument(metavar="IMAGE...", help="Image files: JPEG, PNG, WebP, TIFF, GeoTIFF.", show_default=False)
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint", "-c", help="Checkpoint folder; default is the one `rsvlm pull` makes.", rich_help_panel=_MODEL
    ),
]
Backend = Annotated[str, typer.Option("--backend", help="What runs the model; see `rsvlm doctor`.", rich_help_panel=_MODEL)]
Precision = Annotated[str, typer.Option("--precision", help="Number format of the weights.", rich_help_panel=_MODEL)]
Bands = Annotated[
    str | None,
    typer.Option("--bands", metavar="R,G,B", help="Bands to show, counted from 1: three or one.", rich_help_panel=_IMAGE),
]
MaxPixels = Annotated[
    int | None,
    typer.Option("--max-pixels", min=1, help="Refuse plain images with more pixels.", rich_help_panel=_IMAGE),
]
Tiling = Annotated[
    TilingChoice | None,
    typer.Option("--tiling", help="How a scene becomes tiles; default from the checkpoint.", rich_help_panel=_IMAGE),
]
MaxTiles = Annotated[int | None, typer.Option("--max-tiles", min=1, help="Budget of tiles (dris).", rich_help_panel=_IMAGE)]
MaxVisualTokens = Annotated[
    int | None, typer.Option("--max-visual-tokens", min=1, help="Budget of visual tokens.", rich_help_panel=_IMAGE)
]
OutputFormat = Annotated[Format, typer.Option("--format", "-f", help="text, or json: one object per line.")]
WithPlan = Annotated[bool, typer.Option("--plan", help="Add the tile plan to the JSON.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.", rich_help_panel=_TEXT)]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.", rich_help_panel=_TEXT)]
TopP = Annotated[
    float, typer.Option("--top-p", max=1.0, help="Smallest set of tokens with this probability.", rich_help_panel=_TEXT)
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the draws, when the temperature is not 0.", rich_help_panel=_TEXT)]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="End the text before this string; repeatable.", rich_help_panel=_TEXT)
]
Choice = Annotated[
    list[str] | None, typer.Option("--choice", help="Allow only these answers; repeat it.", rich_help_panel=_TEXT)
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images that run together.", rich_help_panel=_MODEL)]
Stream = Annotated[
    bool | None,
    typer.Option("--stream/--no-stream", help="Show the text as it is written; default for one image on a terminal."),
]


def scene_options(
    bands: str | None,
    max_pixels: int | None,
    tiling: TilingChoice | None,
    max_tiles: int | None,
    max_visual_tokens: int | None,
) -> SceneOptions:
    """Checked keyword options of the pipeline.

    Raises:
        InputError: a value out of its range, or bands that are no numbers.
    """
    options = SceneOptions(
        bands=parse_bands(bands),
        max_pixels=max_pixels,
        tiling=None if tiling is None else tiling.value,
        max_tiles=max_tiles,
        max_visual_tokens=max_visual_tokens,
    )
    SceneSettings(**options)
    return options


def answer_options(
    scene: SceneOptions, max_new_tokens: int, temperature: float, top_p: float, seed: int, stop: list[str] | None
) -> AnswerOptions:
    """Checked keyword options of the pipeline's answers.

    Raises:
        InputError: a value out of its range.
    """
    settings = GenerationSettings(max_new_tokens, temperature, top_p, seed, tuple(stop or ()))
    return AnswerOptions(
        **scene,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=settings.stops,
    )


def check_plan(plan: bool, output_format: Format) -> None:
    """Raises InputError for --plan in text, which has no place for it."""
    if plan and output_format is not Format.json:
        raise InputError(f"--plan needs --format json, got --format {output_format}; add --format json, or use rsvlm plan")


def check_words(name: str, words: str | None) -> None:
    """Raises InputError for a prompt or question that is given and blank or no text."""
    if words is None:
        return
    check_text(name, words)
    if not words.strip():
        raise InputError(f"{name} must not be blank, got {words!r}; write some words")


def parse_bands(text: str | None) -> tuple[int, ...] | None:
    """The text 3,2,1 -> (3, 2, 1)."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--bands must be numbers with commas, got {text!r}; write for example --bands 3,2,1") from None


def parse_labels(labels: str | None, labels_file: Path | None) -> list[str]:
    """The labels of --labels or of --labels-file.

    Raises:
        InputError: both, neither, or a file that cannot be read.
    """
    if (labels is None) == (labels_file is None):
        raise InputError(
            "give the labels by either --labels or --labels-file, got both or neither; write --labels forest,harbor"
        )
    if labels is not None:
        return [label.strip() for label in labels.split(",")]
    assert labels_file is not None
    try:
        return [line.strip() for line in labels_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--labels-file {labels_file} cannot be read ({error}); pass a text file with one label on each line"
        ) from None
