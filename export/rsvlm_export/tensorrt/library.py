"""The TensorRT libraries: which one is here, which chips it builds for. Knows no graph."""

from __future__ import annotations

import importlib
import importlib.util
import re
from dataclasses import dataclass
from typing import Any

from rsvlm_infer.errors import BackendError, InputError, MissingDependencyError

# module names; the wheels of tensorrt-rtx come with and without a shorter name
RTX_MODULES = ("tensorrt_rtx", "tensorrt_rtx_bindings")
FULL_MODULE = "tensorrt"


@dataclass(frozen=True)
class Library:
    """One TensorRT. `rtx` builds for named chips without a GPU; the full one only for the GPU that it sits on, and has plugins."""

    module: Any
    rtx: bool

    @property
    def name(self) -> str:
        return "tensorrt-rtx" if self.rtx else "tensorrt"

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def chips(self) -> tuple[str, ...]:
        """Chips that it can be told to build for, as `sm_89`; none where it always builds for the GPU that it sits on."""
        if not self.rtx:
            return ()
        found = (re.fullmatch(r"SM(\d+)", name) for name in dir(self.module.ComputeCapability))
        return tuple(f"sm_{digits}" for digits in sorted((match[1] for match in found if match), key=int))

    def check_chip(self, chip: str) -> None:
        """Raises InputError when it cannot build for this chip."""
        if self.rtx and chip not in self.chips:
            raise InputError(
                f"--chip must be one of {list(self.chips)} for tensorrt-rtx {self.version}, got {chip!r}; choose one"
            )


def why_not() -> str | None:
    """Why no TensorRT can build here; None when one can."""
    if any(importlib.util.find_spec(name) is not None for name in (*RTX_MODULES, FULL_MODULE)):
        return None
    return 'neither tensorrt-rtx nor tensorrt is installed; run pip install "rsvlm-infer[tensorrt]"'


def load_library(name: str = "auto") -> Library:
    """name: "tensorrt-rtx", "tensorrt" (full), or "auto" = the first of them that is installed.

    Raises:
        MissingDependencyError: it is not installed. BackendError: it is, and does not load.
    """
    wanted = {"tensorrt-rtx": RTX_MODULES, "tensorrt": (FULL_MODULE,), "auto": (*RTX_MODULES, FULL_MODULE)}
    if name not in wanted:
        raise InputError(f"the TensorRT library must be one of {sorted(wanted)}, got {name!r}; choose one of them")
    for module in wanted[name]:
        if importlib.util.find_spec(module) is None:
            continue
        try:
            return Library(importlib.import_module(module), rtx=module != FULL_MODULE)
        except (ImportError, OSError) as error:
            raise BackendError(f"{module} is installed and does not load ({error}); install it again") from None
    raise MissingDependencyError(f"{name} cannot build engines here: {why_not() or f'{name} is not installed'}")
