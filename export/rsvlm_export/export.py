"""From a checkpoint folder to a package at one precision: the whole way, in one function. Knows no command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rsvlm_infer.contract import PRECISIONS
from rsvlm_infer.errors import InputError
from rsvlm_infer.models.load import load_checkpoint

from .linears import model_weights
from .onnx.parts import Precision
from .package import Plan, write_package

FORMATS = ("onnx",)
STORED = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def export_checkpoint(
    checkpoint: str | Path,
    target: str | Path,
    *,
    format: str = "onnx",  # noqa: A002 - the option's own name
    precision: str = "fp32",
    overwrite: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Exports a checkpoint.

    Args:
        checkpoint: a folder of any supported layout. target: the package's folder.
        precision: one of `PRECISIONS`. report: takes one line per step.

    Returns:
        The package's folder.

    Raises:
        InputError: an unknown format or precision. CheckpointError: a bad checkpoint, or a target that exists.
    """
    if format not in FORMATS:
        raise InputError(f"--format must be one of {list(FORMATS)}, got {format!r}; choose one of them")
    if precision not in PRECISIONS:
        raise InputError(f"--precision must be one of {list(PRECISIONS)}, got {precision!r}; choose one of them")
    loaded = load_checkpoint(checkpoint)
    weights = model_weights(loaded.model)
    plan = Plan(precision, Precision(STORED[precision]))
    report(f"writing graphs at {precision}")
    return write_package(loaded, weights, plan, target, overwrite=overwrite)
