"""From a checkpoint to a TensorRT package: graphs in the form that TensorRT takes, and engines of them for each chip."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rsvlm_infer.config import RsvlmConfig
from rsvlm_infer.contract import ENGINES, HALVES, KIND_PRECISIONS, GraphContract
from rsvlm_infer.errors import InputError
from rsvlm_infer.models.load import LoadedCheckpoint, load_checkpoint

from ..linears import model_weights
from ..onnx.parts import Form, Precision
from ..package import Plan, form_contracts, model_digest, refuse_existing, write_package
from .build import build_engine
from .cache import EngineCache, EngineKey, default_cache, graph_digest, place_file
from .library import Library, load_library
from .plugins import load_plugin_module, register_plugins
from .profiles import CONTEXT, profiles


def export_tensorrt(
    checkpoint: str | Path,
    target: str | Path,
    precision: str = "fp16",
    chips: Sequence[str] = (),
    *,
    context: int | None = None,
    plugins: bool = False,
    overwrite: bool = False,
    cache: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Writes the package; engines that the cache has are not built again.

    Args:
        checkpoint: a folder of any supported layout. target: the package's folder. precision: of products and of the cache.
        chips: compute capabilities as "sm_89", one engine of each graph for each; with the full TensorRT the GPU's own, alone.
        context: places of a cache row; None = 1024, or what the model has positions for. cache: folder of engines.
        plugins: our own kernels for tile attention and experts; needs the full TensorRT, and half precision.

    Raises:
        InputError: an unknown precision or chip. MissingDependencyError: no TensorRT. BackendError: it refuses a graph.
        CheckpointError: a bad checkpoint, or a target that exists.
    """
    if precision not in KIND_PRECISIONS["tensorrt"]:
        raise InputError(
            f"--precision must be one of {list(KIND_PRECISIONS['tensorrt'])} for --format tensorrt, got {precision!r}; integer packages "
            "are for onnx and native"
        )
    if plugins and precision == "fp32":
        raise InputError("--precision must be fp16 or bf16 with --plugins, got 'fp32'; choose one of them")
    library = load_library("tensorrt" if plugins else "auto")
    if not chips:
        raise InputError(f"--chip must name at least one chip, got none; choose from {list(library.chips)} with tensorrt-rtx")
    for chip in chips:
        library.check_chip(chip)
    refuse_existing(target, overwrite)
    loaded = load_checkpoint(checkpoint)
    form = Form("tensorrt", HALVES[precision], _context(loaded.config, context), plugins)
    if plugins:
        if len(set(chips)) > 1:
            raise InputError(
                f"--chip must name the GPU's own chip alone with --plugins, got {list(chips)}; export once for each"
            )
        register_plugins(library.module, load_plugin_module(), chips[0])
    add = functools.partial(
        add_engines,
        library,
        EngineCache(default_cache() if cache is None else cache),
        loaded,
        precision,
        form,
        tuple(chips),
        report,
    )
    report(f"writing graphs at {precision}")
    plan = Plan(precision, Precision(form.products))
    return write_package(loaded, model_weights(loaded.model), plan, target, overwrite=overwrite, form=form, add=add)


def add_engines(
    library: Library,
    cache: EngineCache,
    loaded: LoadedCheckpoint,
    precision: str,
    form: Form,
    chips: Sequence[str],
    report: Callable[[str], None],
    folder: Path,
) -> dict[str, Any]:
    """Engines of the graphs in `folder`, beside them; what the manifest says about them."""
    found = []
    contracts = form_contracts(loaded.config, form)
    for chip in dict.fromkeys(chips):
        for contract in contracts.values():
            key = engine_key(library, loaded.config, contract, form, folder, model_digest(loaded.files), chip, precision)
            start = time.perf_counter()
            build = functools.partial(build_engine, library, folder / contract.file, contract, key.profiles, chip)
            file, description, built = cache.get(key, build)
            seconds = time.perf_counter() - start
            report(
                f"{contract.name} for {chip}: {description['bytes'] / 1e6:.1f} MB, "
                + (f"{seconds:.1f} s" if built else "known")
            )
            place = f"{ENGINES}/{chip}/{contract.name}.engine"
            place_file(file, folder / place)
            described = json.dumps(description, indent=2) + "\n"
            (folder / place).with_suffix(".json").write_text(described, encoding="utf-8")
            found.append({"file": place, **_short(description)})
    return {ENGINES: found}


def engine_key(
    library: Library,
    config: RsvlmConfig,
    contract: GraphContract,
    form: Form,
    folder: Path,
    model_sha256: str,
    chip: str,
    precision: str,
) -> EngineKey:
    """What the cache knows an engine of a graph in `folder` by."""
    digest = graph_digest(folder / contract.file, folder / contract.weights_file)
    buckets = profiles(config, contract, form.context)
    return EngineKey(contract.name, digest, model_sha256, library.name, library.version, chip, precision, buckets)


def _short(description: Mapping[str, Any]) -> dict[str, Any]:
    """Of a description, what a reader needs to choose and check an engine."""
    return {name: description[name] for name in ("graph", "library", "version", "chip", "precision", "sha256", "profiles")}


def _context(config: RsvlmConfig, asked: int | None) -> int:
    if config.language is None:
        return 0
    return min(CONTEXT, config.language.max_positions) if asked is None else asked
