"""Ways to run one model. Owns the choice of a backend; knows no engine, no text, no raster."""

from __future__ import annotations

import functools
import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

from ..contract import KIND_PRECISIONS
from ..errors import BackendError, MissingDependencyError
from ..hardware import native_why_not
from ..models.package import is_package, package_kind, read_manifest
from .base import Backend, DraftingBackend, Embeddings, GreedyBackend, ImageFeatures, Prompt, Query

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendChoice",
    "DraftingBackend",
    "Embeddings",
    "GreedyBackend",
    "ImageFeatures",
    "Prompt",
    "Query",
    "choose_backend",
    "load_backend",
    "require_backend",
    "why_not",
]

_log = logging.getLogger(__name__)

# Backend -> precisions, in order of preference. Preference is data; capability is why_not().
BACKENDS: dict[str, tuple[str, ...]] = {
    "eager": ("float32", "bfloat16", "float16"),
    "native": KIND_PRECISIONS["native"],  # of the package that it reads; "auto" takes it for one
    # after eager, so "auto" does not choose it: no GPU has run it yet; int8 and int4: weights of the language model's layers
    "cuda": ("bfloat16", "float16", "float32", "int8", "int4"),
    "tensorrt": KIND_PRECISIONS["tensorrt"],  # of the package that it reads; no GPU has run it yet
    "onnx": KIND_PRECISIONS["onnx"],  # reads exported packages, which nothing else does; the package decides its precision
}


def why_not(name: str) -> str | None:
    """Why this backend cannot run here; None when it can. `onnx:cuda` asks for a provider of onnxruntime; `onnx` is its CPU.

    Raises:
        BackendError: no such backend.
    """
    name, _, _ = name.partition(":") if name.startswith("onnx:") else (name, "", "")
    if name not in BACKENDS:
        raise BackendError(f'backend must be "auto" or one of {sorted(BACKENDS)}, got {name!r}; choose one of them')
    if name == "native":
        return native_why_not()
    if name == "onnx":
        from .onnx import why_not as onnx_why_not

        return onnx_why_not()
    if name == "tensorrt":
        from .tensorrt import why_not as tensorrt_why_not

        return tensorrt_why_not()
    if importlib.util.find_spec("torch") is None:
        return 'torch is not installed; run pip install "rsvlm-infer[torch]"'
    if name == "cuda":
        from .cuda import why_not as cuda_why_not

        return cuda_why_not()
    return None


@dataclass(frozen=True)
class BackendChoice:
    """What "auto" takes, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def choose_backend(path: str | Path) -> BackendChoice:
    """What "auto" runs a folder on: the folder alone decides, so the same folder gives the same answers everywhere.

    A package runs on the backend that it was made for; a checkpoint on eager, whose arithmetic is what the others are held to. Nothing
    is measured, and no package that lies near a checkpoint is taken in its place; see docs/adr/0011-the-folder-chooses-the-backend.md.
    """
    kind = package_kind(path)
    if kind is not None:
        return BackendChoice(kind, "the folder is a package for it")
    first = next(iter(BACKENDS))
    return BackendChoice(
        first, "the folder is a checkpoint, which runs on the reference; `rsvlm export` makes faster packages of it"
    )


@functools.cache
def _say(choice: BackendChoice, path: str) -> None:
    """Once for each folder."""
    _log.info("backend auto for %s is %s", path, choice)


def require_backend(path: str | Path, name: str = "auto", precision: str = "auto") -> tuple[str, str]:
    """The backend and the precision that `load_backend` would take; only configs and manifests are read.

    Raises:
        BackendError: an unknown backend or precision, or one that does not read this kind of folder. MissingDependencyError: none can
            run here. CheckpointError: a manifest that this version does not read.
    """
    reader = package_kind(path)  # a kind has the name of the backend that reads it
    chosen = name
    if name == "auto":
        choice = choose_backend(path)
        chosen = choice.name
        _say(choice, str(path))
    reason = why_not(chosen)
    if reason is not None:
        raise MissingDependencyError(f"backend {chosen!r} cannot run here: {reason}")
    asked = chosen.partition(":")[0]
    if (asked if asked in ("native", "onnx", "tensorrt") else None) != reader:
        kind = "a checkpoint" if reader is None else f"an exported package for {reader!r}"
        step = f'use {reader!r} or "auto"' if reader else "export it first with `rsvlm export`, or use another backend"
        raise BackendError(f"backend {chosen!r} does not read {path}, which is {kind}; {step}")
    if reader is not None:
        own = str(read_manifest(Path(path))["precision"])
        if precision not in ("auto", own):
            raise BackendError(
                f'precision of this package is {own}, asked was {precision!r}; use "auto", or export it with --precision {precision}'
            )
        return chosen, own
    precisions = BACKENDS[chosen]
    if precision != "auto" and precision not in precisions:
        raise BackendError(
            f'precision of backend {chosen!r} must be "auto" or one of {list(precisions)}, got {precision!r}; choose one'
        )
    return chosen, precisions[0] if precision == "auto" else precision


def load_backend(path: str | Path, name: str = "auto", precision: str = "auto", *, verify: bool = True) -> Backend:
    """Loads a checkpoint folder, or an exported package, into a backend.

    Args:
        path: checkpoint or package folder. name: "auto" = see `choose_backend`. precision: "auto" = the package's, else the backend's
            first. verify: read all files of a package and compare their sha256; False is for who has done that.

    Raises:
        BackendError: an unknown backend or precision, or one that does not read this kind of folder. MissingDependencyError: none can
            run here. CheckpointError: a bad folder.
    """
    chosen, precision = require_backend(path, name, precision)
    if is_package(path):
        return _load_package(Path(path), chosen, verify)
    if chosen == "cuda":
        from .cuda import CudaBackend

        return CudaBackend.load(Path(path), precision)
    from .eager import EagerBackend

    return EagerBackend.load(Path(path), precision)


def _load_package(path: Path, name: str, verify: bool) -> Backend:
    if name == "native":
        from .native import NativeBackend

        return NativeBackend.load(path, verify=verify)
    if name == "tensorrt":
        from .tensorrt import TensorrtBackend

        return TensorrtBackend.load(path, verify=verify)
    from .onnx import OnnxBackend

    return OnnxBackend.load(path, name.partition(":")[2] or "cpu", verify=verify)
