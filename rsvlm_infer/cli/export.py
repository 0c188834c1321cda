"""Owns `rsvlm export` and `rsvlm verify`. Knows their options; what they do is rsvlm_export's, which is loaded when they run."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from ..contract import PRECISIONS
from ..errors import InputError, MissingDependencyError
from ..models.package import is_package
from ..pipeline import default_checkpoint
from . import options as opt
from .console import EXIT_ERROR, EXIT_OK, terminal

CheckpointArgument = Annotated[
    Path | None, typer.Argument(metavar="[CHECKPOINT]", help="Checkpoint folder; default is the one `rsvlm pull` makes.")
]


def export(
    checkpoint: CheckpointArgument = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the package.")] = None,
    kind: Annotated[
        str, typer.Option("--format", help="What to write: onnx, native for the C++ runtime, or tensorrt.")
    ] = "onnx",
    precision: Annotated[str, typer.Option("--precision", help=f"One of {', '.join(PRECISIONS)}.")] = "fp32",
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            help="An image or a folder of images of the kind to be seen, for int4 and int8 (native: optional).",
        ),
    ] = None,
    calibration_images: Annotated[int, typer.Option("--calibration-images", min=1, help="How many of them to use.")] = 64,
    chip: Annotated[
        list[str] | None,
        typer.Option("--chip", help="For tensorrt: a compute capability as sm_89; again for each further one."),
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", help="For tensorrt: places of a cache row; default is 1024.")
    ] = None,
    plugins: Annotated[
        bool, typer.Option("--plugins", help="For the full TensorRT: our own kernels for tile attention and experts.")
    ] = False,
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
            chips=chip or (),
            context=context,
            plugins=plugins,
            report=terminal.note,
        )
    terminal.data(str(folder))
    return EXIT_OK


def verify(
    packages: Annotated[
        list[Path], typer.Argument(metavar="PACKAGE...", help="Folders of packages, of one checkpoint and of any kind.")
    ],
    against: Annotated[
        Path | None,
        typer.Option("--against", help="The checkpoint that they were made from; default is the one `rsvlm pull` makes."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Images to compare on: RSICD's folder, class folders, or plain images.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="RSICD's split.")] = "test",
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="Images of the sample; few images cannot tell half a point.")
    ] = 200,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the choice of the sample.")] = 0,
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            metavar="FILE",
            help="Keeps here what the checkpoint says of the sample; read when it is there, not measured.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write the certificate although a gate fails; it says so.")] = False,
    output_format: opt.OutputFormat = opt.Format.text,
) -> int:
    """Prove packages against their checkpoint, graph by graph and by what they say, and write a certificate into each."""
    if data is None:
        raise InputError("--data must name images to compare on, got none; write rsvlm verify PACKAGE --data FOLDER")
    folders = [package.expanduser() for package in packages]
    for folder in folders:
        if not is_package(folder):
            raise InputError(f"{folder} is no exported package; write one with `rsvlm export`")
    proof = _load("verify")
    opened = [proof.open_package(folder) for folder in folders]
    kept = None if reference is None else reference.expanduser()
    exact = proof.Reference(_checkpoint(against), data.expanduser(), split=split, limit=limit, seed=seed, kept=kept)
    for package in opened:  # before minutes are spent
        exact.require(package)
    codes = [_verify(proof, folder, exact, force, output_format) for folder in folders]
    return max(codes)


def _verify(proof: Any, folder: Path, reference: Any, force: bool, output_format: opt.Format) -> int:
    with terminal.working(f"verifying {folder.name}"):
        verdict = proof.verify_package(folder, reference, step=terminal.note)
    written = proof.write_certificate(verdict, folder, force=force)
    if output_format is opt.Format.json:
        terminal.json(proof.certificate(verdict, folder, forced=force and not verdict.passed))
    else:
        terminal.data("\n".join(proof.report_lines(verdict)))
    if written is not None:
        terminal.note(f"wrote {written}")
    if verdict.passed:
        return EXIT_OK
    step = (
        ""
        if force
        else "; no certificate was written: export at a finer precision, or pass --force to have the failure written down"
    )
    terminal.problem(f"package {folder} fails: {'; '.join(verdict.failures)}{step}")
    return EXIT_ERROR


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
        return importlib.import_module(f"rsvlm_export.{module}")
    except ImportError as error:
        raise MissingDependencyError(
            f"this command needs rsvlm_export with torch and onnx ({error}); run pip install 'rsvlm-infer[torch,onnx]'"
        ) from None
