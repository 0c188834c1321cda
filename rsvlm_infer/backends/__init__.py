"""Ways to run one model. Owns the choice of a backend; knows no engine, no text, no raster."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..contract import PRECISIONS
from ..errors import BackendError, MissingDependencyError
from ..models.package import Package, is_package
from .base import Backend, Embeddings, GreedyBackend, ImageFeatures, Prompt, Query

__all__ = ["BACKENDS", "Backend", "Embeddings", "GreedyBackend", "ImageFeatures", "Prompt", "Query", "load_backend", "why_not"]

# Backend -> precisions, in order of preference. Preference is data; capability is why_not().
BACKENDS: dict[str, tuple[str, ...]] = {
    "eager": ("float32", "bfloat16", "float16"),
    # after eager, so "auto" does not choose it: no GPU has run it yet; int8 and int4: weights of the language model's layers
    "cuda": ("bfloat16", "float16", "float32", "int8", "int4"),
    "onnx": PRECISIONS,  # reads exported packages, which nothing else does; the package decides its precision
}


def why_not(name: str) -> str | None:
    """Why this backend cannot run here; None when it can. `onnx:cuda` asks for a provider of onnxruntime; `onnx` is its CPU.

    Raises:
        BackendError: no such backend.
    """
    name, _, _ = name.partition(":") if name.startswith("onnx:") else (name, "", "")
    if name not in BACKENDS:
        raise BackendError(f'backend must be "auto" or one of {sorted(BACKENDS)}, got {name!r}; choose one of them')
    if name == "onnx":
        from .onnx import why_not as onnx_why_not

        return onnx_why_not()
    if importlib.util.find_spec("torch") is None:
        return 'torch is not installed; run pip install "rsvlm-infer[torch]"'
    if name == "cuda":
        from .cuda import why_not as cuda_why_not

        return cuda_why_not()
    return None


def load_backend(path: str | Path, name: str = "auto", precision: str = "auto") -> Backend:
    """Loads a checkpoint folder, or an exported package, into a backend.

    Args:
        path: the folder. name: "auto" = the first backend that can run it. precision: "auto" = the backend's first, or the package's.

    Raises:
        BackendError: an unknown backend or precision, or one that does not read this kind of folder. MissingDependencyError: none can
            run here. CheckpointError: a bad folder.
    """
    packaged = is_package(path)
    chosen = ("onnx" if packaged else next(iter(BACKENDS))) if name == "auto" else name
    reason = why_not(chosen)
    if reason is not None:
        raise MissingDependencyError(f"backend {chosen!r} cannot run here: {reason}")
    if packaged != chosen.startswith("onnx"):
        raise BackendError(
            f"backend {chosen!r} does not read {path}, which is {'an exported package' if packaged else 'a checkpoint'}; "
            + ('use "onnx" or "auto"' if packaged else "export it first with `rsvlm export`, or use another backend")
        )
    if packaged:
        return _load_package(Path(path), chosen, precision)
    precisions = BACKENDS[chosen]
    if precision != "auto" and precision not in precisions:
        raise BackendError(
            f'precision of backend {chosen!r} must be "auto" or one of {list(precisions)}, got {precision!r}; choose one'
        )
    precision = precisions[0] if precision == "auto" else precision
    if chosen == "cuda":
        from .cuda import CudaBackend

        return CudaBackend.load(Path(path), precision)
    from .eager import EagerBackend

    return EagerBackend.load(Path(path), precision)


def _load_package(path: Path, name: str, precision: str) -> Backend:
    from .onnx import OnnxBackend

    own = Package.open(path).precision
    if precision not in ("auto", own):
        raise BackendError(
            f'precision of this package is {own}, asked was {precision!r}; use "auto", or export it with --precision {precision}'
        )
    return OnnxBackend.load(path, name.partition(":")[2] or "cpu")
