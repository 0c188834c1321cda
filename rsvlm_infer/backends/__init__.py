"""Ways to run one model. Owns the choice of a backend; knows no engine, no text, no raster."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..errors import BackendError, CheckpointError, MissingDependencyError
from ..hardware import native_why_not
from ..models.native_package import is_native_package
from .base import Backend, DraftingBackend, Embeddings, GreedyBackend, ImageFeatures, Prompt, Query

__all__ = [
    "BACKENDS",
    "Backend",
    "DraftingBackend",
    "Embeddings",
    "GreedyBackend",
    "ImageFeatures",
    "Prompt",
    "Query",
    "load_backend",
    "why_not",
]

# Backend -> precisions, in order of preference. Preference is data; capability is why_not().
BACKENDS: dict[str, tuple[str, ...]] = {
    "eager": ("float32", "bfloat16", "float16"),
    "native": ("fp32", "bf16", "int8", "int4"),  # of the package that it reads; "auto" takes it for one
    # after eager, so "auto" does not choose it: no GPU has run it yet; int8 and int4: weights of the language model's layers
    "cuda": ("bfloat16", "float16", "float32", "int8", "int4"),
}


def why_not(name: str) -> str | None:
    """Why this backend cannot run here; None when it can.

    Raises:
        BackendError: no such backend.
    """
    if name not in BACKENDS:
        raise BackendError(f'backend must be "auto" or one of {sorted(BACKENDS)}, got {name!r}; choose one of them')
    if name == "native":
        return native_why_not()
    if importlib.util.find_spec("torch") is None:
        return 'torch is not installed; run pip install "rsvlm-infer[torch]"'
    if name == "cuda":
        from .cuda import why_not as cuda_why_not

        return cuda_why_not()
    return None


def load_backend(path: str | Path, name: str = "auto", precision: str = "auto") -> Backend:
    """Loads a checkpoint folder, or a package, into a backend.

    Args:
        path: checkpoint or package folder. name: "auto" = the package's backend, else the first that can run. precision: "auto" =
            the package's, else the backend's first.

    Raises:
        BackendError: an unknown backend or precision. MissingDependencyError: none can run here. CheckpointError: a bad folder.
    """
    package = is_native_package(path)
    chosen = ("native" if package else next(iter(BACKENDS))) if name == "auto" else name
    reason = why_not(chosen)
    if reason is not None:
        raise MissingDependencyError(f"backend {chosen!r} cannot run here: {reason}")
    precisions = BACKENDS[chosen]
    if precision != "auto" and precision not in precisions:
        raise BackendError(
            f'precision of backend {chosen!r} must be "auto" or one of {list(precisions)}, got {precision!r}; choose one'
        )
    if package != (chosen == "native"):
        step = 'export it first, or use backend "eager"' if chosen == "native" else 'use backend "native", or its checkpoint'
        kind = "a checkpoint" if chosen == "native" else "a native package"
        raise CheckpointError(f"backend {chosen!r} cannot read {path}, which is {kind}; {step}")
    if chosen == "native":
        from .native import NativeBackend

        native = NativeBackend.load(Path(path))
        if precision not in ("auto", native.precision):
            raise BackendError(
                f"precision must be {native.precision!r}, that of the package, got {precision!r}; export it in that precision"
            )
        return native
    precision = precisions[0] if precision == "auto" else precision
    if chosen == "cuda":
        from .cuda import CudaBackend

        return CudaBackend.load(Path(path), precision)
    from .eager import EagerBackend

    return EagerBackend.load(Path(path), precision)
