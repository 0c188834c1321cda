"""Owns `rsvlm export` and `rsvlm verify`. Knows their options; what they do is rsvlm_export's, which is loaded when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..contract import PRECISIONS
from ..errors import InputError, MissingDependencyError
from ..models.package import is_package
from ..pipeline import default_checkpoint
from . import options as opt
from .console import EXIT_OK, terminal

CheckpointArgument = Annotated[
    Path | None, typer.Argument(metavar="[CHECKPOINT]", help="Checkpoint folder; default is the one `rsvlm pull` makes.")
]


def export(
    checkpoint: CheckpointArgument = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the package.")] = None,
    kind: Annotated[str, typer.Option("--format", help="What to write: onnx.")] = "onnx",
    precision: Annotated[str, typer.Option("--precision", help=f"One of {', '.join(PRECISIONS)}.")] = "fp32",
    calibrate: Annotated[
        Path | None,
        typer.Option("--calibrate", help="An image or a folder of images of the kind to be seen, for int8 and int4."),
    ] = None,
    calibration_images: Annotated[int, typer.Option("--calibration-images", min=1, help="How many of them to use.")] = 24,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing package.")] = False,
) -> int:
    """Write a package that runs without torch: graphs, config, tokenizer, knowledge and manifest in one folder."""
    source = _checkpoint(checkpoint)
    if output is None:
        raise InputError("--output must name the package's folder, got none; write rsvlm export CHECKPOINT -o PACKAGE")
    export_checkpoint = _load("export").export_checkpoint
    with terminal.working("exporting"):
        folder = export_checkpoint(
            source,
            output.expanduser(),
            format=kind,
            precision=precision,
            overwrite=overwrite,
            calibrate=calibrate,
            calibration_images=calibration_images,
            report=terminal.note,
        )
    terminal.data(str(folder))
    return EXIT_OK


def _checkpoint(checkpoint: Path | None) -> Path:
    folder = default_checkpoint() if checkpoint is None else checkpoint.expanduser()
    if not folder.is_dir():
        raise InputError(f"checkpoint folder {folder} does not exist; pass a checkpoint folder, or run `rsvlm pull`")
    if is_package(folder):
        raise InputError(f"{folder} is an exported package already; pass the checkpoint that it was made from")
    return folder


def _load(module: str) -> Any:
    """A module of rsvlm_export.

    Raises:
        MissingDependencyError: the package or a library of the extras [torch] and [onnx] is not installed.
    """
    try:
        if module == "export":
            from rsvlm_export import export as found
        else:
            raise AssertionError(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"this command needs rsvlm_export with torch and onnx ({error}); run pip install 'rsvlm-infer[torch,onnx]'"
        ) from None
    return found


# the type of options that the commands here share with others
OutputFormat = opt.OutputFormat
