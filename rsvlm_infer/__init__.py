"""RSVLM: remote-sensing images in, true sentences out. Owns the public names; loads none of them before they are used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import RsvlmConfig
    from .errors import RsvlmError
    from .imagery.plan import plan_scene
    from .imagery.source import open_scene
    from .pipeline import RSVLM
    from .tasks.result import Answer, Classification

__version__ = "0.1.0"

__all__ = ["RSVLM", "Answer", "Classification", "RsvlmConfig", "RsvlmError", "__version__", "open_scene", "plan_scene"]

_HOME = {
    "RSVLM": "pipeline",
    "Answer": "tasks.result",
    "Classification": "tasks.result",
    "RsvlmConfig": "config",
    "RsvlmError": "errors",
    "open_scene": "imagery.source",
    "plan_scene": "imagery.plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names are {sorted(__all__)}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
