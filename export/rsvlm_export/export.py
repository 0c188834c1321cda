"""From a checkpoint folder to a package at one precision: the whole way, in one function. Knows no command line."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rsvlm_infer.contract import PRECISIONS
from rsvlm_infer.errors import InputError
from rsvlm_infer.models.load import LoadedCheckpoint, load_checkpoint

from .calibrate import caption_images, find_images, watch
from .calibration_texts import calibrate as calibrate_language
from .calibration_texts import calibration_sentences
from .layerwise import calibration_summary, layer_entries, round_language
from .linears import model_weights
from .native import LanguagePlan, export_native
from .onnx.parts import Precision
from .package import Plan, refuse_existing, write_package
from .quantize import quantize, wants_hessian
from .refit import refit_projection
from .text_projection import TextProjection

FORMATS = ("onnx", "native", "tensorrt")
# How far a 4-bit language model may be from the exact one: nats a token of held-out answers, 1 - cosine of held-out embedded texts.
# Why these: docs/packages.md
LIMITS = {"divergence": 0.01, "turn": 0.008}
# at 64 visual tokens, prompt and caption some 7,000 rows: compensation needs several for each of a layer's inputs
CALIBRATION_IMAGES = 64
STORED = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def export_checkpoint(
    checkpoint: str | Path,
    target: str | Path,
    *,
    format: str = "onnx",  # noqa: A002 - the option's own name
    precision: str = "fp32",
    overwrite: bool = False,
    calibrate: str | Path | None = None,
    calibration_images: int = CALIBRATION_IMAGES,
    chips: Sequence[str] = (),
    context: int | None = None,
    plugins: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Exports a checkpoint.

    Args:
        checkpoint: a folder of any supported layout. target: the package's folder.
        format: "onnx", "native" for the C++ runtime (no fp16), or "tensorrt" (fp16, bf16, fp32). precision: one of `PRECISIONS`.
        report: takes one line per step.
        calibrate: for int4, int8 of onnx, and, as one likes, int8 of native: an image, a folder of images, or RSICD's folder, of which
            the train split is taken; at most `calibration_images` of them are captioned.
        chips, context, plugins: for tensorrt, see `tensorrt.export.export_tensorrt`.

    Returns:
        The package's folder.

    Raises:
        InputError: an unknown format or precision. CheckpointError: a bad checkpoint, or a target that exists.
    """
    if format not in FORMATS:
        raise InputError(f"--format must be one of {list(FORMATS)}, got {format!r}; choose one of them")
    if precision not in PRECISIONS:
        raise InputError(f"--precision must be one of {list(PRECISIONS)}, got {precision!r}; choose one of them")
    if calibrate is not None and format == "tensorrt":
        raise InputError("--calibrate must be left out for --format tensorrt, which needs no images; leave it out")
    if format != "tensorrt" and (chips or context is not None or plugins):
        raise InputError(
            f"--chip, --context and --plugins must be left out for --format {format}; leave them out, or use tensorrt"
        )
    if format == "tensorrt":
        from .tensorrt.export import export_tensorrt

        return export_tensorrt(
            checkpoint, target, precision, chips, context=context, plugins=plugins, overwrite=overwrite, report=report
        )
    if format == "native":
        return _native(checkpoint, target, precision, overwrite, calibrate, calibration_images, report)
    images = _calibration_images(precision, calibrate, calibration_images)
    refuse_existing(target, overwrite)  # before minutes of calibration
    loaded = load_checkpoint(checkpoint)
    weights = model_weights(loaded.model)
    if precision in STORED:
        plan = Plan(precision, Precision(STORED[precision]))
    else:
        report(f"captioning {len(images)} images to see what goes through each layer")
        run = functools.partial(
            caption_images, loaded.model, loaded.folder, images, lambda done: report(f"{done} of {len(images)} images")
        )
        seen = watch(loaded.model, weights.linears.values(), wants_hessian(precision), run)
        report(f"rounding {len(seen)} layers")
        plan = quantize(weights, seen, precision)
        finer = [layer["name"] for layer in plan.layers if layer["kept"] != layer["asked"]]
        report(f"{len(finer)} of {len(plan.layers)} layers kept finer than asked: {', '.join(finer) or 'none'}")
    report(f"writing graphs at {precision}")
    return write_package(loaded, weights, plan, target, overwrite=overwrite)


def _native(
    checkpoint: str | Path,
    target: str | Path,
    precision: str,
    overwrite: bool,
    calibrate: str | Path | None,
    limit: int,
    report: Callable[[str], None],
) -> Path:
    if precision in STORED and calibrate is not None:
        raise InputError(
            f"--calibrate must be left out for --format native --precision {precision}, which rounds without images; leave it out"
        )
    if precision in STORED or (precision == "int8" and calibrate is None):
        report(f"laying out weights at {precision}")
        return export_native(checkpoint, target, precision, overwrite=overwrite)
    images = _calibration_images(precision, calibrate, limit)
    refuse_existing(target, overwrite)  # before minutes of calibration
    loaded = load_checkpoint(checkpoint)
    if loaded.model.language_model is None or loaded.config.text_encoder is not None:
        return export_native(loaded, target, precision, overwrite=overwrite)  # it has nothing to round, or is refused there
    plan, notes = None, dict[str, Any]()
    if precision == "int4":
        plan, notes, fitted, held_out = _rounded(loaded, images, report)
    else:
        fitted, held_out = calibration_sentences(loaded, images, lambda done: report(f"{done} of {len(images)} images"))
    if loaded.config.alignment is None:
        report("no text is embedded, so no projection is fitted")
        return export_native(loaded, target, precision, overwrite=overwrite, plan=plan, notes=notes)
    report(f"fitting the text projection to {len(fitted)} sentences")
    parameters, projection = refit_projection(loaded, precision, plan, fitted, held_out)
    report(f"embedded texts turn by {projection['turn']['after']:.4g} instead of {projection['turn']['before']:.4g}")
    notes["calibration"] = {**notes.get("calibration", {}), "text_projection": projection}
    return export_native(loaded, target, precision, overwrite=overwrite, plan=plan, fitted=parameters, notes=notes)


def _rounded(
    loaded: LoadedCheckpoint, images: list[Path], report: Callable[[str], None]
) -> tuple[LanguagePlan, dict[str, Any], list[str], list[str]]:
    """The int4 plan, what the manifest says of it, and the sentences to fit and to hold out."""
    assert loaded.model.language_model is not None
    report(f"captioning {len(images)} images to see what goes through each layer")
    found = calibrate_language(loaded, images, lambda done: report(f"{done} of {len(images)} images"))
    projection = None if loaded.model.alignment is None else TextProjection.of(loaded.model.alignment)
    language = round_language(loaded.model.language_model, found.texts, LIMITS, report, projection=projection)
    layers = layer_entries(language)
    finer = [layer["name"] for layer in layers if layer["kept"] != layer["asked"]]
    report(f"{len(finer)} of {len(layers)} matrices kept finer than asked: {', '.join(finer) or 'none'}")
    notes = {"layers": layers, "calibration": dict(calibration_summary(found.texts, language))}
    return LanguagePlan(language.kinds, language.packed), notes, found.fitted, found.held_out


def _calibration_images(precision: str, path: str | Path | None, limit: int) -> list[Path]:
    if precision in STORED:
        return []
    if path is None:
        raise InputError(
            f"--calibrate must name images for --precision {precision}, got none; pass a folder with images of the kind to be seen"
        )
    if limit < 1:
        raise InputError(f"--calibration-images must be at least 1, got {limit}; raise it")
    return find_images(Path(path).expanduser(), limit)
