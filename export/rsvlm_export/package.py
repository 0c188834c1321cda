"""Writes a package: graphs, config, tokenizer, knowledge and manifest, whole or not at all. Knows no rounding and no proof.

`write_folder` is the part that every kind of package shares, so that one reader (`rsvlm_infer.models.package`) checks them all.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rsvlm_infer
from rsvlm_infer.config import RsvlmConfig
from rsvlm_infer.contract import (
    ALIGN,
    ARCHITECTURE,
    BRIDGE,
    CONFIG,
    CUE_SEARCH,
    DECODER,
    FORMAT,
    FORMAT_VERSION,
    HALVES,
    KNOWLEDGE,
    MANIFEST,
    OPSETS,
    PREPROCESSING,
    TEXT_EMBED,
    TOKENIZER_FILES,
    VISION,
    WORD_EMBED,
    GraphContract,
    graph_contracts,
)
from rsvlm_infer.errors import CheckpointError
from rsvlm_infer.models.checkpoint import replace_folder, sha256_of
from rsvlm_infer.models.load import LoadedCheckpoint

from .linears import ModelWeights
from .onnx.builder import Graph, WeightFile
from .onnx.language import build_decoder, build_text_embed, build_word_embed
from .onnx.parts import Form, Precision, Source
from .onnx.scene import build_align, build_bridge, build_cue_search
from .onnx.vision import build_vision

SOFTWARE = ("onnx", "onnxruntime", "numpy", "torch")


@dataclass(frozen=True)
class Plan:
    """How each weight is kept, and what the manifest says about it. `layers`: one JSON object per Linear that was rounded."""

    name: str
    precision: Precision = field(default_factory=Precision)
    layers: tuple[dict[str, Any], ...] = ()


def write_package(
    loaded: LoadedCheckpoint,
    weights: ModelWeights,
    plan: Plan,
    target: str | Path,
    *,
    overwrite: bool = False,
    form: Form | None = None,
    add: Callable[[Path], dict[str, Any]] = lambda folder: {},
) -> Path:
    """A package of graphs.

    Args:
        loaded: the checkpoint, for its config, files and provenance. weights: its numbers. plan: how they are kept.
        target: must not exist, unless `overwrite`. form: which runtime the graphs are for; None = onnxruntime.
        add: writes more files beside the finished graphs and returns what the manifest says about them.

    Raises:
        CheckpointError: the target exists, or the model cannot be exported.
    """
    chosen = Form() if form is None else form

    def fill(folder: Path) -> dict[str, Any]:
        write_graphs(loaded.config, Source(weights, plan.precision, chosen), folder)
        return {
            **({"context": chosen.context} if chosen.context else {}),
            "stored": plan.precision.stored,
            "layers": list(plan.layers),
            "graphs": {name: contract.to_dict() for name, contract in form_contracts(loaded.config, chosen).items()},
            **add(folder),
        }

    return write_folder(loaded, target, chosen.kind, plan.name, fill, overwrite=overwrite)


def write_folder(
    loaded: LoadedCheckpoint,
    target: str | Path,
    kind: str,
    precision: str,
    fill: Callable[[Path], dict[str, Any]],
    *,
    overwrite: bool = False,
) -> Path:
    """What every package has, around what its kind has: into a temporary sibling folder, which is renamed.

    Args:
        fill: writes the kind's own files into a folder and returns what the manifest says about them.

    Raises:
        CheckpointError: the target exists, or the model cannot be exported.
    """
    folder = Path(target)
    refuse_existing(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        config_file = temporary / CONFIG
        config_file.write_text(_json(loaded.config.to_dict()), encoding="utf-8")
        mode = config_file.stat().st_mode  # what the umask gives to new files
        temporary.chmod(mode & 0o777 | (mode & 0o444) >> 2)  # mkdtemp gives 0700: readable becomes enterable
        (temporary / PREPROCESSING).write_text(_json(preprocessing(loaded.config)), encoding="utf-8")
        for name in TOKENIZER_FILES:
            if (loaded.folder / name).is_file():
                shutil.copyfile(loaded.folder / name, temporary / name)
        if loaded.knowledge_folder is not None:
            shutil.copytree(loaded.knowledge_folder, temporary / KNOWLEDGE)
        own = fill(temporary)
        manifest = _manifest(loaded, temporary, {"kind": kind, "precision": precision}, own)
        (temporary / MANIFEST).write_text(_json(manifest), encoding="utf-8")
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def refuse_existing(target: str | Path, overwrite: bool) -> None:
    """Raises CheckpointError when something stands where the package goes and may not be replaced."""
    if Path(target).exists() and not overwrite:
        raise CheckpointError(f"package folder {target} exists and is not overwritten; choose another one or pass --overwrite")


def write_graphs(config: RsvlmConfig, source: Source, folder: Path) -> None:
    """All graphs of a config and their weight files."""
    builders: dict[str, Callable[[Graph], None]] = {
        VISION: lambda g: build_vision(g, source, config.vision),
        CUE_SEARCH: lambda g: build_cue_search(g, source),
        TEXT_EMBED: lambda g: build_text_embed(g, source, config),
        BRIDGE: lambda g: build_bridge(g, source, config),
        WORD_EMBED: lambda g: build_word_embed(g, source),
    }
    if config.alignment is not None:
        alignment = config.alignment
        builders[ALIGN] = lambda g: build_align(g, source, alignment, config.vision.layer_norm_eps)
    if config.language is not None:
        language = config.language
        builders[DECODER] = lambda g: build_decoder(g, source, language)
    files: dict[str, WeightFile] = {}
    for contract in form_contracts(config, source.form).values():
        build_graph(contract, builders[contract.name], folder, files, source.form.kind)


def form_contracts(config: RsvlmConfig, form: Form) -> dict[str, GraphContract]:
    """What graphs of this form have to keep to."""
    precision = next(name for name, dtype in HALVES.items() if dtype == form.products)
    return graph_contracts(config, form.kind, precision, form.context)


def build_graph(
    contract: GraphContract, build: Callable[[Graph], None], folder: Path, files: dict[str, WeightFile], kind: str = "onnx"
) -> Path:
    """One graph, its weights behind those that other graphs already put into the same file."""
    weight_file = files.setdefault(contract.weights_file, WeightFile(folder / contract.weights_file))
    graph = Graph(contract, weight_file, kind)
    build(graph)
    return graph.finish(folder)


def preprocessing(config: RsvlmConfig) -> dict[str, Any]:
    """What a program that makes patches itself has to know, out of config.json."""
    values = config.to_dict()
    picked = {name: values[name] for name in ("preprocess", "tiling", "dris", "grid_pinpoints")}
    return {"patch_size": config.vision.patch_size, "patch_layout": "channel, y, x", **picked}


def model_digest(files: Mapping[str, str]) -> str:
    """Hex sha256 that names a checkpoint by the sha256 of its config and weights."""
    return hashlib.sha256("\n".join(f"{name} {digest}" for name, digest in sorted(files.items())).encode()).hexdigest()


def _manifest(loaded: LoadedCheckpoint, folder: Path, head: dict[str, str], own: dict[str, Any]) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "architecture": ARCHITECTURE,
        **head,
        "model": {
            "sha256": model_digest(loaded.files),
            "files": loaded.files,
            "layout": loaded.layout,
            "embedder": loaded.embedder,
        },
        **own,
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files
        },
        "software": {
            "rsvlm_infer": rsvlm_infer.__version__,
            **({"opset": OPSETS[head["kind"]]} if head["kind"] in OPSETS else {}),
            "python": platform.python_version(),
            **{name: _version(name) for name in SOFTWARE},
        },
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"
