"""Runs the Triton tests under Triton's interpreter, one process per file, because its variable is read when triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FILES = sorted(path.name for path in Path(__file__).parent.glob("test_triton_*.py"))


def _why_not() -> str | None:
    try:
        from rsvlm_infer.hardware import library_version
        from rsvlm_infer.kernels.triton.launch import triton_why_not
    except ImportError:
        return "torch is not installed"
    version = library_version("triton")
    if version is None:
        return triton_why_not()
    if version.startswith("3.6.") and tuple(int(part) for part in np.__version__.split(".")[:2]) >= (2, 4):
        return f"the interpreter of triton {version} does not work with numpy {np.__version__}, only below 2.4"
    return None


def _measured() -> list[str]:
    """The start of a command under which the child's coverage joins the parent's."""
    try:
        from coverage import Coverage
    except ImportError:
        return ["-m"]
    return ["-m"] if Coverage.current() is None else ["-m", "coverage", "run", "-m"]


@pytest.mark.parametrize("file", FILES)
def test_kernels_in_the_interpreter(file: str, repository: Path) -> None:
    if (reason := _why_not()) is not None:
        pytest.skip(reason)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *_measured(), "pytest", "-q", "-p", "no:cacheprovider", f"tests/kernels/{file}"]
    finished = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]
    assert " passed" in finished.stdout, f"no test ran: {finished.stdout[-2000:]}"
